"""A long prompt over a short window: blocks of queries against a mask of length by length."""

import torch
import torch.nn.functional as F

from transformer import MultiHeadAttention
from transformer.attention.attend import Attend
from transformer.cache import whole_chunk

from .timing import medians, print_table

EMBED_DIM, NUM_HEADS, WINDOW = 1024, 16, 256


@torch.inference_mode()
def run(lengths: tuple[int, ...] = (4096, 8192), rounds: int = 5) -> None:
    """Prints milliseconds of the kernel and of the whole module, both ways, and the growth with length."""
    body, before = [], None
    for length in lengths:
        attention = MultiHeadAttention(EMBED_DIM, NUM_HEADS, True, bias=False, window_size=WINDOW).eval()
        x = torch.randn(1, length, EMBED_DIM)
        heads = torch.randn(3, 1, NUM_HEADS, length, EMBED_DIM // NUM_HEADS)
        position = torch.arange(length)
        distance = position[:, None] - position
        mask = (distance >= 0) & (distance < WINDOW)

        def kernel(attention=attention, x=x, heads=heads) -> torch.Tensor:
            step = attention.plan(x)
            return Attend(attention.kernel, step, whole_chunk(heads[1], heads[2], step), heads[0], heads[0])()[0]

        def masked(heads=heads, mask=mask) -> torch.Tensor:
            return F.scaled_dot_product_attention(*heads, attn_mask=mask)

        def masked_module(attention=attention, x=x, mask=mask) -> torch.Tensor:
            shape = x.shape[0], x.shape[1], NUM_HEADS, -1
            query, key, value = (
                projection(x).view(shape).transpose(1, 2)
                for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
            return attention.out_proj(out.transpose(1, 2).flatten(2))

        candidates = {"kernel": kernel, "module": lambda module=attention, x=x: module(x)}
        if length == lengths[0]:
            torch.testing.assert_close(kernel(), masked(), rtol=0, atol=1e-5)
            candidates |= {"masked": masked, "masked module": masked_module}
        seconds = medians(candidates, rounds, f"window {WINDOW}, {length} tokens", burst=1)
        row = [f"{length:,}", f"{seconds['kernel'] * 1e3:.0f}", f"{seconds['module'] * 1e3:.0f}"]
        if before is None:
            row += [
                f"{seconds['masked'] * 1e3:.0f}",
                f"{seconds['masked module'] * 1e3:.0f}",
                f"{seconds['masked'] / seconds['kernel']:.1f}",
                f"{seconds['masked module'] / seconds['module']:.1f}",
                "",
            ]
        else:
            row += [
                "",
                "",
                "",
                "",
                f"{seconds['kernel'] / before['kernel']:.2f}, {seconds['module'] / before['module']:.2f}",
            ]
        before = seconds
        body.append(row)
    print_table(
        f"Windowed prefill, milliseconds (window {WINDOW}, E {EMBED_DIM}, H {NUM_HEADS}, float32)",
        [
            "tokens",
            "kernel",
            "module",
            "SDPA, mask",
            "module, mask",
            "x kernel",
            "x module",
            "time x, doubled (kernel, module)",
        ],
        body,
    )
