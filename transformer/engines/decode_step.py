"""Decode step without state, for exported programs: keys and values come as arguments and go back as new tensors.

`decode_step` gives it for every model of this library that generates, and `encode_step` the module that reads the
source of an encoder-decoder once. `torch.export` and ONNX take both as they are.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.export import Dim

from ..attention import Attention, real_tokens
from ..attention.cross_attention import project_source
from ..attention.stateless_step import Slots
from ..blocks import DecoderBlock
from ..cache import EMPTY, Step
from ..errors import ArgumentError, ConfigurationError, DtypeError, ShapeError, require_count
from ..models import DecoderOnlyTransformer, EncoderDecoderTransformer, UMT5Model
from ..models.tokens import check_vectors, checked_ids
from ..tracing import is_traced
from .stateless_blocks import check_blocks, check_unhooked, readers_of, run_block

Tensors = tuple[Tensor, ...]


def decode_step(model: nn.Module, max_length: int) -> "DecodeStep":
    """A module that reads one token of each row, after the tokens whose keys and values it is given.

    Args:
        model: a `DecoderOnlyTransformer`, an `EncoderDecoderTransformer` or a `UMT5Model`, in `eval()`. The step has
            its parameters, the same objects.
        max_length: most tokens of a row.

    Raises ConfigurationError for a model or a length that cannot work, naming the module.
    """
    require_count("max_length", max_length)
    checked = _checked(model)
    limit = checked.max_positions
    if limit is not None and max_length > limit:
        raise ConfigurationError(
            f"max_length: expected at most {limit}, as the model has positions for so many tokens, got {max_length}"
        )
    return DecodeStep(checked, max_length)


def encode_step(model: nn.Module) -> "EncodeStep":
    """A module that reads the sources of an encoder-decoder once, for all steps of `decode_step`.

    Raises ConfigurationError for another model, or one that `decode_step` refuses.
    """
    checked = _checked(model)
    if not isinstance(checked, EncoderDecoderTransformer):
        raise ConfigurationError(f"model: expected an encoder-decoder, got {type(model).__name__}, which has no source")
    return EncodeStep(checked)


class DecodeStep(nn.Module):
    """The module that `decode_step` gives: a function of its tensors, which writes into none of them.

    The keys and the values of a layer are buffers [B, G, max_length, D]: a token at position `p` of its row lies in
    slot `p`. They may be shorter than `max_length`, all alike.
    """

    def __init__(self, model: DecoderOnlyTransformer | EncoderDecoderTransformer, max_length: int) -> None:
        super().__init__()
        self.max_length = max_length
        if isinstance(model, DecoderOnlyTransformer):
            self.embedding, self.positions, self.vocab_size = model.embedding, model.positions, model.config.vocab_size
        else:
            self.embedding, self.positions = model.target_embedding, model.target_positions
            self.vocab_size = model.config.tgt_vocab_size
        self.reads_source = isinstance(model, EncoderDecoderTransformer)
        self.decoder = model.decoder
        self.head = cast("nn.Module", model.head)
        self.eval()

    @property
    def layers(self) -> list[Attention]:
        """The self-attention module of each layer."""
        return [cast("DecoderBlock", block).attention for block in self.decoder.blocks]

    def forward(
        self,
        ids: Tensor,
        positions: Tensor,
        keys: Tensors,
        values: Tensors,
        source_keys: Tensors | None = None,
        source_values: Tensors | None = None,
        source_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensors, Tensors]:
        """Logits [B, 1, V] of the token after each of `ids`, and the keys and values after them.

        Args:
            ids: int64 [B, 1]; or [B, L], tokens that follow one another, with logits [B, L, V]. Rows of different
                lengths have their padding at the end: the next tokens of the row replace it.
            positions: int64 [B], how many tokens each row has read: the position of its first token here.
            keys, values: of each layer, [B, G, max_length, D]. Slots from the row's position on may contain anything.
            source_keys, source_values: of an encoder-decoder, for each layer [B, G, S, D], from `encode_step`.
            source_mask: bool [B, S], true for a real source token.

        Raises ShapeError or DtypeError for tensors that do not fit, ArgumentError for unknown ids, a source too many or
        missing, and in `train()`. A position outside of the buffers raises what `Tensor.scatter` raises.
        """
        if self.training:
            raise ArgumentError("step: expected eval() mode, got train(); call eval() first")
        ids = checked_ids("ids", ids, self.vocab_size, "", None)
        batch, length = self._check(ids, positions, keys, values)
        sources, real = self._sources(batch, source_keys, source_values, source_mask)
        at = positions.long().unsqueeze(-1) + torch.arange(length, device=ids.device)
        rules = [layer.traced_rule() for layer in self.layers]
        steps = {
            rule: Step(rule, batch, length, EMPTY, EMPTY, ids.device, at=at, traced=True)
            for rule in dict.fromkeys(rules)
        }
        x = self.positions(self.embedding(ids), steps[rules[0]])
        written = []
        for layer, (block, rule) in enumerate(zip(self.decoder.blocks, rules, strict=True)):
            slots = Slots(keys[layer], values[layer])
            block = cast("DecoderBlock", block)
            x, slots = run_block(block, x, steps[rule], slots, sources[layer] if sources else None, real)
            written.append(slots)
        if self.decoder.norm is not None:
            x = self.decoder.norm(x)
        return self.head(x), tuple(slots.key for slots in written), tuple(slots.value for slots in written)

    def empty_buffers(self, batch_size: int, length: int | None = None) -> tuple[Tensors, Tensors]:
        """Keys and values of rows that have read nothing, with `length` slots (None: `max_length`).

        Raises ConfigurationError for numbers out of range.
        """
        length = self.max_length if length is None else length
        require_count("batch_size", batch_size)
        require_count("length", length, most=self.max_length)
        device = next(self.decoder.parameters()).device
        shapes = [(batch_size, layer.num_groups, length, layer.head_dim) for layer in self.layers]
        dtypes = [layer.kv_dtype for layer in self.layers]
        keys, values = (
            tuple(torch.zeros(shape, dtype=dtype, device=device) for shape, dtype in zip(shapes, dtypes, strict=True))
            for _ in range(2)
        )
        return keys, values

    def dynamic_shapes(self) -> tuple[Any, ...]:
        """The argument of that name of `torch.export.export` and `torch.onnx.export`, for all inputs of the step.

        The batch, the slots of the buffers and the tokens of the source are dynamic; the example needs two of each.
        """
        batch, length, source = Dim("batch"), Dim("length", max=self.max_length), Dim("source_length")
        buffers = tuple({0: batch, 2: length} for _ in self.layers)
        shapes: tuple[Any, ...] = ({0: batch}, {0: batch}, buffers, buffers)
        if self.reads_source:
            projected = tuple({0: batch, 2: source} for _ in self.layers)
            shapes += (projected, projected, {0: batch, 1: source})
        return shapes

    def _check(self, ids: Tensor, positions: Tensor, keys: Tensors, values: Tensors) -> tuple[int, int]:
        batch, length = ids.shape
        if not is_traced(ids) and length == 0:
            raise ShapeError("ids: expected a token of each row or more, [B, 1] or [B, L], got none")
        if positions.shape != (batch,):
            raise ShapeError(f"positions: expected [{batch}], a number for each row, got {list(positions.shape)}")
        if positions.dtype not in (torch.int64, torch.int32):
            raise DtypeError(f"positions: expected int64, got {positions.dtype}")
        slots = keys[0].shape[2] if keys and keys[0].ndim == 4 else self.max_length
        _check_heads("keys", keys, self.layers, (batch, slots))
        _check_heads("values", values, self.layers, (batch, slots))
        if slots > self.max_length:
            raise ShapeError(f"keys: expected at most max_length={self.max_length} slots, got {slots}")
        return batch, length

    def _sources(
        self, batch: int, keys: Tensors | None, values: Tensors | None, mask: Tensor | None
    ) -> tuple[list[Slots], Tensor | None]:
        """The projected source of each layer, and its real tokens; empty and None for a model without sources."""
        given = [each is not None for each in (keys, values, mask)]
        if not self.reads_source and any(given):
            raise ArgumentError("source_keys, source_values, source_mask: expected None, as the model has no source")
        if keys is None or values is None or mask is None:
            if self.reads_source:
                raise ArgumentError(
                    "source_keys, source_values, source_mask: expected all three, from encode_step, got None among them"
                )
            return [], None
        length = mask.shape[-1]
        readers = readers_of(self.decoder)
        _check_heads("source_keys", keys, readers, (batch, length))
        _check_heads("source_values", values, readers, (batch, length))
        real = real_tokens("source_mask", mask, batch, length, mask.device)
        return [Slots(*pair) for pair in zip(keys, values, strict=True)], real


class EncodeStep(nn.Module):
    """The module that `encode_step` gives: a source to the keys and values of each cross-attention."""

    def __init__(self, model: EncoderDecoderTransformer) -> None:
        super().__init__()
        self.vocab_size, self.width = model.config.src_vocab_size, model.config.d_model
        self.embedding, self.positions, self.encoder = model.source_embedding, model.source_positions, model.encoder
        self.readers = nn.ModuleList(readers_of(model.decoder))
        self.eval()

    def forward(self, source_ids: Tensor, source_mask: Tensor) -> tuple[Tensors, Tensors]:
        """Keys and values of each layer, [B, G, S, D], of `source_ids` int64 [B, S] (vectors [B, S, E] where the model
        has no source vocabulary), of which `source_mask` bool [B, S] are real tokens.

        Raises as the model's `encode`.
        """
        if self.training:
            raise ArgumentError("step: expected eval() mode, got train(); call eval() first")
        if self.embedding is None:
            check_vectors("source_ids", source_ids, self.width)
            x = source_ids
        else:
            x = self.embedding(checked_ids("source_ids", source_ids, self.vocab_size or 0, "source_mask", source_mask))
        steps = self.encoder.plan(x, None, source_mask)
        states = self.encoder(self.positions(x, steps[0]), steps=steps)
        real = real_tokens("source_mask", source_mask, x.shape[0], x.shape[1], x.device)
        pairs = [project_source(cast("Attention", reader), states, real) for reader in self.readers]
        return tuple(key for key, _ in pairs), tuple(value for _, value in pairs)


def _check_heads(name: str, tensors: Tensors, layers: list[Attention], sizes: tuple[int, int]) -> None:
    """Raises ShapeError unless there is a tensor [B, G, slots, D] for each layer; `sizes` are `B` and the slots."""
    if len(tensors or ()) != len(layers):
        raise ShapeError(f"{name}: expected a tensor for each of {len(layers)} layers, got {len(tensors or ())}")
    for index, (heads, tensor) in enumerate(zip(layers, tensors, strict=True)):
        expected = sizes[0], heads.num_groups, sizes[1], heads.head_dim
        if tensor.shape != expected:
            raise ShapeError(f"{name}: expected {list(expected)} in layer {index}, got {list(tensor.shape)}")


def _checked(model: nn.Module) -> DecoderOnlyTransformer | EncoderDecoderTransformer:
    """The model to step, inside a `UMT5Model`. Raises ConfigurationError unless it can be stepped."""
    inner = model.transformer if isinstance(model, UMT5Model) else model
    kinds = DecoderOnlyTransformer, EncoderDecoderTransformer
    if not isinstance(inner, kinds) or type(inner) not in kinds:  # a subclass may have a forward of its own
        raise ConfigurationError(
            "model: expected a DecoderOnlyTransformer, an EncoderDecoderTransformer or a UMT5Model, "
            f"got {type(model).__name__}"
        )
    if inner.head is None:
        raise ConfigurationError("model: expected a model with a head, which gives logits, got one with has_head=False")
    if inner.training:
        raise ConfigurationError("model: expected eval() mode, without dropout, got train(); call model.eval() first")
    check_unhooked("model", inner)
    check_blocks(inner.decoder, reads_source=isinstance(inner, EncoderDecoderTransformer))
    return inner
