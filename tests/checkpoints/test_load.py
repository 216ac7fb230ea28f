"""Loaded models: dtype, device, tokens, lengths, memory, and sources of checkpoints."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, LlamaConfig, Phi3Config, PreTrainedConfig

from tests.checkpoints.folders import edit_config, edit_tensors, small_model
from tests.checkpoints.theirs import CASES, GPT2_SIZES, LENGTH, SIZES, ids, make, rope, saved
from transformer.checkpoints import (
    empty_model,
    generation_defaults,
    load_config,
    load_model,
    load_tokenizer,
    save_model,
)
from transformer.errors import ArgumentError, ConfigurationError, DeviceError
from transformer.positions import DynamicNTKScaling, LinearScaling, LongRoPEScaling, YaRNScaling

ON_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("stored", FLOATS)
@pytest.mark.parametrize("wanted", [None, *FLOATS])
def test_every_dtype_as_stored_and_converted(tmp_path: Path, stored: torch.dtype, wanted: torch.dtype | None) -> None:
    model = small_model().to(stored)
    save_model(model, tmp_path / "model")
    loaded = load_model(tmp_path / "model", wanted)
    expected = model.to(wanted or stored).state_dict()
    assert {tensor.dtype for tensor in loaded.state_dict().values()} == {wanted or stored}
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    assert loaded(torch.tensor([[1, 2]])).isfinite().all()


@pytest.mark.parametrize("case", ["llama", "gpt2", "gemma2"])
@torch.no_grad()
def test_shards_of_transformers(tmp_path: Path, case: str) -> None:
    theirs = saved(CASES[case], tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    torch.testing.assert_close(load_model(tmp_path)(ids(1, 9)), theirs(ids(1, 9)).logits, rtol=0, atol=1e-5)


def test_mixed_dtypes_become_the_widest(folder: Path) -> None:
    edit_tensors(
        folder, lambda tensors: tensors.update({n: t.bfloat16() for n, t in tensors.items() if "norm" not in n})
    )
    assert {parameter.dtype for parameter in load_model(folder).parameters()} == {torch.float32}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_CUDA)])
def test_a_device(folder: Path, device: str) -> None:
    ids = torch.tensor([[1, 2, 3]], device=device)
    expected = load_model(folder)(ids.cpu())
    for model in (load_model(folder, device=device), load_model_on_default(folder, device)):
        assert {parameter.device.type for parameter in model.parameters()} == {device}
        torch.testing.assert_close(model(ids).cpu(), expected, rtol=0, atol=1e-5)


def load_model_on_default(folder: Path, device: str) -> torch.nn.Module:
    with torch.device(device):
        return load_model(folder)


def test_it_is_ready_to_run_and_to_train(folder: Path) -> None:
    before = (folder / "model.safetensors").read_bytes()
    with torch.inference_mode():
        model = load_model(folder, torch.float64)
    assert not model.training
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(torch.tensor([[1, 2, 3]])).logsumexp(-1).sum().backward()
    optimizer.step()
    assert (folder / "model.safetensors").read_bytes() == before


def test_a_loaded_model_outlives_its_file(folder: Path) -> None:
    model = load_model(folder)
    expected = model(torch.tensor([[1, 2, 3]]))
    for file in folder.iterdir():
        file.unlink()
    assert torch.equal(model(torch.tensor([[1, 2, 3]])), expected)


@pytest.mark.parametrize(
    ("config", "generation", "stop", "pad"),
    [
        ({"eos_token_id": 3, "pad_token_id": 4}, None, (3,), 4),
        ({"eos_token_id": [3, 5], "pad_token_id": None}, None, (3, 5), None),
        ({"eos_token_id": 3, "pad_token_id": -1}, {"eos_token_id": [6, 7]}, (6, 7), None),
        ({"eos_token_id": 3, "pad_token_id": 4}, {"eos_token_id": None, "pad_token_id": 8}, (3,), 8),
        ({"eos_token_id": None}, {}, (), None),
    ],
)
def test_stop_and_pad_tokens(
    folder: Path, config: dict, generation: dict | None, stop: tuple[int, ...], pad: int | None
) -> None:
    edit_config(folder, **config)
    file = folder / "generation_config.json"
    file.unlink() if generation is None else file.write_text(json.dumps(generation))
    read = load_model(folder).config
    assert (read.stop_tokens, read.pad_token) == (stop, pad)
    assert load_config(folder) == read


def test_rows_end_at_the_stop_token_of_the_checkpoint(tmp_path: Path) -> None:
    theirs = saved(CASES["llama"], tmp_path)
    written = theirs.generate(ids(1, 5), max_new_tokens=9, do_sample=False)[0, 5:].tolist()
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [written[4]], "pad_token_id": 0}))
    stopped = load_model(tmp_path).generate(ids(1, 5), max_new_tokens=9)[0, 5:].tolist()
    assert stopped == written[: written.index(written[4]) + 1]


@pytest.mark.parametrize(
    "old",
    [
        {"rope_theta": 300.0},
        {"rope_theta": 300.0, "rope_scaling": None},
        {"rope_theta": 300.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_theta": 300.0, "rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
        {"rope_scaling": {"type": "dynamic", "factor": 2.0, "rope_theta": 200.0}},
    ],
)
@torch.no_grad()
def test_the_keys_of_older_files(tmp_path: Path, old: dict) -> None:
    saved(LlamaConfig(**SIZES), tmp_path)
    document = json.loads((tmp_path / "config.json").read_text())
    del document["rope_parameters"], document["head_dim"]
    (tmp_path / "config.json").write_text(json.dumps(document | old | {"torch_dtype": "float32"}))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(load_model(tmp_path)(ids(2, LENGTH)), theirs(ids(2, LENGTH)).logits, rtol=0, atol=1e-5)


LONGROPE = {"short_factor": [1.0, 1.1, 1.2], "long_factor": [1.5, 3.0, 7.0], "original_max_position_embeddings": 16}


@pytest.mark.parametrize("rule", [rope("dynamic", factor=2.0), rope("longrope", **LONGROPE)])
@torch.no_grad()
def test_scalings_by_length_at_the_length_that_is_given(tmp_path: Path, rule: dict) -> None:
    """Beyond the length of training theirs changes with each row's length; ours is that of the given one throughout."""
    theirs = saved(LlamaConfig(**SIZES | {"max_position_embeddings": 32}, rope_parameters=rule), tmp_path)
    for length in (12, LENGTH):
        ours = load_model(tmp_path, length=length)
        expected = theirs(ids(2, length)).logits
        torch.testing.assert_close(ours(ids(2, length)), expected, rtol=0, atol=1e-5)
        save_model(ours, tmp_path / f"of {length}")
        assert load_config(tmp_path / f"of {length}", length=length) == ours.config


