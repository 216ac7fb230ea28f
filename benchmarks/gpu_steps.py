"""Part of the GPU grid over a model of 1B parameters: compiled steps with CUDA graphs, eager steps, generation."""

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from transformer import DecoderOnlyTransformer

from .gpu_parts import OURS, Call, Make, Place, Row

STATIC, DYNAMIC = "transformers, StaticCache, compiled", "transformers, DynamicCache"
COMPILED = "compiled"


def steps(place: Place) -> Iterator[Row]:
    """Steps of a whole model after 1,024 tokens, with room for 2,048: compiled (CUDA graphs), eager, and generate."""
    shape = (
        {"vocab_size": 512, "d_model": 64, "num_heads": 4, "d_ff": 128, "num_layers": 2}
        if place.quick
        else {"vocab_size": 32000, "d_model": 2048, "num_heads": 32, "d_ff": 8192, "num_layers": 16}
    )
    room, held = (64, 16) if place.quick else (2048, 1024)
    groups = shape["num_heads"] // 4
    with torch.device(place.device):
        model = DecoderOnlyTransformer(**shape, attention="gqa", num_groups=groups).eval().to(torch.bfloat16)
    ids = torch.randint(2, shape["vocab_size"], (1, held), device=place.device)
    token, nbytes = ids[:, :1].clone(), 2 * sum(each.numel() for each in model.parameters())
    how = {"mode": "reduce-overhead"} if place.cuda else {"backend": "aot_eager"}

    def compiled() -> Call:
        model.clear_cache()
        model(ids)
        model.kv_cache.freeze_layout()
        step = torch.compile(model, fullgraph=True, **how)
        return lambda: step(token)

    def eager() -> Call:
        model.clear_cache()
        model(ids)
        return lambda: model(token, logits_to_keep=1)

    model.enable_cache(max_length=room)
    point: Row = {"parameters": nbytes // 2, "bytes": nbytes}
    theirs = _static(place, shape, room, ids, how)
    yield {**point, "step": COMPILED, **place.measured({OURS: compiled, STATIC: theirs})}
    yield {**point, "step": "eager", **place.measured({OURS: eager, DYNAMIC: _dynamic(place, shape, ids)})}
    model.disable_cache()
    new = 4 if place.quick else 32
    written = place.measured({OURS: lambda: lambda: model.generate(ids, max_new_tokens=new)})
    yield {**point, "bytes": new * nbytes, "step": f"generate, {new} tokens", **written}


def _llama(place: Place, shape: Mapping[str, int]) -> Any:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=shape["vocab_size"],
        hidden_size=shape["d_model"],
        intermediate_size=shape["d_ff"],
        num_hidden_layers=shape["num_layers"],
        num_attention_heads=shape["num_heads"],
        num_key_value_heads=shape["num_heads"] // 4,
        max_position_embeddings=4096,
        attn_implementation="sdpa",
    )
    with torch.device(place.device):
        return transformers.LlamaForCausalLM(config).eval().to(torch.bfloat16)


def _static(place: Place, shape: Mapping[str, int], room: int, ids: Tensor, how: Mapping[str, Any]) -> Make:
    def make() -> Call:
        import transformers

        model = _llama(place, shape)
        cache = transformers.StaticCache(config=model.config, max_cache_len=room)
        given = {_cache_name(model): cache}
        held, at = ids.shape[1], {}
        if "cache_position" in inspect.signature(model.forward).parameters:
            given["cache_position"] = torch.arange(held, device=place.device)
            at["cache_position"] = torch.tensor([held], device=place.device)
        model(ids, **given)
        step, token = torch.compile(model.forward, **how), ids[:, :1].clone()
        return lambda: step(token, **{**given, **at}, logits_to_keep=1)

    return make


def _dynamic(place: Place, shape: Mapping[str, int], ids: Tensor) -> Make:
    def make() -> Call:
        import transformers

        model = _llama(place, shape)
        given, token = {_cache_name(model): transformers.DynamicCache(config=model.config)}, ids[:, :1].clone()
        model(ids, **given)
        return lambda: model(token, **given, logits_to_keep=1)

    return make


def _cache_name(model: Any) -> str:
    """Name of the argument that takes a cache, which changed within version 5 of transformers."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
