"""Projected tokens as heads, normalised where a norm is given, and the norms of queries and keys."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..errors import ConfigurationError, ShapeError


def new_norms(
    qk_norm: nn.Module | Callable[[int], nn.Module] | None, query_width: int, key_width: int
) -> tuple[nn.Module | None, nn.Module | None]:
    """The norms of queries and of keys: a module and its copy, or two that a callable makes of their widths.

    Raises ConfigurationError for a module where the widths differ.
    """
    if qk_norm is None or isinstance(qk_norm, nn.Module):
        if qk_norm is not None and query_width != key_width:
            raise ConfigurationError(
                f"qk_norm: expected a callable that makes a norm of a width, as queries have {query_width} and keys "
                f"{key_width} with qk_norm_per_head=False, got {type(qk_norm).__name__}"
            )
        return qk_norm, copy.deepcopy(qk_norm)
    return qk_norm(query_width), qk_norm(key_width)


def as_heads(
    name: str, projected: Tensor, number: int, head_dim: int, norm: nn.Module | None, per_head: bool = True
) -> Tensor:
    """What a projection gave, [B, L, number * D], as heads [B, number, L, D], normalised where a norm is given.

    `per_head`: whether the norm is over `D`, or over all heads together.

    Raises ShapeError, naming the projection, where it gave another width.
    """
    batch, length, width = projected.shape
    if width != number * head_dim:
        raise ShapeError(
            f"{name}: expected it to give {number} heads of {head_dim}, [B, L, {number * head_dim}], "
            f"got {list(projected.shape)}; where processes share the heads, divide num_heads and num_groups too"
        )
    if norm is not None and not per_head:
        projected, norm = norm(projected), None
    # Of one token both orders are the same numbers. A length that may change is not asked for.
    if norm is None and not torch.compiler.is_dynamo_compiling() and type(length) is int and length == 1:
        return projected.reshape(batch, number, 1, head_dim)
    heads = projected.reshape(batch, length, number, head_dim)
    return (heads if norm is None else norm(heads)).transpose(1, 2)
