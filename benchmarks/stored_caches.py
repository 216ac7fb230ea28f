"""Steps of a whole model over caches in fewer bits: the model of `examples/language_model.py`, and a wider one."""

import importlib.util
import shutil
from collections.abc import Iterator
from functools import partial
from itertools import product

import torch
from torch import Tensor
from transformers import QuantizedCache

from transformer import DecoderOnlyTransformer
from transformer.cache import EMPTY, CachedLayer, Step
from transformer.masks import Rule

from . import peer_models
from .case import Candidate, Case, Setup
from .grid import Grid, Place
from .limits import reading
from .our_models import decoder_only, weights
from .peers import CACHE
from .shapes import Model

KIND = "One step over a cache in fewer bits"
SINGLE = "ours, float32"
QUANTIZED = "transformers, QuantizedCache of 4 bits"
CODECS = "bfloat16", "float8_e4m3fn", "int8", "int4"

HAS_QUANTO = bool(importlib.util.find_spec("optimum") and shutil.which("c++") and shutil.which("ninja"))
"""optimum-quanto, behind transformers' quantised cache, compiles C++ at its first use."""

ROOM = 4096
"""Tokens of one burst of steps beside what is cached."""

SHAPES = (
    Model("byte model, 4 heads of 32", 4, 128, 4, 4, 256, 256),
    Model("8 heads of 64, G 4", 4, 512, 8, 4, 1024, 256),
)


def cases(grid: Grid) -> Iterator[Case]:
    """One row and one new token after so many random ones."""
    if grid.on_cpu:
        for shape, cached, codec in product(SHAPES, grid.cached, CODECS):
            point = {"model": shape.name, "cached": cached, "codec": codec}
            yield Case(KIND, point, partial(setup, grid.place("float32"), shape, cached, codec), 1 + cached / (1 << 15))


def setup(place: Place, shape: Model, cached: int, codec: str) -> Setup:
    """The logits of one more token, from caches that were filled without the model: their numbers do not matter."""
    token = place.ids(shape.vocab_size, 1)
    model, theirs = decoder_only(shape, place), peer_models.llama(shape, place)
    single = decoder_only(shape, place)
    filled(model, place, cached, codec)
    filled(single, place, cached, None)
    held = [tensor for layer in model.kv_cache.layers.values() for tensor in layer.contents.state.buffers.tensors]
    peers = {}
    if HAS_QUANTO and codec in ("int8", "int4"):
        quantized = QuantizedCache(backend="quanto", config=theirs.config, nbits=4)
        peers[QUANTIZED] = step(theirs, quantized, token, place, shape, cached)
    return Setup(
        ours(model, token, cached),
        peers,
        {SINGLE: ours(single, token, cached)},
        limits=[reading([*weights(model), *held])],
    )


def ours(model: DecoderOnlyTransformer, token: Tensor, cached: int) -> Candidate:
    """A step of ours."""
    cache = model.kv_cache
    return Candidate(lambda: model(token), lambda: cache.truncate(cached), cache.nbytes_used)


def filled(model: DecoderOnlyTransformer, place: Place, cached: int, codec: str | None) -> None:
    """Turns caches on and fills them with random tokens."""
    model.enable_cache(cached + ROOM, cache_dtype=codec)
    for block in model.decoder_blocks():
        attention = block.attention
        key, value = (place.filled(1, attention.num_groups, cached, attention.head_dim) for _ in range(2))
        layer = CachedLayer.of(attention.slot, attention.new_cache())
        with torch.inference_mode():
            _, layer.contents = layer.append(key, value, Step.of(key[:, 0], None).following(EMPTY, Rule(True)))
        layer.publish()


def step(theirs, cache: QuantizedCache, token: Tensor, place: Place, shape: Model, cached: int) -> Candidate:
    """A step of transformers, whose quantised cache grows: it cannot forget tokens."""
    head_dim = shape.d_model // shape.num_heads
    for layer in range(shape.num_layers):
        pair = (place.filled(1, shape.num_groups, cached, head_dim) for _ in range(2))
        cache.update(*pair, layer)
    return Candidate(lambda: theirs(token, **{CACHE: cache}))