def test_the_length_of_scalings_is_that_of_training_unless_given(tmp_path: Path) -> None:
    def scaling(length: int | None = None, **rule: object) -> object:
        saved(LlamaConfig(**SIZES, rope_parameters=rope(**rule)), tmp_path)
        return load_config(tmp_path, length=length).rotary_scaling

    assert scaling(kind="dynamic", factor=2.0) == DynamicNTKScaling(2.0, 128, 128)
    assert scaling(500, kind="dynamic", factor=2.0) == DynamicNTKScaling(2.0, 128, 500)
    short, long = LONGROPE["short_factor"], LONGROPE["long_factor"]
    assert scaling(kind="longrope", **LONGROPE) == LongRoPEScaling(short, long, 16, 16, factor=8.0)
    assert scaling(kind="longrope", factor=3.0, **LONGROPE) == LongRoPEScaling(short, long, 16, 16, factor=3.0)
    assert scaling(kind="linear", factor=2.0) == LinearScaling(2.0)
    zeros = {"mscale": 0.0, "mscale_all_dim": 0}
    assert scaling(kind="yarn", factor=2.0, original_max_position_embeddings=64, **zeros) == YaRNScaling(2.0, 64)


@torch.no_grad()
def test_old_gpt2_files_of_the_bare_model_with_masks_among_their_tensors(tmp_path: Path) -> None:
    theirs = make(GPT2Config(**GPT2_SIZES, n_embd=12, n_head=2))
    theirs.transformer.save_pretrained(tmp_path)

    def add_masks(tensors: dict[str, torch.Tensor]) -> None:
        tensors["h.0.attn.bias"] = torch.ones(1, 1, 128, 128, dtype=torch.uint8)
        tensors["h.2.attn.masked_bias"] = torch.tensor(-1e4)

    edit_tensors(tmp_path, add_masks)
    edit_config(tmp_path, architectures=["GPT2LMHeadModel"])
    torch.testing.assert_close(load_model(tmp_path)(ids(1, 9)), theirs(ids(1, 9)).logits, rtol=0, atol=1e-5)


def test_gemma_before_its_activation_was_named_rightly(tmp_path: Path) -> None:
    saved(CASES["gemma"], tmp_path)
    edit_config(tmp_path, hidden_act="gelu")
    assert load_config(tmp_path).activation == "gelu_tanh"


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, torch.float8_e4m3fn, "float32"])
@pytest.mark.parametrize("load", [load_model, empty_model])
def test_a_dtype_that_is_no_float_is_refused(folder: Path, dtype: object, load: Callable[..., object]) -> None:
    with pytest.raises(ArgumentError, match="dtype: expected"):
        load(folder, dtype)


ABSENT = "xpu" if torch.cuda.is_available() else "cuda"


