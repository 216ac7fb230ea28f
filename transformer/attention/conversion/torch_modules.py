"""Conversion to and from `torch.nn.MultiheadAttention`, with equal outputs."""

from typing import overload

import torch
from torch import Tensor, nn

from ...errors import ArgumentError, ConfigurationError
from ..base import Attention
from ..mha import MultiHeadAttention
from .convert import check_own, check_plain, regrouped
from .replacement import ModuleT, Replacement, unhooked

INPUTS = ("q_proj", "k_proj", "v_proj")


@overload
def from_torch(
    module: nn.MultiheadAttention, apply_causal_mask: bool = ..., use_kv_cache: bool = ...
) -> MultiHeadAttention: ...
@overload
def from_torch(module: ModuleT, apply_causal_mask: bool = ..., use_kv_cache: bool = ...) -> ModuleT: ...
def from_torch(module: nn.Module, apply_causal_mask: bool = False, use_kv_cache: bool = False) -> nn.Module:
    """A copy of `module` in which every `torch.nn.MultiheadAttention` is a `MultiHeadAttention` of equal outputs.

    `module` is torch's attention, or a model with some in it. Torch takes causal order at each call;
    here the module knows: `apply_causal_mask`, for all of them. `kdim` and `vdim` become `kv_dim`, and dropout, dtype,
    device, training mode and `requires_grad` go along. The copy shares nothing with `module`, which stays as it is;
    what is shared within the model is shared in the copy.

    The new modules are called otherwise, and a model's own forward has to follow: always batch first (`[B, L, E]`,
    whatever `batch_first` was), `attention(x)` or `attention(x, kv=source)`, masks that are true for real tokens
    (torch's `key_padding_mask` is true for padding), and one output unless `return_weights=True`.

    Raises:
        ArgumentError: where there is no `torch.nn.MultiheadAttention` in `module`, or one of torch's transformer
            layers, whose forward calls its attention in torch's way.
        ConfigurationError: naming the place in the model, where `kdim` is not `vdim`, where there is `add_bias_kv` or
            `add_zero_attn`, where an attention has hooks or a parametrization or is of a class of one's own, and where
            its packed weights are tied to others.
    """
    replacement = Replacement(module, nn.MultiheadAttention)
    for path, layer in module.named_modules():
        if isinstance(layer, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
            raise ArgumentError(
                f"module: expected no nn.{type(layer).__name__}, which calls its attention in torch's way, got one at "
                f"{path or 'module'}; transformer.blocks.from_torch rebuilds such layers as blocks"
            )
    built: dict[nn.MultiheadAttention, MultiHeadAttention] = {}
    for theirs in replacement.paths:
        _check_torch(replacement, theirs)
        # On the meta device, where a constructor draws no random numbers.
        built[theirs] = MultiHeadAttention(
            theirs.embed_dim,
            theirs.num_heads,
            apply_causal_mask,
            use_kv_cache,
            kv_dim=theirs.kdim,
            bias=theirs.in_proj_bias is not None,
            out_bias=theirs.out_proj.bias is not None,
            dropout=theirs.dropout,
            device="meta",
        ).train(theirs.training)
        replacement.put(theirs, built[theirs])
        replacement.put(theirs.out_proj, built[theirs].out_proj)
    for theirs, ours in built.items():
        _unpack(replacement, theirs, ours)
    return replacement.finished()


@overload
def to_torch(module: Attention) -> nn.MultiheadAttention: ...
@overload
def to_torch(module: ModuleT) -> ModuleT: ...
def to_torch(module: nn.Module) -> nn.Module:
    """A copy of `module` in which every attention is a `torch.nn.MultiheadAttention(batch_first=True)`.

    `module` is an attention of this library of any kind, or a model with some in it; fewer key/value heads than query
    heads are repeated first. Torch's attention has no cache, and takes causal order at each call: give it
    `attn_mask` where this one had `apply_causal_mask=True`. `kv_dim` becomes `kdim` and `vdim`; all else, and what a
    model's own forward has to follow, is as for `from_torch`.

    Raises:
        ArgumentError: where there is no attention of this library in `module`.
        ConfigurationError: naming the place in the model, where an attention has what torch's does not: a `position`
            scheme, `window_size`, `qk_norm`, `softcap`, `sink_logits`, `mask_rule`, `score_rule`, another `scale` than
            `head_dim ** -0.5`, heads that do not add up to `embed_dim`, an `out_bias` other than `bias`; where one of
            its projections is not a plain `nn.Linear` without hooks, or it has hooks itself or is of a class of one's
            own; and where weights that torch packs into one are not alike in dtype, device or `requires_grad`, or are
            tied to others.
    """
    replacement = Replacement(module, Attention)
    built: dict[Attention, nn.MultiheadAttention] = {}
    for ours in replacement.paths:
        _check_own(replacement, ours)
        built[ours] = nn.MultiheadAttention(
            ours.embed_dim,
            ours.num_heads,
            ours.dropout,
            ours.q_proj.bias is not None,
            kdim=ours.kv_dim,
            vdim=ours.kv_dim,
            batch_first=True,
            device="meta",
        ).train(ours.training)
        replacement.put(ours, built[ours])
        replacement.put(ours.out_proj, built[ours].out_proj)
    for ours, theirs in built.items():
        _pack(replacement, ours, theirs)
    return replacement.finished()


def _check_torch(replacement: Replacement[nn.MultiheadAttention], theirs: nn.MultiheadAttention) -> None:
    name = replacement.name(theirs)
    if type(theirs) is not nn.MultiheadAttention or not unhooked(theirs):
        raise ConfigurationError(
            f"{name}: expected a torch.nn.MultiheadAttention without hooks or parametrizations, got "
            f"{type(theirs).__name__}; what was added to it would be lost, remove it first"
        )
    check_plain(replacement.name(theirs, "out_proj"), theirs.out_proj)
    obstacles = []
    if theirs.kdim != theirs.vdim:
        obstacles.append(f"kdim={theirs.kdim} other than vdim={theirs.vdim}")
    if theirs.bias_k is not None or theirs.bias_v is not None:
        obstacles.append("add_bias_kv=True")
    if theirs.add_zero_attn:
        obstacles.append("add_zero_attn=True")
    if not 0.0 <= theirs.dropout < 1.0:
        obstacles.append(f"dropout={theirs.dropout}")
    if obstacles:
        raise ConfigurationError(f"{name}: MultiHeadAttention cannot do what it was built with: {', '.join(obstacles)}")


def _check_own(replacement: Replacement[Attention], ours: Attention) -> None:
    name = replacement.name(ours)
    check_own(name, ours)
    for projection in (*INPUTS, "out_proj"):
        check_plain(replacement.name(ours, projection), ours.get_submodule(projection))
    obstacles = [
        f"{option}={type(value).__name__ if isinstance(value, nn.Module) else value}"
        for option, value in (
            ("position", ours.position),
            ("window_size", ours.window_size),
            ("qk_norm", ours.k_norm if ours.q_norm is None else ours.q_norm),
            ("softcap", ours.kernel.softcap),
            ("mask_rule", ours.mask_rule),
            ("score_rule", ours.score_rule),
            ("sink_logits", None if ours.sink_logits is None else True),
        )
        if value is not None
    ]
    if ours.kernel.scale != ours.head_dim**-0.5:
        obstacles.append(f"scale={ours.kernel.scale} other than head_dim ** -0.5")
    if ours.num_heads * ours.head_dim != ours.embed_dim:
        obstacles.append(
            f"num_heads * head_dim = {ours.num_heads * ours.head_dim} other than embed_dim={ours.embed_dim}"
        )
    biases = [ours.get_submodule(projection).bias is not None for projection in (*INPUTS, "out_proj")]
    if len(set(biases)) > 1:
        obstacles.append(f"biases in some projections only (q, k, v, out: {biases}), as with out_bias other than bias")
    if obstacles:
        raise ConfigurationError(
            f"{name}: torch.nn.MultiheadAttention cannot do what it was built with: {', '.join(obstacles)}"
        )
    for part in _packed_parts(ours):
        kinds = {(p.dtype, p.device, p.requires_grad) for p in (ours.get_parameter(f"{n}.{part}") for n in INPUTS)}
        if len(kinds) > 1:
            raise ConfigurationError(
                f"{name}: expected q_proj.{part}, k_proj.{part} and v_proj.{part} alike in dtype, device and "
                f"requires_grad, to be packed into one, got {kinds}; make them alike first"
            )


def _packed_parts(ours: Attention) -> list[str]:
    """Names of the parameters of q_proj, k_proj and v_proj that torch packs into one: not weights of unequal widths."""
    parts = [part for part, _ in ours.q_proj.named_parameters()]
    return parts if ours.kv_dim == ours.embed_dim else [part for part in parts if part != "weight"]


def _unpack(
    replacement: Replacement[nn.MultiheadAttention], theirs: nn.MultiheadAttention, ours: MultiHeadAttention
) -> None:
    """Puts copies of torch's parameters into `ours`."""
    weights: tuple[nn.Parameter, ...]
    if not theirs._qkv_same_embed_dim:
        weights = tuple(replacement.copied(theirs.get_parameter(f"{name}_weight")) for name in INPUTS)
    else:
        weights = replacement.remade(theirs, ["in_proj_weight"], "thirds", _thirds)
    for name, weight in zip(INPUTS, weights, strict=True):
        ours.get_submodule(name).weight = weight
    if theirs.in_proj_bias is not None:
        for name, bias in zip(INPUTS, replacement.remade(theirs, ["in_proj_bias"], "thirds", _thirds), strict=True):
            ours.get_submodule(name).bias = bias
    ours.out_proj = replacement.copied(theirs.out_proj)
    for name, parameter in theirs.out_proj.named_parameters():
        ours.out_proj.register_parameter(name, replacement.copied(parameter))


def _thirds(rows: Tensor) -> tuple[Tensor, ...]:
    return rows.chunk(3)


def _pack(replacement: Replacement[Attention], ours: Attention, theirs: nn.MultiheadAttention) -> None:
    """Puts copies of the parameters of `ours` into torch's attention."""
    heads = ours.num_groups, ours.num_heads, ours.head_dim

    def packed(query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        return [torch.cat((query, regrouped(key, *heads), regrouped(value, *heads)))]

    for part in _packed_parts(ours):
        (made,) = replacement.remade(ours, [f"{name}.{part}" for name in INPUTS], heads, packed)
        theirs.register_parameter(f"in_proj_{part}", made)
    if "weight" not in _packed_parts(ours):
        theirs.q_proj_weight = replacement.copied(ours.q_proj.weight)
        for name in ("k_proj", "v_proj"):
            (made,) = replacement.remade(ours, [f"{name}.weight"], heads, lambda rows: [regrouped(rows, *heads)])
            theirs.register_parameter(f"{name}_weight", made)
    theirs.out_proj = replacement.copied(ours.out_proj)
    for name, parameter in ours.out_proj.named_parameters():
        theirs.out_proj.register_parameter(name, replacement.copied(parameter))
