"""Models of this library with the shapes of the models that are measured here."""

from typing import Any

import torch
from torch import Tensor, nn

from transformer import DecoderOnlyTransformer
from transformer.models import EncoderTransformer, UMT5Config, UMT5Model

from .grid import DTYPES, Grid, Place
from .int8_weights import quantised, stored
from .saved import seeded
from .shapes import EncoderModel, Model, SourceModel

INT8 = "int8"
"""Beside dtypes of the grid: int8 weights of torchao in a model of float32."""


def decoder_options(model: Model) -> tuple[list[Any], dict[str, Any]]:
    """Arguments and options of a decoder-only model of this shape."""
    arguments = [model.vocab_size, model.d_model, model.num_heads, model.d_ff, model.num_layers]
    options: dict[str, Any] = {"attention": "gqa", "num_groups": model.num_groups}
    if model.qk_norm:
        options |= {"qk_norm": True, "head_dim": model.head_dim}
    return arguments, options


def decoder_only(model: Model, place: Place) -> DecoderOnlyTransformer:
    """A decoder-only model of this shape."""
    arguments, options = decoder_options(model)
    return place.module(seeded(lambda: DecoderOnlyTransformer(*arguments, **options)))


def decoder_in(model: Model, grid: Grid, dtype: str) -> DecoderOnlyTransformer:
    """The same in a dtype of the grid, or with int8 weights."""
    if dtype == INT8:
        return quantised(decoder_only(model, grid.place("float32")))
    return decoder_only(model, grid.place(dtype))


def umt5(model: SourceModel, place: Place) -> UMT5Model:
    """An encoder-decoder model of UMT5's shape."""
    shape = {"d_model": model.d_model, "num_heads": model.num_heads, "head_dim": model.head_dim, "d_ff": model.d_ff}
    config = UMT5Config(vocab_size=model.vocab_size, num_layers=model.num_layers, **shape)
    return place.module(seeded(lambda: UMT5Model(config)))


def encoder(model: EncoderModel, place: Place) -> EncoderTransformer:
    """An encoder of BERT's shape."""
    options = {"position": "learned", "max_length": 512, "num_token_types": 2, "activation": "gelu", "norm": "layer"}
    options |= {"norm_eps": 1e-12, "norm_placement": "after", "embedding_norm": True, "attention_bias": True}
    options |= {"feed_forward": "plain", "feed_forward_bias": True}
    shape = model.vocab_size, model.d_model, model.num_heads, model.d_ff, model.num_layers
    return place.module(seeded(lambda: EncoderTransformer(*shape, **options)))


def weights(module: nn.Module) -> list[Tensor]:
    """All parameters as they are stored, each once."""
    return [tensor for parameter in module.parameters() for tensor in stored(parameter)]


def weights_of_step(model: DecoderOnlyTransformer) -> list[Tensor]:
    """The weights that a step of few tokens reads: all but the rows of the table that no token has."""
    untied = model.head is not None and model.embedding.tokens.weight is not model.head.proj.weight
    table = {id(model.embedding.tokens.weight)} if untied else set()
    return [tensor for each in model.parameters() if id(each) not in table for tensor in stored(each)]


def operations(model: Model, rows: int) -> float:
    """Operations of a step of so many tokens, in its products with weights."""
    head_dim = model.head_dim or model.d_model // model.num_heads
    attention = 2 * model.d_model * head_dim * (model.num_heads + model.num_groups)
    layer = attention + 3 * model.d_model * model.d_ff
    return 2 * rows * (model.num_layers * layer + model.d_model * model.vocab_size)


def is_half(dtype: str) -> bool:
    """True for dtypes of 16 bits."""
    return dtype in DTYPES and DTYPES[dtype] in (torch.bfloat16, torch.float16)
