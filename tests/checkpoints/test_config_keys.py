"""Keys of config.json, compared with transformers: ignored keys, defaults, and refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from tests.checkpoints.folders import edit_config
from tests.checkpoints.test_bert import CONFIG as BERT
from tests.checkpoints.test_t5 import CASES as T5_CASES
from tests.checkpoints.theirs import CASES, YARN, ids, rope
from tests.peers.models import fill
from transformer.checkpoints import load_config, load_model
from transformer.errors import ConfigurationError

MISSING = "no such key"
MODELS: dict[str, tuple[Any, Any]] = {
    "llama": (AutoModelForCausalLM, CASES["llama, multi-head"]),
    "mistral": (AutoModelForCausalLM, CASES["mistral"]),
    "qwen2": (AutoModelForCausalLM, CASES["qwen2, windows"]),
    "mixtral": (AutoModelForCausalLM, CASES["mixtral"]),
    "qwen3_moe": (AutoModelForCausalLM, CASES["qwen3_moe"]),
    "gemma": (AutoModelForCausalLM, CASES["gemma"]),
    "gemma2": (AutoModelForCausalLM, CASES["gemma2"]),
    "gpt2": (AutoModelForCausalLM, CASES["gpt2"]),
    "phi": (AutoModelForCausalLM, CASES["phi"]),
    "stablelm": (AutoModelForCausalLM, CASES["stablelm"]),
    "starcoder2": (AutoModelForCausalLM, CASES["starcoder2"]),
    "gpt_neox": (AutoModelForCausalLM, CASES["gpt_neox"]),
    "falcon": (AutoModelForCausalLM, CASES["falcon"]),
    "opt": (AutoModelForCausalLM, CASES["opt"]),
    "bloom": (AutoModelForCausalLM, CASES["bloom"]),
    "t5": (AutoModelForSeq2SeqLM, T5_CASES["t5"][0]),
    "bert": (AutoModel, BERT),
}
TAKEN: list[tuple[str, dict[str, object]]] = [
    ("llama", {"rope_scaling": {}, "rope_parameters": rope(base=70.0)}),
    ("llama", {"rope_scaling": False, "rope_parameters": rope(base=70.0)}),
    ("llama", {"rope_scaling": None, "rope_theta": 70}),
    ("llama", {"rope_parameters": MISSING, "rope_theta": 70}),
    ("llama", {"rope_parameters": MISSING, "rope_theta": 70, "rope_scaling": {"rope_type": "default"}}),
    ("llama", {"rope_parameters": None}),
    ("llama", {"rope_parameters": rope(base=70.0), "rope_theta": "unused"}),
    ("llama", {"rope_parameters": rope(factor=-1.0, original_max_position_embeddings="unused")}),
    ("llama", {"rope_parameters": rope("linear", factor=2, beta_fast="unused")}),
    ("llama", {"rope_parameters": rope("yarn", **YARN | {"original_max_position_embeddings": 32.0})}),
    ("llama", {"rope_parameters": rope("yarn", **YARN, truncate=None)}),
    ("llama", {"rope_parameters": rope("yarn", **YARN, attention_factor=None, mscale=0)}),
    ("llama", {"rope_parameters": rope("dynamic", factor=2.0), "max_position_embeddings": MISSING}),
    ("llama", {"partial_rotary_factor": 1.0}),
    ("llama", {"partial_rotary_factor": "1.0"}),
    ("llama", {"rope_parameters": rope(partial_rotary_factor="1")}),
    ("llama", {"rope_parameters": rope("yarn", **YARN, attention_factor=1.2, mscale="0.7", mscale_all_dim="1")}),
    ("llama", {"rope_parameters": rope("linear", factor=2.0, partial_rotary_factor=1)}),
    ("llama", {"head_dim": None, "num_key_value_heads": None}),
    ("llama", {"head_dim": MISSING, "num_key_value_heads": MISSING}),
    ("llama", {"attention_bias": MISSING, "mlp_bias": MISSING, "hidden_act": MISSING, "rms_norm_eps": MISSING}),
    ("llama", {"tie_word_embeddings": MISSING, "max_position_embeddings": MISSING, "architectures": None}),
    ("llama", {"dtype": None, "torch_dtype": "bfloat16", "attention_dropout": 0.5, "pretraining_tp": 2}),
    ("llama", {"use_cache": False, "no_such_key": [{}], "transformers_version": "4.30.0", "eos_token_id": [1, 2]}),
    ("llama", {"is_causal": True, "per_layer_config": None, "quantization_config": None}),
    ("mistral", {"sliding_window": None}),
    ("mistral", {"sliding_window": MISSING, "head_dim": None}),
    ("mixtral", {"rope_parameters": MISSING, "rms_norm_eps": MISSING, "router_aux_loss_coef": 0.5}),
    ("mixtral", {"num_local_experts": MISSING, "num_experts_per_tok": MISSING, "output_router_logits": False}),
    ("qwen3_moe", {"norm_topk_prob": MISSING, "mlp_only_layers": None, "decoder_sparse_step": MISSING}),
    ("qwen3_moe", {"num_experts": MISSING, "num_local_experts": 16, "intermediate_size": 99, "sliding_window": 5}),
    ("qwen2", {"layer_types": None}),
    ("qwen2", {"layer_types": MISSING, "max_window_layers": MISSING, "use_sliding_window": MISSING}),
    ("gemma", {"hidden_act": "gelu", "use_bidirectional_attention": None}),
    ("gemma", {"hidden_act": MISSING, "hidden_activation": "relu", "tie_word_embeddings": MISSING}),
    ("gemma2", {"hidden_activation": "gelu"}),
    ("gemma2", {"hidden_activation": MISSING, "hidden_act": "relu", "layer_types": MISSING}),
    ("gemma2", {"final_logit_softcapping": None, "attn_logit_softcapping": MISSING}),
    ("gpt2", {"n_inner": None, "activation_function": MISSING, "layer_norm_epsilon": MISSING}),
    ("gpt2", {"tie_word_embeddings": MISSING, "scale_attn_weights": MISSING, "n_ctx": 7, "resid_pdrop": 0.5}),
    ("gpt2", {"hidden_size": 24, "num_attention_heads": 4, "num_hidden_layers": 3, "max_position_embeddings": 128}),
    ("phi", {"rope_parameters": MISSING, "partial_rotary_factor": 0.75, "rope_theta": 70, "qk_layernorm": MISSING}),
    ("phi", {"rope_parameters": MISSING, "hidden_act": MISSING, "layer_norm_eps": MISSING, "resid_pdrop": 0.5}),
    ("stablelm", {"rope_parameters": MISSING, "partial_rotary_factor": 0.34, "rope_theta": 70, "head_dim": 6}),
    ("starcoder2", {"sliding_window": None, "use_bias": MISSING, "norm_epsilon": MISSING}),
    ("gpt_neox", {"rope_parameters": MISSING, "rotary_pct": 0.34, "rotary_emb_base": 70, "rope_theta": 3}),
    ("gpt_neox", {"use_parallel_residual": False, "hidden_act": MISSING, "attention_bias": MISSING}),
    ("falcon", {"num_kv_heads": MISSING, "n_embed": 24, "ffn_hidden_size": None, "multi_query": MISSING}),
    ("opt", {"word_embed_proj_dim": None, "activation_function": MISSING, "enable_bias": MISSING, "head_dim": 3}),
    ("bloom", {"hidden_size": MISSING, "n_embed": 24, "n_head": MISSING, "num_attention_heads": 4, "seq_length": 9}),
    ("t5", {"hidden_size": 24, "num_attention_heads": 4, "num_hidden_layers": 2, "head_dim": 7}),
    ("t5", {"scale_decoder_outputs": None}),
    ("t5", {"tie_word_embeddings": MISSING, "scale_decoder_outputs": MISSING}),
    ("t5", {"feed_forward_proj": MISSING, "dense_act_fn": "relu", "is_gated_act": False}),
    ("t5", {"dense_act_fn": MISSING, "is_gated_act": MISSING, "layer_norm_epsilon": MISSING, "dropout_rate": 0.5}),
    ("bert", {"hidden_act": MISSING, "layer_norm_eps": MISSING, "type_vocab_size": MISSING}),
    ("bert", {"is_causal": False}),
    ("bert", {"hidden_act": "gelu", "classifier_dropout": 0.5, "position_embedding_type": "absolute"}),
]
REFUSED: list[tuple[str, str, dict[str, object]]] = [
    ("llama", "is_causal", {"is_causal": False}),
    ("mistral", "is_causal", {"is_causal": None}),
    ("t5", "is_causal", {"is_causal": False}),
    ("t5", "is_causal", {"is_causal": True}),
    ("bert", "is_causal", {"is_causal": True}),
    ("llama", "per_layer_config", {"per_layer_config": {"0": {"num_key_value_heads": 1}}}),
    ("bert", "per_layer_config", {"per_layer_config": {"0": {}}}),
    ("llama", "partial_rotary_factor", {"partial_rotary_factor": 0.5}),
    ("llama", "partial_rotary_factor", {"partial_rotary_factor": "0.5"}),
    ("llama", "partial_rotary_factor", {"partial_rotary_factor": "all"}),
    ("llama", "rope_parameters.mscale", {"rope_parameters": rope("yarn", **YARN, mscale="0.7", mscale_all_dim="1")}),
    ("llama", "rope_parameters.partial_rotary_factor", {"rope_parameters": rope(partial_rotary_factor=0.5)}),
    ("llama", "rope_parameters.attention_factor", {"rope_parameters": rope("yarn", **YARN, attention_factor=0.0)}),
    ("llama", "rope_theta", {"rope_parameters": None, "rope_theta": "70"}),
    ("llama", "architectures", {"architectures": "LlamaModel"}),
    ("qwen3_moe", "decoder_sparse_step", {"decoder_sparse_step": 2}),
    ("qwen3_moe", "mlp_only_layers", {"mlp_only_layers": [1]}),
    ("gemma", "use_bidirectional_attention", {"use_bidirectional_attention": True}),
    ("gpt2", "scale_attn_weights", {"scale_attn_weights": False}),
    ("gpt2", "scale_attn_by_inverse_layer_idx", {"scale_attn_by_inverse_layer_idx": True}),
    ("gpt2", "num_attention_heads", {"num_attention_heads": 2}),
    ("phi", "qk_layernorm", {"qk_layernorm": True}),
    ("stablelm", "qk_layernorm", {"qk_layernorm": True}),
    ("stablelm", "head_dim", {"head_dim": 12}),
    ("gpt_neox", "head_dim", {"head_dim": 12}),
    ("falcon", "alibi", {"alibi": True}),
    ("falcon", "num_kv_heads", {"multi_query": None, "num_kv_heads": 2}),
    ("falcon", "parallel_attn", {"new_decoder_architecture": True, "parallel_attn": False}),
    ("falcon", "num_ln_in_parallel_attn", {"num_ln_in_parallel_attn": 2}),
    ("falcon", "n_embed", {"n_embed": 12}),
    ("opt", "word_embed_proj_dim", {"word_embed_proj_dim": 12}),
    ("opt", "_remove_final_layer_norm", {"_remove_final_layer_norm": True}),
    ("opt", "layer_norm_elementwise_affine", {"layer_norm_elementwise_affine": False}),
    ("bloom", "apply_residual_connection_post_layernorm", {"apply_residual_connection_post_layernorm": True}),
    ("bloom", "slow_but_exact", {"slow_but_exact": True}),
    ("bloom", "num_attention_heads", {"num_attention_heads": 2}),
    ("t5", "num_hidden_layers", {"num_hidden_layers": 1}),
    ("t5", "head_dim", {"head_dim": 14}),
    ("t5", "dense_act_fn", {"dense_act_fn": "gelu"}),
    ("t5", "is_gated_act", {"is_gated_act": True}),
    ("bert", "position_embedding_type", {"position_embedding_type": "relative_key"}),
    ("bert", "is_decoder", {"is_decoder": True}),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One of each family."""
    paths = {}
    for name, (auto, config) in MODELS.items():
        model = auto.from_config(config, dtype=torch.float32)
        fill(model, 0.0 if name.startswith("gemma") else 1.0)
        paths[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(paths[name])
    return paths


def edited(folder: Path, changes: dict[str, object], to: Path) -> Path:
    """The same weights with a config.json with other keys."""
    keys = json.loads((folder / "config.json").read_text()) | changes
    (to / "config.json").write_text(json.dumps({key: value for key, value in keys.items() if value is not MISSING}))
    (to / "model.safetensors").symlink_to(to / "weights")
    (to / "weights").hardlink_to(folder / "model.safetensors")
    return to


@torch.no_grad()
def outputs(name: str, model: nn.Module, theirs: bool) -> Tensor:
    if name == "t5":
        source, target = ids(2, 11), ids(2, 9, seed=2)
        given = {"input_ids": source, "decoder_input_ids": target, "use_cache": False}
        return model(**given).logits if theirs else model(source, target)
    out = model(ids(2, 14))
    if theirs:
        out = out.last_hidden_state if name == "bert" else out.logits
    return out


@pytest.mark.slow
@pytest.mark.parametrize(("name", "changes"), TAKEN, ids=str)
def test_what_transformers_takes(name: str, changes: dict, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = edited(folders[name], changes, tmp_path)
    theirs = MODELS[name][0].from_pretrained(folder, dtype=torch.float32).eval()
    ours = load_model(folder)
    torch.testing.assert_close(outputs(name, ours, False), outputs(name, theirs, True), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("name", "key", "changes"), REFUSED, ids=str)
def test_what_would_change_the_result_is_refused(
    name: str, key: str, changes: dict, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = edited(folders[name], changes, tmp_path)
    with pytest.raises(ConfigurationError, match=rf"^{folder / 'config.json'}, {key}: expected"):
        load_model(folder)


def test_one_rotary_embedding_for_each_kind_of_layer(folders: dict[str, Path], tmp_path: Path) -> None:
    """Where all are alike, it is that one."""
    folder = edited(folders["gemma2"], {"rope_parameters": rope("linear", factor=3.0)}, tmp_path)
    expected = load_config(folder)
    kinds = {"full_attention": rope("linear", factor=3.0), "sliding_attention": rope("linear", factor=3.0)}
    edit_config(folder, rope_parameters=kinds)
    assert load_config(folder) == expected
    edit_config(folder, rope_parameters=kinds | {"full_attention": rope()})
    with pytest.raises(ConfigurationError, match=r"config.json, rope_parameters.full_attention: expected the value"):
        load_config(folder)


SIZES = {"vocab_size": 9, "hidden_size": 64, "num_attention_heads": 32, "num_hidden_layers": 3, "intermediate_size": 8}
T5_SIZES = {"vocab_size": 9, "d_model": 64, "num_heads": 32, "num_layers": 3, "d_ff": 8, "decoder_start_token_id": 0}
GPT2_SIZES = {"vocab_size": 9, "n_embd": 64, "n_head": 32, "n_layer": 3}
WIDE = SIZES | {"hidden_size": 256, "ffn_dim": 8}
DISTILBERT_SIZES = {"vocab_size": 9, "dim": 64, "n_heads": 32, "n_layers": 3, "hidden_dim": 8}
OTHER_SIZES = {"gpt2": GPT2_SIZES, "distilbert": DISTILBERT_SIZES, "t5": T5_SIZES, "mt5": T5_SIZES, "umt5": T5_SIZES}
DECODERS = ["llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma", "gemma2"]
ENCODERS = ["bert", "roberta", "xlm-roberta", "distilbert", "modernbert"]
NEWER = ["gemma3_text", "granite", "olmo2", "phi3", "smollm3"]


def described(kind: str, folder: Path) -> tuple[Any, Any]:
    """Our configuration and theirs of a config.json with nothing but sizes."""
    sizes = OTHER_SIZES.get(kind, SIZES if kind in (*DECODERS, *ENCODERS) else WIDE)
    (folder / "config.json").write_text(json.dumps({"model_type": kind, **sizes}))
    return load_config(folder), AutoConfig.for_model(kind, **sizes)


@pytest.mark.parametrize("kind", DECODERS + NEWER)
def test_what_a_missing_key_means(kind: str, tmp_path: Path) -> None:
    ours, theirs = described(kind, tmp_path)
    groups = {"mha": ours.num_heads, "mqa": 1}.get(ours.attention, ours.num_groups)
    assert groups == theirs.num_key_value_heads
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or theirs.hidden_size // 32)
    assert ours.num_experts == getattr(theirs, "num_local_experts", None)
    assert ours.experts_per_token == getattr(theirs, "num_experts_per_tok", None)
    assert ours.d_ff == getattr(theirs, "moe_intermediate_size", theirs.intermediate_size)
    assert ours.normalize_routing_weights == getattr(theirs, "norm_topk_prob", True)
    assert ours.norm_eps == theirs.rms_norm_eps
    assert ours.tied_embeddings == theirs.tie_word_embeddings
    ropes = theirs.rope_parameters
    assert ours.rotary_base == ropes.get("full_attention", ropes)["rope_theta"]
    assert (ours.rotary_sliding_base or ours.rotary_base) == ropes.get("sliding_attention", ropes)["rope_theta"]
    activation = theirs.hidden_activation if kind in ("gemma2", "gemma3_text") else theirs.hidden_act
    assert ours.activation == {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}[activation]
    layers = getattr(theirs, "layer_types", ["sliding_attention" if kind == "mistral" else "full_attention"] * 3)
    assert [f"{word}_attention" for word in ours.kinds(3)] == layers
    assert ours.window_size == (theirs.sliding_window if "sliding_attention" in layers else None)
    assert ours.softcap == getattr(theirs, "attn_logit_softcapping", None)
    assert ours.logit_softcap == getattr(theirs, "final_logit_softcapping", None)


@pytest.mark.parametrize("kind", ["stablelm", "starcoder2", "gpt_neox", "falcon", "opt", "bloom", *ENCODERS])
def test_a_missing_key_means_what_transformers_writes(kind: str, tmp_path: Path) -> None:
    ours, theirs = described(kind, tmp_path)
    (tmp_path / "config.json").write_text(theirs.to_json_string(use_diff=False))
    assert replace(load_config(tmp_path), context_length=None) == ours


@pytest.mark.parametrize("kind", ["t5", "mt5", "umt5"])
def test_what_a_missing_key_means_to_t5(kind: str, tmp_path: Path) -> None:
    ours, theirs = described(kind, tmp_path)
    assert ours.tied_embeddings == theirs.tie_word_embeddings
    assert ours.decoder_layers == theirs.num_decoder_layers
    assert (ours.head_dim, ours.norm_eps) == (theirs.d_kv, theirs.layer_norm_epsilon)
    assert ours.relative_buckets == theirs.relative_attention_num_buckets
    assert ours.relative_max_distance == theirs.relative_attention_max_distance
    assert ours.feed_forward == ("gated" if theirs.is_gated_act else "plain")
    assert ours.activation == {"gelu_new": "gelu_tanh"}.get(theirs.dense_act_fn, theirs.dense_act_fn)


@pytest.mark.parametrize("kind", [*DECODERS, *NEWER, "gpt2", "t5", "mt5", "umt5", "bert"])
def test_the_tokens_that_a_family_has_where_none_are_named(kind: str, tmp_path: Path) -> None:
    ours, theirs = described(kind, tmp_path)
    assert ours.stop_tokens == (() if theirs.eos_token_id is None else (theirs.eos_token_id,))
    assert ours.pad_token == theirs.pad_token_id
    if kind in (*DECODERS, *NEWER, "gpt2"):
        assert ours.start_token == theirs.bos_token_id
    edit_config(tmp_path, eos_token_id=None, pad_token_id=None, bos_token_id=None)
    assert (load_config(tmp_path).stop_tokens, load_config(tmp_path).pad_token) == ((), None)


def test_an_id_may_be_written_with_a_fraction_of_nothing(folders: dict[str, Path], tmp_path: Path) -> None:
    """As transformers takes it from generation_config.json."""
    folder = edited(folders["llama"], {"eos_token_id": None}, tmp_path)
    (folder / "generation_config.json").write_text('{"eos_token_id": [5.0, 6], "pad_token_id": 0.0}')
    config = load_config(folder)
    assert (config.stop_tokens, config.pad_token) == ((5, 6), 0)
    assert {type(token) for token in (*config.stop_tokens, config.pad_token)} == {int}


@pytest.mark.parametrize(
    ("name", "key", "config", "generation", "start"),
    [
        ("t5", "decoder_start_token_id", 2, 3, 3),
        ("t5", "decoder_start_token_id", MISSING, 3, 3),
        ("t5", "decoder_start_token_id", 2, None, 2),
        ("llama", "bos_token_id", 2, 0, 0),
        ("llama", "bos_token_id", None, MISSING, None),
    ],
)
def test_the_first_token_is_that_of_generation(
    name: str, key: str, config: object, generation: object, start: int | None, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = edited(folders[name], {key: config}, tmp_path)
    (folder / "generation_config.json").write_text(json.dumps({} if generation is MISSING else {key: generation}))
    assert load_config(folder).start_token == start
