"""The four projections of an attention module, and the norms of its heads."""

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from ..errors import ShapeError
from ..initialization import reset_children
from ..kernels import project


class ProjectedHeads(nn.Module):
    """Projections into heads and out of them, by their usual names: `q_proj`, `k_proj`, `v_proj`, `out_proj`.

    `q_norm` and `k_norm` are norms over `D`, or None; the keys' one is a copy of the queries'.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_groups: int,
        head_dim: int,
        kv_dim: int,
        bias: bool,
        out_bias: bool,
        qk_norm: nn.Module | Callable[[int], nn.Module] | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.num_groups = num_groups
        self.head_dim = head_dim
        self.kv_dim = kv_dim
        linear = partial(nn.Linear, device=device, dtype=dtype)
        self.q_proj = linear(embed_dim, num_heads * head_dim, bias)
        self.k_proj = linear(kv_dim, num_groups * head_dim, bias)
        self.v_proj = linear(kv_dim, num_groups * head_dim, bias)
        self.out_proj = linear(num_heads * head_dim, embed_dim, out_bias)
        self.q_norm, self.k_norm = _norms(qk_norm, head_dim)
        if device is not None or dtype is not None:
            for norm in (self.q_norm, self.k_norm):
                if norm is not None:
                    norm.to(device=device, dtype=dtype)

    @property
    def num_kv_heads(self) -> int:
        """`G`, the number of key/value heads: another name of `num_groups`."""
        return self.num_groups

    def query(self, x: Tensor) -> Tensor:
        """`x` [B, L, E] to queries [B, H, L, D]."""
        return _heads("q_proj", project(self.q_proj, x), self.num_heads, self.head_dim, self.q_norm)

    def key(self, x: Tensor) -> Tensor:
        """`x` [B, L, kv_dim] to keys [B, G, L, D]."""
        return _heads("k_proj", project(self.k_proj, x), self.num_groups, self.head_dim, self.k_norm)

    def value(self, x: Tensor) -> Tensor:
        """`x` [B, L, kv_dim] to values [B, G, L, D]."""
        return _heads("v_proj", project(self.v_proj, x), self.num_groups, self.head_dim, None)

    def out(self, heads: Tensor) -> Tensor:
        """Heads [B, H, L, D] to [B, L, E]."""
        batch, number, length, head_dim = heads.shape
        return project(self.out_proj, heads.transpose(1, 2).reshape(batch, length, number * head_dim))

    def reset_parameters(self) -> None:
        """Initialises the projections, the norms, and a position scheme that learns, anew; a cache stays."""
        reset_children(self)


def _norms(
    qk_norm: nn.Module | Callable[[int], nn.Module] | None, head_dim: int
) -> tuple[nn.Module | None, nn.Module | None]:
    if qk_norm is None or isinstance(qk_norm, nn.Module):
        return qk_norm, copy.deepcopy(qk_norm)
    return qk_norm(head_dim), qk_norm(head_dim)


def _heads(name: str, projected: Tensor, number: int, head_dim: int, norm: nn.Module | None) -> Tensor:
    """[B, L, number * D] as heads [B, number, L, D], normed one by one where a norm is given.

    Raises ShapeError, naming the projection, where it gives another width.
    """
    if projected.shape[2] != number * head_dim:
        raise ShapeError(
            f"{name}: expected it to give {number} heads of {head_dim}, [B, L, {number * head_dim}], "
            f"got {list(projected.shape)}; where processes share the heads, divide num_heads and num_groups too"
        )
    heads = projected.reshape(projected.shape[0], projected.shape[1], number, head_dim)
    return (heads if norm is None else norm(heads)).transpose(1, 2)
