"""Models without a composition: each module that no options describe is refused by its path."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from tests.models.variants import SHAPE, VOCAB
from transformer import GroupQueryAttention
from transformer.blocks import BlockStack, LayerNorm, RMSNorm
from transformer.errors import ConfigurationError
from transformer.models import (
    Composition,
    DecoderOnlyConfig,
    DecoderOnlyTransformer,
    composed,
    composition_of,
)
from transformer.positions import RelativePositionBias, RotaryEmbedding, SinusoidalPositions

WIDTH = SHAPE["d_model"]
OPTIONS = {"qk_norm": True, "tied_embeddings": False}
Change = Callable[[DecoderOnlyTransformer], object]


def model_with(change: Change, **options: object) -> DecoderOnlyTransformer:
    model = DecoderOnlyTransformer(VOCAB, **{**SHAPE, "num_layers": 3, **OPTIONS, **options})
    change(model)
    return model


def put(path: str, make: Callable[[nn.Module], object]) -> Change:
    """A change of one attribute into what `make` makes of it."""
    parent, _, name = path.rpartition(".")

    def change(model: DecoderOnlyTransformer) -> None:
        module = model.get_submodule(parent)
        setattr(module, name, make(getattr(module, name)))

    return change


class OwnAttention(GroupQueryAttention):
    """A subclass may do anything."""


class OwnNorm(nn.LayerNorm):
    """A subclass may do anything."""


class OwnRotation(RotaryEmbedding):
    """A subclass may do anything."""


class OwnStack(BlockStack):
    """A subclass may do anything."""


class OwnModel(DecoderOnlyTransformer):
    """A subclass may do anything."""


BLOCK = "decoder.blocks.1"
REFUSED: list[tuple[str, str, Callable[[nn.Module], object]]] = [
    ("a plain DecoderBlock or EncoderBlock, got .*Sequential; .*wrapper", BLOCK, nn.Sequential),
    (
        "a plain RMSNorm or LayerNorm, got .*OwnNorm",
        f"{BLOCK}.attention_residual.norm_before",
        lambda _: OwnNorm(WIDTH),
    ),
    ("plain .*OwnAttention", f"{BLOCK}.attention", lambda _: OwnAttention(WIDTH, 4, 2, True)),
    ("plain Linear.*Sequential", f"{BLOCK}.attention.k_proj", nn.Sequential),
    ("plain Linear.*Parametrized", f"{BLOCK}.attention.q_proj", parametrizations.weight_norm),
    ("plain .*OwnRotation", f"{BLOCK}.attention.position", lambda _: OwnRotation(4)),
    ("plain .*Linear", f"{BLOCK}.feed_forward", lambda _: nn.Linear(WIDTH, WIDTH)),
    ("by name", f"{BLOCK}.feed_forward.activation", lambda _: torch.tanh),
    ("plain .*Sequential", f"{BLOCK}.attention_residual.norm_before", nn.Sequential),
    ("weights", f"{BLOCK}.attention_residual.norm_before", lambda _: nn.LayerNorm(WIDTH, elementwise_affine=False)),
    ("plain BlockStack, got .*OwnStack", "decoder", lambda stack: OwnStack(stack.blocks)),
    ("plain .*Identity", "decoder.norm", lambda _: nn.Identity()),
    ("plain TokenEmbedding or Embedding, got .*Sequential", "embedding", nn.Sequential),
    ("plain InputPositions, got .*Sequential", "positions", nn.Sequential),
    ("a norm as the first block has, got .*RMSNorm", "positions.norm", lambda _: RMSNorm(WIDTH, 0.5)),
    ("base", "positions.positions", lambda _: SinusoidalPositions(WIDTH, 500.0)),
    ("plain LanguageHead or Linear, got .*Sequential", "head", nn.Sequential),
    ("plain Linear.*Sequential", "head.proj", nn.Sequential),
]


@pytest.mark.parametrize(("message", "path", "make"), REFUSED)
def test_a_module_of_another_kind(message: str, path: str, make: Callable[[nn.Module], object]) -> None:
    with pytest.raises(ConfigurationError, match=rf"^model\.{path}: expected .*{message}"):
        composition_of(model_with(put(path, make)))
    assert composition_of(model_with(lambda _: None)).layers == ()


VALUES: list[tuple[str, str, str, Callable[[nn.Module], object]]] = [
    ("causal order", f"{BLOCK}.attention", "apply_causal_mask", lambda _: False),
    ("no mask_rule and no score_rule", f"{BLOCK}.attention", "mask_rule", lambda _: torch.ge),
    ("no mask_rule and no score_rule", f"{BLOCK}.attention", "score_rule", lambda _: nn.Identity()),
    ("biases", f"{BLOCK}.attention", "v_proj", lambda _: nn.Linear(WIDTH, WIDTH)),
    ("q_norm and k_norm", f"{BLOCK}.attention", "q_norm", lambda _: None),
    ("q_norm and k_norm", f"{BLOCK}.attention", "k_norm", lambda _: LayerNorm(4)),
    ("equal norms", BLOCK, "attention_residual.dropout", lambda _: 0.5),
    ("equal norms", BLOCK, "attention_residual.norm_before", lambda _: RMSNorm(WIDTH, 0.5)),
    ("norms", f"{BLOCK}.attention_residual", "norm_before", lambda _: None),
    ("max_norm", "embedding.tokens", "max_norm", lambda _: 1.0),
]


@pytest.mark.parametrize(("message", "path", "name", "make"), VALUES)
def test_values_that_no_option_describes(message: str, path: str, name: str, make: Callable) -> None:
    with pytest.raises(ConfigurationError, match=rf"^model\.{path}: expected .*{message}"):
        composition_of(model_with(put(f"{path}.{name}", make)))


def test_tensors_in_several_places() -> None:
    def share(model: DecoderOnlyTransformer) -> None:
        first, second, _ = model.decoder.blocks
        second.feed_forward.down_proj.weight = first.feed_forward.down_proj.weight

    with pytest.raises(
        ConfigurationError, match=rf"^model.{BLOCK}.feed_forward.down_proj: expected tensors of its own"
    ):
        composition_of(model_with(share))
    with pytest.raises(ConfigurationError, match=r"^model.decoder.blocks.2.*: expected tensors of its own.*deepcopy"):
        composition_of(model_with(lambda model: setattr(model.decoder.blocks, "2", model.decoder.blocks[1])))


def test_relative_biases() -> None:
    position = f"{BLOCK}.attention.position"
    with pytest.raises(ConfigurationError, match=r"^model.decoder.blocks.\d.attention.position: .*one relative bias"):
        composition_of(model_with(put(position, copy.deepcopy), position="relative"))
    with pytest.raises(ConfigurationError, match=rf"^model.{position}: .*bidirectional"):
        composition_of(model_with(put(position, lambda _: RelativePositionBias(4, bidirectional=True))))


def test_a_model_of_another_kind() -> None:
    with pytest.raises(ConfigurationError, match=r"^model: expected a plain DecoderOnlyTransformer, got .*OwnModel"):
        composition_of(OwnModel(VOCAB, **SHAPE))
    with pytest.raises(ConfigurationError, match=r"^model: expected a plain DecoderOnlyTransformer, got .*Sequential"):
        composition_of(nn.Sequential(DecoderOnlyTransformer(VOCAB, **SHAPE)))


def test_a_parameter_that_was_added() -> None:
    model = model_with(lambda model: setattr(model.decoder.blocks[0], "gate", nn.Parameter(torch.ones(1))))
    with pytest.raises(ConfigurationError, match=r"^model: .*decoder.blocks.0.gate not at all, got \[1\]"):
        composition_of(model)


@pytest.mark.parametrize("other", [None, 3, nn.Linear(2, 2)])
def test_other_objects_are_refused_by_the_name_of_the_argument(other: object) -> None:
    config = DecoderOnlyConfig(VOCAB, **SHAPE)
    with pytest.raises(ConfigurationError, match=r"^composition: expected a Composition, got "):
        composed(other)
    with pytest.raises(ConfigurationError, match=r"^config: expected a DecoderOnlyConfig, got "):
        Composition(other)
    with pytest.raises(ConfigurationError, match=r"^layers: expected LayerParts, got "):
        Composition(config, (other,))
    with pytest.raises(ConfigurationError, match=r"^model\.config: expected a DecoderOnlyConfig or a ComposedConfig"):
        composition_of(model_with(lambda model: setattr(model, "config", other)))
