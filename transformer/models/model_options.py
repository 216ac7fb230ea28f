"""Options of a decoder-only model as a whole, read from its modules, and what its modules share."""

from typing import Any, NamedTuple

from torch import nn

from ..blocks import BlockStack
from ..positions import LearnedPositions, RelativePositionBias, SinusoidalPositions
from .decoder_only import DecoderOnlyTransformer
from .module_options import Options, expect, read_norm, refuse
from .normal_form import NOT_ADDED
from .parts import NormConfig
from .tokens import InputPositions, LanguageHead, TokenEmbedding


class EndOptions(NamedTuple):
    """The options of what is before the blocks and after them."""

    options: Options
    embedding_norm: NormConfig | None
    last_norm: NormConfig | None


def read_ends(model: DecoderOnlyTransformer) -> EndOptions:
    """The options of embedding, input positions, last norm and head. Raises ConfigurationError as `read_block`."""
    embedding: Any = model.embedding
    head: Any = model.head
    positions, stack = model.positions, model.decoder
    options: Options = {"embedding_scale": 1.0}
    if isinstance(embedding, TokenEmbedding):
        expect("embedding", embedding, TokenEmbedding)
        options["embedding_scale"] = embedding.scale
        path, table = "embedding.tokens", embedding.tokens
        expect(path, table, nn.Embedding)
    else:
        path, table = "embedding", embedding
        expect(path, table, nn.Embedding, also=(TokenEmbedding,))
    if table.max_norm is not None:
        refuse(path, table, "max_norm=None", "an embedding that changes its rows has no composition")
    options |= {"vocab_size": table.num_embeddings, "d_model": table.embedding_dim}
    expect("positions", positions, InputPositions)
    expect("positions.dropout", positions.dropout, nn.Dropout)
    options |= {"dropout": positions.dropout.p, **NOT_ADDED, **_read_added(positions.positions)}
    expect("decoder", stack, BlockStack)
    embedding_norm = None if positions.norm is None else read_norm("positions.norm", positions.norm)
    options["embedding_norm"] = embedding_norm is not None
    last_norm = None if stack.norm is None else read_norm("decoder.norm", stack.norm)
    if head is None:
        return EndOptions(options | {"has_head": False}, embedding_norm, last_norm)
    if isinstance(head, LanguageHead):
        expect("head", head, LanguageHead)
        options |= {"logit_scale": head.scale, "logit_softcap": head.softcap}
        head = head.proj
        expect("head.proj", head, nn.Linear)
    else:
        expect("head", head, nn.Linear, also=(LanguageHead,))
    options |= {"tied_embeddings": head.weight is table.weight, "head_bias": head.bias is not None}
    return EndOptions(options, embedding_norm, last_norm)


def _read_added(positions: Any) -> Options:
    if positions is None:
        return {"position": "none"}
    path = "positions.positions"
    expect(path, positions, LearnedPositions, SinusoidalPositions)
    if isinstance(positions, LearnedPositions):
        expect(f"{path}.embedding", positions.embedding, nn.Embedding)
        return {"position": "learned", "max_length": positions.max_length, "position_offset": positions.offset}
    if positions.base != 10000.0:
        refuse(path, positions, "base=10000.0", f"with base={positions.base}; no option describes another base")
    return {"position": "sinusoidal", "sinusoidal_interleaved": positions.interleaved}


def has_own_biases(stack: BlockStack) -> bool:
    """True if each layer with a relative bias has its own, False if all share one.

    Raises ConfigurationError if some layers share one.
    """
    biases = {
        f"decoder.blocks.{index}.attention.position": block.attention.position
        for index, block in enumerate(stack.blocks)
        if isinstance(block.attention.position, RelativePositionBias)
    }
    distinct = len({id(bias) for bias in biases.values()})
    if 1 < distinct < len(biases):
        path, bias = biases.popitem()
        refuse(
            path,
            bias,
            "one relative bias that all layers share, or one for each layer",
            f"one of {distinct} in {len(biases) + 1} layers; give all layers one object, or each its own",
        )
    return distinct > 1


def check_sharing(model: DecoderOnlyTransformer) -> None:
    """Raises ConfigurationError for a parameter in several places, except for a tied head and a shared bias."""
    places: dict[int, list[str]] = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        places.setdefault(id(parameter), []).append(path)
    for paths in places.values():
        tied = all(path.startswith(("embedding.", "head.")) for path in paths)
        shared = all(path.endswith(".attention.position.embedding.weight") for path in paths)
        if len(paths) > 1 and not tied and not shared:
            path = paths[-1].rpartition(".")[0]
            refuse(
                path,
                model.get_submodule(path),
                "tensors of its own",
                f"with a tensor of {paths[0]}; give each module a copy (copy.deepcopy)",
            )


def parameters_by_name(model: DecoderOnlyTransformer) -> dict[str, nn.Parameter]:
    """The parameters of a model by the names that they have in `composed(composition_of(model))`, each once.

    They are the model's own names, except for an `nn.Embedding` as embedding and an `nn.Linear` as head.
    """
    # As what they may be in a model by parts.
    embedding: nn.Module = model.embedding
    head: nn.Module | None = model.head
    inserted = {}
    if type(embedding) is nn.Embedding:
        inserted["embedding."] = "embedding.tokens."
    if type(head) is nn.Linear:
        inserted["head."] = "head.proj."
    named = {}
    for name, parameter in model.named_parameters():
        part = name[: name.index(".") + 1]
        named[inserted.get(part, part) + name.removeprefix(part)] = parameter
    return named
