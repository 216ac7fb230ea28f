"""Options of one block, read from its modules; anything that no options describe is refused by its path."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, NoReturn

import torch
from torch import nn

from ..attention import Attention
from ..attention.conversion.convert import KINDS
from ..blocks import (
    ACTIVATIONS,
    DecoderBlock,
    EncoderBlock,
    FeedForward,
    GatedFeedForward,
    LayerNorm,
    MixtureOfExperts,
    RMSNorm,
)
from ..blocks.mixture import ExpertLinear
from ..blocks.residual import Residual
from ..errors import ConfigurationError
from ..positions import ALiBi, RelativePositionBias, RotaryEmbedding
from ..positions.scaling_kinds import SCALINGS
from .layers import Dropouts
from .parts import NormConfig

ATTENTIONS: tuple[type[Attention], ...] = (*KINDS, Attention)

PLACEMENTS = {
    ("norm_before",): "before",
    ("norm_before", "norm_branch"): "both",
    ("norm_branch",): "branch",
    ("norm_after",): "after",
}
"""Norms of a residual connection, each with the word of their placement."""

Options = dict[str, Any]


class BlockOptions(NamedTuple):
    """The options of one block, the norm of its queries and keys, and its dropout."""

    options: Options
    qk_norm: NormConfig | None
    dropouts: Dropouts


def read_block(path: str, block: Any) -> BlockOptions:
    """The options of a block. Raises ConfigurationError, with the path of the module, if there are none."""
    expect(path, block, DecoderBlock, EncoderBlock)
    if getattr(block, "cross_attention", None) is not None:
        refuse(path, block, "a block without cross-attention", "a model that reads a source has no composition")
    attention, feed_forward = block.get_submodule("attention"), block.get_submodule("feed_forward")
    options, qk_norm = _read_attention(f"{path}.attention", attention)
    options |= _read_feed_forward(f"{path}.feed_forward", feed_forward)
    residual = block.residual if isinstance(block, DecoderBlock) else "sequential"
    first = _read_residual(f"{path}.attention_residual", block.get_submodule("attention_residual"))
    if residual != "parallel_one_norm":
        second = _read_residual(f"{path}.feed_forward_residual", block.get_submodule("feed_forward_residual"))
        if first != second:
            refuse(path, block, "equal norms, placements and dropout in both branches", f"with {first} and {second}")
    dropouts = Dropouts(attention.dropout, first["dropout"], feed_forward.dropout)
    return BlockOptions(options | first | {"residual": residual}, qk_norm, dropouts)


def read_norm(path: str, norm: Any) -> NormConfig:
    """The options of a norm over the last dimension. Raises ConfigurationError as `read_block`."""
    expect(path, norm, RMSNorm, LayerNorm, nn.RMSNorm, nn.LayerNorm)
    if isinstance(norm, RMSNorm):
        return NormConfig(norm="rms", norm_eps=norm.eps, norm_unit_offset=norm.unit_offset)
    if isinstance(norm, LayerNorm):
        bias = norm.bias is not None
        return NormConfig(norm="layer", norm_eps=norm.eps, norm_bias=bias, norm_unit_offset=norm.unit_offset)
    if len(norm.normalized_shape) != 1 or norm.weight is None:
        refuse(path, norm, "a norm over the last dimension with weights", "give it elementwise_affine=True")
    if isinstance(norm, nn.LayerNorm):
        return NormConfig(norm="layer", norm_eps=norm.eps, norm_bias=norm.bias is not None)
    if norm.eps is None and norm.weight.dtype not in (torch.float32, torch.float64):
        refuse(path, norm, "eps as a number, as its default depends on the dtype", "set it, as in norm.eps = 1e-6")
    return NormConfig(norm="rms", norm_eps=torch.finfo(norm.weight.dtype).eps if norm.eps is None else norm.eps)


def _read_attention(path: str, attention: Any) -> tuple[Options, NormConfig | None]:
    expect(path, attention, *ATTENTIONS)
    if not attention.apply_causal_mask:
        refuse(path, attention, "apply_causal_mask=True", "a decoder-only model reads in causal order")
    if attention.rules is not None:
        refuse(path, attention, "no mask_rule and no score_rule", "functions have no options")
    biases = _biases(path, attention, "q_proj", "k_proj", "v_proj")
    qk_norm = None
    if attention.q_norm is not None and attention.k_norm is not None:
        qk_norm = read_norm(f"{path}.q_norm", attention.q_norm)
        if qk_norm != read_norm(f"{path}.k_norm", attention.k_norm):
            refuse(path, attention, "equal options of q_norm and k_norm", "give both the same norm")
    elif attention.q_norm is not attention.k_norm:
        refuse(path, attention, "q_norm and k_norm, or neither", "give both the same norm")
    options: Options = {
        "num_heads": attention.num_heads,
        # The kinds are names of numbers of key/value heads; the normal form has the names.
        "attention": "gqa",
        "num_groups": attention.num_groups,
        "head_dim": attention.head_dim,
        "attention_bias": biases,
        "out_bias": _biases(path, attention, "out_proj"),
        "qk_norm": qk_norm is not None,
        "qk_norm_per_head": attention.qk_norm_per_head,
        "scale": attention.kernel.scale,
        "softcap": attention.kernel.softcap,
        "sink_logits": attention.sink_logits is not None,
        "window_size": attention.window_size,
        "num_sinks": attention.num_sinks,
    }
    return options | _read_position(f"{path}.position", attention.position), qk_norm


def _read_position(path: str, position: Any) -> Options:
    if position is None:
        return {"position": "none"}
    expect(path, position, RotaryEmbedding, ALiBi, RelativePositionBias)
    if isinstance(position, ALiBi):
        return {"position": "alibi"}
    if isinstance(position, RotaryEmbedding):
        if position.scaling is not None:
            expect(f"{path}.scaling", position.scaling, *SCALINGS.values())
        return {
            "position": "rotary",
            "rotary_base": position.base,
            "rotary_dim": position.rotary_dim,
            "rotary_interleaved": position.interleaved,
            "rotary_scaling": position.scaling,
        }
    expect(f"{path}.embedding", position.embedding, nn.Embedding)
    if position.bidirectional:
        refuse(path, position, "bidirectional=False", "a decoder-only model reads in causal order")
    return {
        "position": "relative",
        "relative_buckets": position.num_buckets,
        "relative_max_distance": position.max_distance,
    }


def _read_feed_forward(path: str, feed_forward: Any) -> Options:
    expect(path, feed_forward, FeedForward, GatedFeedForward, MixtureOfExperts)
    kind, names_of_biases = "plain", ["up_proj", "down_proj"]
    own: Options = {}
    if isinstance(feed_forward, GatedFeedForward):
        kind, names_of_biases = "gated", ["gate_proj", *names_of_biases]
    elif isinstance(feed_forward, MixtureOfExperts):
        kind, names_of_biases = "mixture", ["router", "gate_proj", *names_of_biases]
        own = {
            "num_experts": feed_forward.num_experts,
            "experts_per_token": feed_forward.experts_per_token,
            "normalize_routing_weights": feed_forward.normalize_weights,
        }
    names = [name for name, each in ACTIVATIONS.items() if _is_same(each, feed_forward.activation)]
    if not names:
        refuse(
            f"{path}.activation",
            feed_forward.activation,
            f"one of the named activations {sorted(ACTIVATIONS)}",
            "give it by name",
        )
    return {
        "feed_forward": kind,
        "activation": names[0],
        "d_ff": feed_forward.up_proj.out_features,
        "feed_forward_bias": _biases(path, feed_forward, *names_of_biases),
    } | own


def _read_residual(path: str, residual: Any) -> Options:
    expect(path, residual, Residual)
    placed = {
        name: getattr(residual, name)
        for name in ("norm_before", "norm_branch", "norm_after")
        if getattr(residual, name) is not None
    }
    placement = PLACEMENTS.get(tuple(placed))
    norms = [read_norm(f"{path}.{name}", norm) for name, norm in placed.items()]
    if placement is None or norms[0] != norms[-1]:
        expected = "equal norms before a branch, on its output, on both sides, or after the sum"
        refuse(path, residual, expected, f"with {placed}")
    more = {"norm_placement": placement, "dropout": residual.dropout, "residual_scale": residual.scale}
    return norms[0].to_dict() | more


def _biases(path: str, module: Any, *names: str) -> bool:
    """Whether these projections add a bias."""
    kinds = (nn.Linear, ExpertLinear) if isinstance(module, MixtureOfExperts) else (nn.Linear,)
    found = []
    for name in names:
        projection = module.get_submodule(name)
        expect(f"{path}.{name}", projection, *kinds)
        found.append(projection.bias is not None)
    if len(set(found)) > 1:
        refuse(path, module, f"biases in all of {', '.join(names)}, or in none", f"with {found}")
    return found[0]


def _is_same(first: object, second: object) -> bool:
    """True for one function, also after a copy of the `partial` of it."""
    if isinstance(first, partial) and isinstance(second, partial):
        return (first.func, first.args, first.keywords) == (second.func, second.args, second.keywords)
    return first is second


def expect(path: str, module: object, *kinds: type, also: Sequence[type] = ()) -> None:
    """Raises ConfigurationError unless `module` is exactly of one of the classes; `also` are named in the message."""
    if type(module) not in kinds:
        # Without duplicates: PyTorch's norms have the names of ours.
        names = " or ".join(dict.fromkeys(kind.__name__ for kind in (*also, *kinds)))
        refuse(path, module, f"a plain {names}", "merge or remove a wrapper; other classes have no options")


def refuse(path: str, module: object, expected: str, advice: str) -> NoReturn:
    """Raises ConfigurationError for a module that no options describe."""
    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    raise ConfigurationError(f"model.{path}: expected {expected}, got {kind}; {advice}")
