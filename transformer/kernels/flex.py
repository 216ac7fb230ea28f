"""Flex attention: a bias added where scores are formed, in a graph that a compiler makes for a GPU.

Its decode kernel splits keys over the card and shares them within a group, which SDPA does beside no bias. Only a
compiled graph has that kernel: anywhere else `flex_attention` forms all scores (arXiv 2412.05496).
"""

from torch import Tensor


def flex(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float) -> Tensor:
    """Attention of `query` [B, H, L, D] over `key`, `value` [B, G, S, D] with `bias`: [B, H, L, D].

    The bias broadcasts to [B, H, L, S] and is added in float32.
    """
    # Imported here: it brings the compiler along, which is there where this runs.
    from torch.nn.attention.flex_attention import flex_attention

    bias = bias.reshape((1,) * (4 - bias.ndim) + bias.shape)
    rows, heads, queries, _ = (size > 1 for size in bias.shape)

    def add(score: Tensor, row: Tensor, head: Tensor, at: Tensor, column: Tensor) -> Tensor:
        return score + bias[row if rows else 0, head if heads else 0, at if queries else 0, column]

    out: Tensor = flex_attention(query, key, value, add, scale=scale, enable_gqa=query.shape[1] != key.shape[1])
    return out
