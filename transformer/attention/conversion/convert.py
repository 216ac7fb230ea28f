"""Conversion of attention of one kind into another: key/value heads pooled into fewer, or repeated into more."""

from collections.abc import Callable
from typing import overload

from einops import reduce, repeat
from torch import Tensor, nn

from ...cache import CacheSlot
from ...errors import ConfigurationError
from ..base import Attention
from ..gqa import GroupQueryAttention
from ..mha import MultiHeadAttention
from ..mqa import MultiQueryAttention
from ..option_checks import key_value_heads
from .replacement import ModuleT, Replacement, plain_linear, unhooked

KINDS: tuple[type[Attention], ...] = (MultiHeadAttention, MultiQueryAttention, GroupQueryAttention)


@overload
def to_mha(module: Attention) -> MultiHeadAttention: ...
@overload
def to_mha(module: ModuleT) -> ModuleT: ...
def to_mha(module: nn.Module) -> nn.Module:
    """A copy of `module` in which every attention is a `MultiHeadAttention`.

    `module` is an attention of this library, or a model with some in it. Key/value heads are repeated, one for each of
    the query heads that shared it: outputs stay exactly as they were, and the cache grows by `H / G`.

    The copy shares nothing with `module`, which stays as it is. Options, trained norms, position schemes, dtype,
    device, training mode and `requires_grad` go along, and what is shared within the model (one scheme for all layers,
    one attention in two places, tied weights) is shared in the copy. Caches stay behind: the copy begins without one.

    Raises:
        ArgumentError: where there is no attention of this library in `module`.
        ConfigurationError: naming the place in the model, where an attention to be changed is of a class of one's own
            or has hooks; where the number of key/value heads changes and `k_proj` or `v_proj` is not a plain
            `nn.Linear` without hooks (a LoRA wrapper, a parametrization), or has weights tied to some that do not
            change alike.
    """
    return _converted(module, MultiHeadAttention, lambda attention: attention.num_heads)


@overload
def to_gqa(
    module: Attention, num_groups: int | None = None, *, num_kv_heads: int | None = None
) -> GroupQueryAttention: ...
@overload
def to_gqa(module: ModuleT, num_groups: int | None = None, *, num_kv_heads: int | None = None) -> ModuleT: ...
def to_gqa(module: nn.Module, num_groups: int | None = None, *, num_kv_heads: int | None = None) -> nn.Module:
    """A copy of `module` in which every attention is a `GroupQueryAttention` with `num_groups` key/value heads.

    `num_kv_heads` is another name of `num_groups`; give exactly one of the two.

    Where there were more of them, neighbours are pooled: their rows of `k_proj` and `v_proj`, weights and biases, are
    averaged (GQA, arXiv 2305.13245, section 2.1), and the model wants some more training. Where there were fewer, each
    is repeated, and outputs stay exactly as they were. All else is as for `to_mha`.

    Raises:
        ArgumentError: as `to_mha`.
        ConfigurationError: as `to_mha`; and naming `num_groups`, where it does not divide the number of query heads,
            or neither divides the number of key/value heads nor is a multiple of it.
    """
    groups = key_value_heads(num_groups, num_kv_heads)
    return _converted(module, GroupQueryAttention, lambda _: groups)


@overload
def to_mqa(module: Attention) -> MultiQueryAttention: ...
@overload
def to_mqa(module: ModuleT) -> ModuleT: ...
def to_mqa(module: nn.Module) -> nn.Module:
    """A copy of `module` in which every attention is a `MultiQueryAttention`: its key/value heads pooled into one.

    Pooling is that of `to_gqa` with one group (GQA, arXiv 2305.13245, section 2.1); all else is as for `to_mha`.

    Raises:
        ArgumentError, ConfigurationError: as `to_mha`.
    """
    return _converted(module, MultiQueryAttention, lambda _: 1)


