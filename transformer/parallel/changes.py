"""Changes that make a model parallel, module by module: worked out from its plan before anything changes."""

from collections.abc import Mapping
from typing import Any, NamedTuple, cast

from torch import Tensor, nn
from torch.distributed.tensor import Placement

from ..attention import Attention
from ..blocks import FeedForward, GatedFeedForward, LayerNorm, MixtureOfExperts, RMSNorm
from ..errors import ArgumentError
from ..positions import ALiBi, RelativePositionBias
from .adapters import WHOLE_AFTER_SUM, WHOLE_BEFORE_SHARE, adapted_words
from .checks import (
    check_divides,
    check_heads,
    check_no_rules,
    check_no_sink_logits,
    check_norm,
    check_placements,
    check_plain,
    check_position,
    is_plain,
)
from .heads import shared_class
from .linear import ColumnParallelLinear, ReplicatedLinear, RowParallelLinear, VocabCutLinear, VocabParallelLinear
from .norms import HeadsRMSNorm, LocalLayerNorm, LocalRMSNorm, LocalTorchLayerNorm, LocalTorchRMSNorm
from .parts import COLUMNS, ROWS, WHOLE, SumsGradients, local
from .plan import COLWISE, COLWISE_GATHER_OUTPUT, EMBEDDING_ROWWISE, GRAD_ALLREDUCE, ROWWISE, words_of
from .ranks import Ranks
from .tables import LocalEmbedding, VocabParallelEmbedding

REPLICATED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: ReplicatedLinear,
    nn.Embedding: LocalEmbedding,
    RMSNorm: LocalRMSNorm,
    LayerNorm: LocalLayerNorm,
    nn.RMSNorm: LocalTorchRMSNorm,
    nn.LayerNorm: LocalTorchLayerNorm,
}
"""Classes of modules whose parameters become DTensors, and the class of each that is whole on each rank."""


class Cut(NamedTuple):
    """How a word of the plan cuts a module of a class."""

    whole: type[nn.Module]
    kind: type[nn.Module]
    placements: dict[str, Placement]
    divides: int | None = None
    """The dimension of the weight that the number of ranks has to divide."""


BIAS_OF_HEADS = "bias of heads"
"""The table of a relative bias, which has no word in a plan: a column for each head."""
NORM_OF_HEADS = "norm of heads"
"""A norm over all heads together, which has no word either: ranks have the weights of their heads."""

CUTS = {
    COLWISE: Cut(nn.Linear, ColumnParallelLinear, {"weight": ROWS, "bias": ROWS}, 0),
    ROWWISE: Cut(nn.Linear, RowParallelLinear, {"weight": COLUMNS, "bias": WHOLE}, 1),
    COLWISE_GATHER_OUTPUT: Cut(nn.Linear, VocabParallelLinear, {"weight": ROWS, "bias": ROWS}),
    EMBEDDING_ROWWISE: Cut(nn.Embedding, VocabParallelEmbedding, {"weight": ROWS}),
    NORM_OF_HEADS: Cut(RMSNorm, HeadsRMSNorm, {"weight": ROWS}, 0),
    BIAS_OF_HEADS: Cut(nn.Embedding, LocalEmbedding, {"weight": COLUMNS}, 1),
}


class Change(NamedTuple):
    """One module as it will be."""

    path: str
    module: nn.Module
    kind: type[nn.Module]
    placements: dict[str, Placement]
    """By the name of a parameter in the module."""
    attributes: dict[str, Any]


