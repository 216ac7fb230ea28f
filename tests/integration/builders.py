"""Modules, models and masks that these tests share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.testing import assert_close

from transformer import (
    DecoderOnlyTransformer,
    EncoderDecoderTransformer,
    GroupQueryAttention,
    MultiHeadAttention,
    MultiQueryAttention,
)
from transformer.models import EncoderTransformer
from transformer.positions import (
    ALiBi,
    DynamicNTKScaling,
    LinearScaling,
    Llama3Scaling,
    LongRoPEScaling,
    RelativePositionBias,
    RotaryEmbedding,
    YaRNScaling,
)

VOCAB = 61

SCALINGS = {
    "linear": LinearScaling(2.0),
    "dynamic": DynamicNTKScaling(2.0, 16, 64),
    "llama3": Llama3Scaling(8.0, 1.0, 4.0, 64),
    "yarn": YaRNScaling(4.0, 32),
    "longrope": LongRoPEScaling([1.0] * 4, [1.5, 2.0, 3.0, 4.0], 16, 64),
}

# Of modules [B, L, 32] with four heads of eight.
ATTENTIONS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: MultiHeadAttention(32, 4),
    "causal mqa": lambda: MultiQueryAttention(32, 4, True, bias=False),
    "rotary gqa": lambda: GroupQueryAttention(32, 4, 2, True, position=RotaryEmbedding(8)),
    "rotary partial": lambda: MultiHeadAttention(32, 4, position=RotaryEmbedding(8, rotary_dim=4, interleaved=True)),
    **{
        f"rotary {name}": functools.partial(
            lambda scaling: GroupQueryAttention(32, 4, 2, True, position=RotaryEmbedding(8, scaling=scaling)), scaling
        )
        for name, scaling in SCALINGS.items()
    },
    "alibi": lambda: MultiHeadAttention(32, 4, True, position=ALiBi(4)),
    "relative": lambda: MultiHeadAttention(32, 4, True, position=RelativePositionBias(4, 8, 16)),
    "relative both ways": lambda: MultiHeadAttention(32, 4, position=RelativePositionBias(4, 8, 16, True)),
    "window": lambda: GroupQueryAttention(32, 4, 2, True, window_size=3),
    "window both ways": lambda: MultiHeadAttention(32, 4, window_size=3),
    "window sinks rotary": lambda: MultiQueryAttention(
        32, 4, True, window_size=3, num_sinks=2, position=RotaryEmbedding(8)
    ),
    "window sinks alibi": lambda: MultiHeadAttention(32, 4, True, window_size=3, num_sinks=1, position=ALiBi(4)),
    "softcap": lambda: MultiHeadAttention(32, 4, True, softcap=2.0, scale=0.5),
    "qk norm": lambda: GroupQueryAttention(32, 4, 2, True, qk_norm=nn.RMSNorm, position=RotaryEmbedding(8)),
}

# Options of two-layer models; "encoder" ones fit a model without windows too.
ANYWHERE: dict[str, dict[str, Any]] = {
    "rotary": {},
    "gqa qk norm": {"attention": "gqa", "num_groups": 2, "qk_norm": True},
    "rotary yarn": {"rotary_scaling": SCALINGS["yarn"]},
    "alibi": {"position": "alibi"},
    "relative": {"position": "relative"},
    "learned": {"position": "learned", "max_length": 64},
    "sinusoidal": {"position": "sinusoidal", "norm": "layer", "norm_placement": "after"},
    "none softcap": {"position": "none", "softcap": 5.0},
}
DECODERS = {
    **ANYWHERE,
    "window sinks": {"window_size": 4, "num_sinks": 1, "attention": "mqa"},
    "mixed pattern": {"window_size": 4, "layer_pattern": "sliding full", "logit_softcap": 8.0},
}

# Of models whose weights are elsewhere, or of another kind.
ELSEWHERE: dict[str, dict[str, Any]] = {
    "small": {"attention": "gqa", "num_groups": 2, "qk_norm": True},
    "of 512": {"d_model": 512, "attention": "gqa", "num_groups": 2},
    "untied": {"tied_embeddings": False, "attention_bias": True, "window_size": 4, "num_sinks": 1},
    "relative": {"position": "relative"},
    "learned": {"position": "learned", "max_length": 40},
}


def decoder(**options: Any) -> DecoderOnlyTransformer:
    """In eval(); equal options give equal weights."""
    return _built(DecoderOnlyTransformer, (VOCAB,), options)


def encoder(**options: Any) -> EncoderTransformer:
    return _built(EncoderTransformer, (VOCAB,), options)


def encoder_decoder(**options: Any) -> EncoderDecoderTransformer:
    return _built(EncoderDecoderTransformer, (VOCAB, VOCAB), options)


def _built(kind: type, vocabularies: tuple[int, ...], options: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    # Weights of more than a few rows and columns are read in other ways than small ones.
    d_model = options.pop("d_model", 32)
    shape = {"d_model": d_model, "num_heads": d_model // 8 if d_model < 256 else 8, "d_ff": 2 * d_model}
    return kind(*vocabularies, **shape, num_layers=2, **options).eval()


def token_ids(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(1, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def vectors(batch: int, length: int, width: int = 32, seed: int = 0) -> Tensor:
    return torch.randn(batch, length, width, generator=torch.Generator().manual_seed(seed))


PADDINGS = ("left", "right", "both", "holes")


def padding(where: str, batch: int, length: int) -> Tensor:
    """A mask [B, L]; row 0 is all real, the others lose one token more each. `length` is at least 5."""
    real = torch.ones(batch, length, dtype=torch.bool)
    for row in range(1, batch):
        lost = min(row + 1, length - 2)
        if where in ("left", "both"):
            real[row, : lost // (2 if where == "both" else 1)] = False
        if where in ("right", "both"):
            real[row, length - lost // (2 if where == "both" else 1) :] = False
        if where == "holes":
            real[row, row :: row + 2] = False
    return real


def reachable_tensors(root: object) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that an object holds, through attributes, containers, closures and partials, with its path."""
    seen, pending = set(), [("", root)]
    while pending:
        path, value = pending.pop()
        if id(value) in seen or isinstance(value, type | ModuleType | torch.dtype | torch.device | str | int | float):
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            yield path, value
        if isinstance(value, dict):
            pending += [(f"{path}[{key!r}]", each) for key, each in value.items()]
        elif isinstance(value, list | tuple | set | frozenset):
            pending += [(f"{path}[{index}]", each) for index, each in enumerate(value)]
        elif isinstance(value, functools.partial):
            pending += [(f"{path}.func", value.func), (f"{path}.args", (value.args, value.keywords))]
        elif isinstance(value, MethodType):
            pending.append((f"{path}.__self__", value.__self__))
        elif isinstance(value, FunctionType):
            pending += [(f"{path}.closure", cell.cell_contents) for cell in value.__closure__ or ()]
        else:
            slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
            held = {name: getattr(value, name, None) for name in slots if name not in ("__weakref__", "__dict__")}
            held.update(getattr(value, "__dict__", {}))
            pending += [(f"{path}.{name}", each) for name, each in held.items()]


def holds_one_conversation(model: nn.Module, plain: nn.Module) -> None:
    """Two turns by forward and generate, as the plain model has them."""
    ids = token_ids(2, 9)
    said = []
    for each in (model, plain):
        each.enable_cache()
        with torch.no_grad():
            logits = [each(ids[:, :4]), each(ids[:, 4:5])]
        said.append(
            (*logits, each.generate(ids[:, 5:7], max_new_tokens=3), each.generate(ids[:, 7:], max_new_tokens=3))
        )
        assert each.kv_cache.length == 15
        each.disable_cache()
    assert_close(said[0][:2], said[1][:2], atol=1e-5, rtol=0)
    assert torch.equal(said[0][2], said[1][2])
    assert torch.equal(said[0][3], said[1][3])
