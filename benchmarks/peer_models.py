"""Models of transformers, with the shapes of the models that are measured here."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    StaticCache,
    UMT5Config,
    UMT5ForConditionalGeneration,
)

from .case import Candidate
from .grid import Place
from .peers import CACHE
from .shapes import EncoderModel, Model, SourceModel


def llama(model: Model, place: Place) -> Any:
    """A decoder-only model on SDPA, without a stop token: a Llama, or a Qwen3 where queries and keys are normalised."""
    new_config, new_model = (Qwen3Config, Qwen3ForCausalLM) if model.qk_norm else (LlamaConfig, LlamaForCausalLM)
    config = new_config(
        vocab_size=model.vocab_size,
        hidden_size=model.d_model,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.num_groups,
        head_dim=model.head_dim or model.d_model // model.num_heads,
        intermediate_size=model.d_ff,
        num_hidden_layers=model.num_layers,
        max_position_embeddings=1 << 14,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    return place.module(new_model(config))


def umt5(model: SourceModel, place: Place) -> UMT5ForConditionalGeneration:
    """An encoder-decoder model, in the same way; as in those that are released, its head has weights of its own."""
    config = UMT5Config(
        vocab_size=model.vocab_size,
        d_model=model.d_model,
        d_kv=model.head_dim,
        d_ff=model.d_ff,
        num_layers=model.num_layers,
        num_decoder_layers=model.num_layers,
        num_heads=model.num_heads,
        eos_token_id=None,
        pad_token_id=0,
        decoder_start_token_id=0,
    )
    theirs = UMT5ForConditionalGeneration(config)
    # The class ties the two whatever the configuration says, until it loads a file with both.
    theirs.lm_head.weight = nn.Parameter(theirs.lm_head.weight.detach().clone())
    config.tie_word_embeddings = False
    return place.module(theirs)


def bert(model: EncoderModel, place: Place) -> BertModel:
    """An encoder, in the same way."""
    config = BertConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.d_model,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        intermediate_size=model.d_ff,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation="sdpa",
    )
    return place.module(BertModel(config, add_pooling_layer=False))


def writing(model: Any, prompt: Tensor, tokens: int, **options: Any) -> Candidate:
    """Generation of so many tokens, greedy where the options do not say otherwise.

    With `cache_implementation="static"` transformers compiles the step on GPUs only.
    """
    options = {"min_new_tokens": tokens, "max_new_tokens": tokens, "do_sample": False} | options
    return Candidate(lambda: model.generate(prompt, **options))


def compiled(model: nn.Module, compiler: str) -> Callable[..., Any]:
    """The compiled step of a model, ours or theirs: CUDA graphs on a GPU, the compiler's default on the CPU."""
    step: Callable[..., Any] = torch.compile(model, fullgraph=True, backend=compiler, mode="reduce-overhead")
    return step


def warm(run: Callable[[], object]) -> None:
    """Runs the first calls, which compile and record."""
    for _ in range(3):
        run()


def compiled_step(model: Any, prompt: Tensor, token: Tensor, room: int, compiler: str) -> Candidate:
    """The same over a StaticCache, compiled as its documents recommend; its position only increases."""
    cache = StaticCache(config=model.config, max_cache_len=room)
    with torch.inference_mode():
        model(prompt, **{CACHE: cache}, logits_to_keep=1)
    nbytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    step = compiled(model, compiler)

    def run() -> object:
        return step(token, **{CACHE: cache})

    with torch.inference_mode():
        warm(run)
    return Candidate(run, held=nbytes)


def step(model: Any, prompt: Tensor, token: Tensor) -> Candidate:
    """One token's logits after a prompt that a DynamicCache holds."""
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(prompt, **{CACHE: cache}, logits_to_keep=1)
    nbytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    length = prompt.shape[1]
    return Candidate(
        lambda: model(token, **{CACHE: cache}), lambda: cache.crop(length - cache.get_seq_length()), nbytes
    )