@pytest.mark.parametrize(
    ("device", "error", "got"),
    [
        (ABSENT, DeviceError, ABSENT),
        (f"{ABSENT}:99", DeviceError, f"{ABSENT}:99"),
        (torch.device(ABSENT, 1), DeviceError, f"{ABSENT}:1"),
        ("hpu", DeviceError, "hpu"),
        ("vulkan", DeviceError, "vulkan"),
        ("meta", ArgumentError, "meta; empty_model"),
        ("foo", ArgumentError, "'foo'"),
        ("", ArgumentError, "''"),
        (-1, ArgumentError, "-1"),
        (1.5, ArgumentError, "1.5"),
    ],
)
def test_a_device_that_is_not_there_is_refused_before_a_weight_is_read(
    folder: Path, device: object, error: type[Exception], got: str
) -> None:
    (folder / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(error, match=rf"^device: expected .*, got {got}"):
        load_model(folder, device=device)


@pytest.mark.parametrize("allow_pickle", ["no", 1, None])
def test_pickles_are_allowed_by_a_bool_alone(folder: Path, allow_pickle: object) -> None:
    with pytest.raises(ArgumentError, match=f"^allow_pickle: expected True or False, got {allow_pickle!r}$"):
        load_model(folder, allow_pickle=allow_pickle)


@pytest.mark.parametrize("load", [load_config, empty_model, load_model, load_tokenizer, generation_defaults])
@pytest.mark.parametrize("path", [None, 3, b"model", ["model"]])
def test_what_is_no_path_is_refused_by_the_arguments_name(load: Callable[[object], object], path: object) -> None:
    with pytest.raises(ArgumentError, match=rf"^path_or_name: expected .*, got {type(path).__name__}$"):
        load(path)


@pytest.mark.parametrize("length", [0, -1, 2.0, True])
def test_a_length_that_is_none_is_refused(folder: Path, length: object) -> None:
    with pytest.raises(ArgumentError, match="length: expected"):
        load_config(folder, length=length)


@pytest.mark.parametrize("name", ["/no/such/folder", "a/b/c", "../x", "", "owner/name"])
def test_what_is_no_folder_and_no_model_of_the_hub(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=f"{name}: expected the folder of a checkpoint"):
        load_model(name or tmp_path / "nothing")


def test_without_the_hubs_package_a_name_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match=r'owner/name: .*pip install -e "\.\[hub\]"'):
        load_config("owner/name")


def test_without_safetensors_it_says_how_to_get_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ModuleNotFoundError, match=r'needs safetensors: pip install -e "\.\[checkpoints\]"'):
        load_model(folder)


def test_more_layers_than_tensors_are_refused_before_they_are_built(folder: Path) -> None:
    edit_config(folder, num_hidden_layers=256)
    with pytest.raises(ConfigurationError, match="num_layers=256 and 21 tensors"):
        load_model(folder)


MEASURED = """
import sys, torch
from transformer.checkpoints import load_model
import safetensors.torch

torch.set_num_threads(1)

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

load_model(sys.argv[1])  # what any first load brings in
before = peak()
model = load_model(sys.argv[2], getattr(torch, sys.argv[3]))
print((peak() - before) * 1024 / sum(parameter.nbytes for parameter in model.parameters()))
"""


LLAMA_135M = LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    tie_word_embeddings=True,
)
GPT_NEOX_70M = GPTNeoXConfig(
    vocab_size=8192, hidden_size=768, num_hidden_layers=8, num_attention_heads=12, intermediate_size=3072
)
"""Stored with queries, keys and values of each head in turn: they are copied, and the file's pages are left."""
PHI3_60M = Phi3Config(
    vocab_size=8192,
    pad_token_id=0,
    hidden_size=768,
    num_hidden_layers=6,
    num_attention_heads=12,
    intermediate_size=2048,
)
"""Stored with all queries before all keys: they stay in the file, side by side."""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads its peak memory from /proc")
@pytest.mark.parametrize(
    ("config", "stored", "wanted"),
    [
        (LLAMA_135M, "float32", "float32"),
        (LLAMA_135M, "float32", "bfloat16"),
        (GPT_NEOX_70M, "float32", "float32"),
        (GPT_NEOX_70M, "bfloat16", "bfloat16"),
        (PHI3_60M, "float32", "float32"),
    ],
    ids=["llama", "llama, converted", "gpt_neox", "gpt_neox in 16 bits", "phi3"],
)
def test_there_are_never_two_copies_of_the_weights(
    config: PreTrainedConfig, stored: str, wanted: str, folder: Path, tmp_path: Path
) -> None:
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(config)
    theirs.to_empty(device="cpu").tie_weights()
    for parameter in theirs.parameters():
        torch.nn.init.constant_(parameter, 0.02)
    theirs.to(getattr(torch, stored)).save_pretrained(tmp_path / "large")
    arguments = [str(folder), str(tmp_path / "large"), wanted]
    run = subprocess.run([sys.executable, "-c", MEASURED, *arguments], capture_output=True, text=True, check=True)
    assert float(run.stdout) < 1.05


def test_parts_of_one_stored_tensor_have_storages_of_their_own(tmp_path: Path) -> None:
    """So that `torch.save` writes each once, although they stay in the mapped file."""
    saved(CASES["phi3"], tmp_path)
    sizes = [(each.untyped_storage().nbytes(), each.nbytes) for each in load_model(tmp_path).parameters()]
    assert all(storage == own for storage, own in sizes)