def regrouped(rows: Tensor, groups: int, new_groups: int, head_dim: int) -> Tensor:
    """Rows of `groups` heads [G * D, ...] as those of `new_groups`: repeated, or the means of neighbours."""
    if new_groups >= groups:
        return repeat(rows, "(G D) ... -> (G repeated D) ...", D=head_dim, repeated=new_groups // groups)
    return reduce(rows, "(G pooled D) ... -> (G D) ...", "mean", G=new_groups, D=head_dim)


def check_own(name: str, attention: Attention) -> None:
    """Raises ConfigurationError where an attention does more than the library's classes, which would be lost."""
    if type(attention) not in KINDS:
        raise ConfigurationError(
            f"{name}: expected a MultiHeadAttention, MultiQueryAttention or GroupQueryAttention, got "
            f"{type(attention).__name__}, what it adds to them would be lost; convert before extending it"
        )
    if not unhooked(attention):
        raise ConfigurationError(
            f"{name}: expected an attention without hooks, got hooks that may not fit the new one; "
            "remove them first, and register them on the copy"
        )


def check_plain(name: str, projection: nn.Module) -> None:
    """Raises ConfigurationError where a projection is more than its weight and bias."""
    if not plain_linear(projection):
        raise ConfigurationError(
            f"{name}: expected a plain nn.Linear without hooks, since its weights are made anew, got "
            f"{type(projection).__name__}; merge or remove what was put around it first"
        )


def _converted(model: nn.Module, kind: type[Attention], groups_of: Callable[[Attention], int]) -> nn.Module:
    replacement = Replacement(model, Attention)
    shells: dict[Attention, Attention] = {}
    for attention in replacement.paths:
        num_groups = groups_of(attention)
        same = isinstance(attention, kind) and attention.num_groups == num_groups
        if not same:
            check_own(replacement.name(attention), attention)
            _check_groups(replacement.name(attention), attention, num_groups)
        if attention.num_groups != num_groups:
            _regroup(replacement, attention, num_groups)
        # Not made by its constructor: that would draw random numbers, and knows only of its own options.
        shell_kind = type(attention) if same else kind
        shells[attention] = shell_kind.__new__(shell_kind)
        replacement.put(attention, shells[attention])
    # Only now: a piece may lead to another attention, or to the model itself.
    for attention, shell in shells.items():
        shell.__dict__.update(replacement.copied({**attention.__dict__, "slot": CacheSlot()}))
        if shell.num_groups != groups_of(attention):
            shell.num_groups = groups_of(attention)
            shell.k_proj.out_features = shell.v_proj.out_features = shell.num_groups * shell.head_dim
    return replacement.finished()


def _check_groups(name: str, attention: Attention, num_groups: int) -> None:
    """Raises ConfigurationError where heads cannot be pooled or repeated into so many, naming what does not fit."""
    if attention.num_heads % num_groups:
        raise ConfigurationError(
            f"num_groups: expected a divisor of num_heads={attention.num_heads} of {name}, got {num_groups}"
        )
    if num_groups != attention.num_groups and attention.k_norm is not None and not attention.qk_norm_per_head:
        raise ConfigurationError(
            f"{name}: expected a norm of each key head, got one over all {attention.num_groups} of them "
            "(qk_norm_per_head=False), which has no equal over another number"
        )
    if num_groups % attention.num_groups and attention.num_groups % num_groups:
        raise ConfigurationError(
            f"num_groups: expected a divisor or a multiple of the {attention.num_groups} key/value heads of {name}, "
            f"got {num_groups}; convert to as many as query heads first: to_gqa(to_mha(module), {num_groups})"
        )


def _regroup(replacement: Replacement[Attention], attention: Attention, num_groups: int) -> None:
    """Has `k_proj` and `v_proj` copied with the weights and biases of `num_groups` heads."""
    how = attention.num_groups, num_groups, attention.head_dim
    for name in ("k_proj", "v_proj"):
        projection = attention.get_submodule(name)
        check_plain(replacement.name(attention, name), projection)
        for part, parameter in projection.named_parameters():
            made = replacement.remade(attention, [f"{name}.{part}"], how, lambda rows: [regrouped(rows, *how)])
            replacement.put(parameter, *made)
