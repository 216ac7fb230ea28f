"""Checks of the parts that a user composes into a decoder-only model, and the configuration that they make."""

from torch import nn

from ..blocks import BlockStack
from ..blocks.layers import layers_of
from ..errors import ConfigurationError
from ..positions import AbsolutePositions
from .config import ComposedConfig
from .tokens import InputPositions, LanguageHead


def composed_config(
    embedding: nn.Module, stack: BlockStack, head: nn.Module | None, positions: nn.Module | None
) -> ComposedConfig:
    """The configuration of these parts. Raises ConfigurationError, naming the argument, if they do not fit."""
    table = token_table(embedding)
    width = _stack_width(stack)
    if embedding is table or getattr(embedding, "tokens", None) is table:
        _check_width("embedding", "embedding_dim", table.embedding_dim, width)
    if isinstance(positions, InputPositions):
        positions = positions.positions
    elif not isinstance(positions, AbsolutePositions | None):
        raise ConfigurationError(
            "positions: expected None, LearnedPositions, SinusoidalPositions or InputPositions, got "
            f"{type(positions).__name__}; rotary, ALiBi and relative positions belong to the attention modules"
        )
    if isinstance(positions, AbsolutePositions):
        _check_width("positions", "embed_dim", positions.embed_dim, width)
    if head is not None:
        _check_head(head, table, width)
    return ComposedConfig(
        table.num_embeddings,
        width,
        len(stack.blocks),
        tied_embeddings=head is not None and tied_path(head, table) is not None,
        has_head=head is not None,
    )


def token_table(embedding: object) -> nn.Embedding:
    """The one `nn.Embedding` in a module. Raises ConfigurationError if there is none or more than one."""
    found = (
        {path: each for path, each in embedding.named_modules() if isinstance(each, nn.Embedding)}
        if isinstance(embedding, nn.Module)
        else {}
    )
    if len(found) == 1:
        return found.popitem()[1]
    got = type(embedding).__name__
    if found:
        got += f" with {', '.join(found)}"
    raise ConfigurationError(
        "embedding: expected TokenEmbedding, nn.Embedding, or a module with exactly one nn.Embedding, that of the "
        f"tokens, got {got}; position embeddings are the argument positions"
    )


def tied_path(head: nn.Module, table: nn.Embedding) -> str | None:
    """Path in `head` of the module whose weight is the embedding's table; None if there is none."""
    weight = table._parameters.get("weight")
    paths = [path for path, each in head.named_modules() if each._parameters.get("weight") is weight is not None]
    return paths[0] if paths else None


def _stack_width(stack: object) -> int:
    if not isinstance(stack, BlockStack):
        raise ConfigurationError(
            f"stack: expected a BlockStack, got {type(stack).__name__}; give BlockStack(blocks, norm), and wrap its "
            "blocks or the whole model instead of the stack"
        )
    widths = []
    for index, layer in enumerate(layers_of(stack.blocks)):
        if layer.reads_source:
            raise ConfigurationError(
                f"stack: expected blocks without cross-attention, got it in block {index}; a model that reads a source "
                "is an EncoderDecoderTransformer"
            )
        if layer.attention is not None:
            widths.append(layer.attention.embed_dim)
            if not layer.attention.apply_causal_mask:
                raise ConfigurationError(
                    f"stack: expected attention in causal order, got apply_causal_mask=False in block {index}; build "
                    "it with apply_causal_mask=True"
                )
    return widths[0]


def _check_head(head: object, table: nn.Embedding, width: int) -> None:
    if not isinstance(head, nn.Module):
        raise ConfigurationError(
            f"head: expected LanguageHead, a module from [.., E] to [.., V], or None, got {type(head).__name__}"
        )
    projection = head.proj if isinstance(head, LanguageHead) else head
    if isinstance(projection, nn.Linear):
        _check_width("head", "in_features", projection.in_features, width)
        if projection.out_features != table.num_embeddings:
            raise ConfigurationError(
                f"head: expected out_features={table.num_embeddings}, as the embedding has tokens, got "
                f"{projection.out_features}"
            )


def _check_width(argument: str, name: str, got: int, width: int) -> None:
    if got != width:
        raise ConfigurationError(f"{argument}: expected {name}={width}, as embed_dim of the stack, got {got}")