def changes_of(model: nn.Module, ranks: Ranks, gather_logits: bool) -> list[Change]:
    """The change of each module of a known class, once. Raises ArgumentError for what cannot be cut, naming it."""
    modules = dict(model.named_modules(remove_duplicate=False))
    words = adapted_words(modules, words_of(model))
    for path, module in modules.items():
        if isinstance(module, RelativePositionBias):
            words[f"{path}.embedding".lstrip(".")] = BIAS_OF_HEADS
        elif isinstance(module, Attention) and not module.qk_norm_per_head:
            words |= {f"{path}.{name}".lstrip("."): NORM_OF_HEADS for name in ("q_norm", "k_norm")}
    # These read the weights of their layers themselves.
    readers = (
        each for each in modules.values() if isinstance(each, nn.MultiheadAttention | nn.TransformerEncoderLayer)
    )
    left = {id(module) for reader in readers for module in reader.modules()}
    biases = {id(each): _of_own_heads(path, each, ranks) for path, each in modules.items() if isinstance(each, ALiBi)}
    changes: dict[int, Change] = {}
    for path, module in modules.items():
        if isinstance(module, MixtureOfExperts):
            raise ArgumentError(
                f"{path}: expected FeedForward or GatedFeedForward, which are cut by hidden units, got "
                "MixtureOfExperts, which no ranks share yet; use pipeline_stages or fully_shard (FSDP2)"
            )
        if isinstance(module, Attention | FeedForward | GatedFeedForward):
            change = _owner(path, module, ranks, biases)
        elif isinstance(module, RelativePositionBias):
            check_divides(f"{path}: num_heads", module.num_heads, ranks)
            change = Change(path, module, type(module), {}, {"num_heads": module.num_heads // ranks.number})
        else:
            found = _layer(path, module, words.get(path), ranks, gather_logits)
            if found is None or id(module) in left:
                continue
            change = found
        before = changes.setdefault(id(module), change)
        if (before.kind, before.placements) != (change.kind, change.placements):
            raise ArgumentError(
                f"model: expected a module to be cut in one way, got {before.path} and {change.path}, which are one "
                f"module, as {before.kind.__name__} and as {change.kind.__name__}; give each place its own module"
            )
    placements = {
        (id(change.module), name): placement
        for change in changes.values()
        for name, placement in change.placements.items()
    }
    check_placements(model, placements)
    return list(changes.values())


def _owner(path: str, module: nn.Module, ranks: Ranks, biases: Mapping[int, ALiBi]) -> Change:
    """The change of an attention module or a feed-forward network, beside those of its layers."""
    attributes: dict[str, Any] = {"ranks": ranks}
    if isinstance(module, Attention):
        check_heads(path, module, ranks)
        check_position(path, module.position)
        check_no_rules(path, module)
        check_no_sink_logits(path, module)
        attributes["num_heads"] = module.num_heads // ranks.number
        attributes["num_groups"] = module.num_groups // ranks.number
        if id(module.position) in biases:
            attributes["position"] = biases[id(module.position)]
    elif isinstance(module.activation, nn.Module) and next(module.activation.parameters(), None) is not None:
        raise ArgumentError(
            f"{path}: expected an activation without parameters, whose gradients are of the rank's hidden units alone, "
            f"got {type(module.activation).__name__}"
        )
    return Change(path, module, shared_class(type(module)), {}, attributes)


def _of_own_heads(path: str, alibi: ALiBi, ranks: Ranks) -> ALiBi:
    check_divides(f"{path}: num_heads", alibi.num_heads, ranks)
    return alibi.of_heads(ranks.share(alibi.num_heads))


def _layer(path: str, module: nn.Module, word: str | None, ranks: Ranks, gather_logits: bool) -> Change | None:
    """The change of a layer with parameters of its own; None where it stays as it is."""
    attributes: dict[str, Any] = {"ranks": ranks, "read": local}
    if word in CUTS:
        cut = CUTS[word]
        check_plain(path, module, cut.whole)
        if cut.divides is not None:
            size = cast("Tensor", module.weight).shape[cut.divides]
            check_divides(f"{path}: dimension {cut.divides} of its weight", size, ranks)
        shared = VocabCutLinear if word == COLWISE_GATHER_OUTPUT and not gather_logits else cut.kind
        return Change(path, module, shared, cut.placements, attributes)
    if word == GRAD_ALLREDUCE:
        check_norm(path, module, REPLICATED)
    if word in (GRAD_ALLREDUCE, WHOLE_BEFORE_SHARE):
        attributes["read"] = SumsGradients(ranks)
    elif word == WHOLE_AFTER_SUM:
        check_plain(path, module, nn.Linear)
    kind = REPLICATED.get(type(module))
    if kind is None or not is_plain(module):
        return None
    return Change(path, module, kind, dict.fromkeys(module._parameters, WHOLE), attributes)
