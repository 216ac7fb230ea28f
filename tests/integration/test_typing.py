"""Types for users: signatures name all options, and strict type checkers report mistakes only."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import get_args, get_origin, get_type_hints

import pytest
from typing_extensions import Unpack

from tests.integration import typed_program
from transformer import (
    DecoderOnlyTransformer,
    EncoderDecoderTransformer,
    GroupQueryAttention,
    MultiHeadAttention,
    MultiQueryAttention,
    generation,
)
from transformer.attention import Attention, AttentionKeywords, signatures
from transformer.blocks import BlockStack, DecoderBlock
from transformer.generation import GenerationKeywords, GenerationOptions
from transformer.models import (
    DecoderOnlyConfig,
    EncoderConfig,
    EncoderDecoderConfig,
    EncoderTransformer,
    UMT5Model,
    t5_config,
    t5_v1_1_config,
    umt5_config,
)

ROOT = Path(__file__).resolve().parent.parent.parent
PROGRAM = Path(typed_program.__file__)

# Each line with a mistake says so; no checker may miss one, or find another.
MISTAKES = """\
from __future__ import annotations

import torch
from torch import Tensor

from transformer import DecoderOnlyTransformer, EncoderDecoderTransformer, GroupQueryAttention, MultiHeadAttention
from transformer.blocks import BlockStack, DecoderBlock, GatedFeedForward, RMSNorm
from transformer.generation import generate
from transformer.models import NormConfig, t5_config

x, ids = torch.randn(1, 2, 8), torch.tensor([[1]])
attention = MultiHeadAttention(8, 2, windowsize=4)  # mistake
attention = MultiHeadAttention(8, 2, window_size="4")  # mistake
grouped = GroupQueryAttention(8, 2, 1, True)
grouped = GroupQueryAttention(8, 2, num_kv_heads=1)
grouped = GroupQueryAttention(8, 2, num_kv_heads="1")  # mistake
weights: Tensor = attention(x, return_weights=True)  # mistake
out, both = attention.forward(x, kv_msk=x)  # mistake
block = DecoderBlock(attention, GatedFeedForward(8, 8), RMSNorm, placement="befor")  # mistake
stack = BlockStack([block])
for layer in stack.blocks:
    print(layer.attention.kv_cache.cached_length)  # mistake
stack(x, mask=None)  # mistake
stack.blocks[0](x, maks=None)  # mistake
model = DecoderOnlyTransformer(9, 8, 2, 8, 1, position="rotery")  # mistake
model = DecoderOnlyTransformer(9, 8, 2, 8, 1, shared_embeddings=True)  # mistake
model = DecoderOnlyTransformer(9, 8, 2, 8, 1, attention="gqa", num_kv_heads=0.5)  # mistake
model = DecoderOnlyTransformer(9, 8, 2, 8)  # mistake
config = model.config.with_parts(NormConfig(norm="batch"))  # mistake
config.with_parts("rms")  # mistake
t5_config(9, 8, 2, 8, 1, src_vocab_size=9)  # mistake
model.generate(ids, max_new_token=3)  # mistake
model.stream(ids, top_k=0.5)  # mistake
generate(model, ids, use_cache="yes")  # mistake
generate(model, ids, stop_strings=3)  # mistake
tokens: Tensor = model.generate(ids, max_new_tokens=1, return_scores=True)  # mistake
model(ids, expanding_context=ids)  # mistake
logits: Tensor = model(ids, output_hidden_states=True)  # mistake
EncoderDecoderTransformer(9, 9, 8, 2, 8, 1, num_token_types=2)  # mistake
RMSNorm(8)(x, x)  # mistake
"""


# --- what the signatures say ----------------------------------------------------------------------------------------


def keywords_of(function: Callable[..., object]) -> object:
    """The TypedDict of a function's `**options`."""
    (options,) = (
        parameter.name
        for parameter in inspect.signature(function).parameters.values()
        if parameter.kind is parameter.VAR_KEYWORD
    )
    annotation = get_type_hints(function)[options]
    assert get_origin(annotation) is Unpack
    return get_args(annotation)[0]


@pytest.mark.parametrize(
    ("function", "keywords"),
    [
        (MultiHeadAttention.__init__, AttentionKeywords),
        (MultiQueryAttention.__init__, AttentionKeywords),
        (GroupQueryAttention.__init__, AttentionKeywords),
        *((call, GenerationKeywords) for call in (generation.generate, generation.stream)),
        *((model.generate, GenerationKeywords) for model in (DecoderOnlyTransformer, EncoderDecoderTransformer)),
        *((model.stream, GenerationKeywords) for model in (DecoderOnlyTransformer, EncoderDecoderTransformer)),
        *((call, GenerationKeywords) for call in (UMT5Model.generate, UMT5Model.stream)),
    ],
)
def test_no_signature_takes_anything(function, keywords):
    assert keywords_of(function) is keywords


@pytest.mark.parametrize(
    ("model", "config"),
    [
        (DecoderOnlyTransformer, DecoderOnlyConfig),
        (EncoderDecoderTransformer, EncoderDecoderConfig),
        (EncoderTransformer, EncoderConfig),
    ],
)
def test_a_model_takes_the_arguments_of_its_configuration(model, config):
    """With the types and defaults that `help()` shows; `num_kv_heads` is the one that is no field."""
    taken = inspect.signature(model).parameters
    assert taken.keys() - {"num_kv_heads"} == {field.name for field in fields(config)}
    hints = get_type_hints(config)
    for name, parameter in inspect.signature(config).parameters.items():
        assert (taken[name].kind, taken[name].default) == (parameter.kind, parameter.default)
        expected = int | None if name == "num_kv_heads" else hints[name]
        assert taken[name].annotation == get_type_hints(model.__init__)[name] == expected


@pytest.mark.parametrize("function", [t5_config, t5_v1_1_config, umt5_config])
def test_a_t5_takes_the_arguments_of_the_encoder_decoder_with_one_vocabulary(function):
    taken = inspect.signature(function).parameters
    theirs = inspect.signature(EncoderDecoderConfig).parameters
    assert taken.keys() ^ theirs.keys() == {"vocab_size", "src_vocab_size", "tgt_vocab_size"}
    assert list(taken)[:5] == ["vocab_size", "d_model", "num_heads", "d_ff", "num_layers"]
    assert function(9, 8, 4, 8, 1, attention="gqa", num_kv_heads=2).num_groups == 2


def test_keywords_of_generation_are_the_fields_of_its_options():
    hints = get_type_hints(GenerationOptions)
    assert get_type_hints(GenerationKeywords) == {field.name: hints[field.name] for field in fields(GenerationOptions)}


def test_keywords_of_attention_are_the_keyword_only_arguments_of_its_constructor():
    hints = get_type_hints(Attention.__init__)
    parameters = inspect.signature(Attention.__init__).parameters.values()
    own = {each.name: hints[each.name] for each in parameters if each.kind is each.KEYWORD_ONLY}
    assert get_type_hints(AttentionKeywords) == own
    for kind in (MultiHeadAttention, MultiQueryAttention, GroupQueryAttention):
        assert all(f"`{name}`" in kind.__doc__ for name in own), "help() names each"


def test_typed_calls_of_attention_take_the_arguments_of_forward():
    """Three overloads; they and forward differ in the type of `return_weights` alone."""
    source = inspect.getsource(signatures).replace("self: Any", "self")
    overloads = re.findall(r"@overload\ndef attention_call\((.*?)\) -> ", source, re.DOTALL)
    forward = inspect.getsource(Attention.forward)
    arguments = re.search(r"def forward\((.*?)\) -> ", forward, re.DOTALL).group(1)
    kinds = {"Literal[False] = False", "Literal[True]", "bool"}
    assert len(overloads) == 3
    for kind in kinds:
        typed = arguments.replace("return_weights: bool = False", f"return_weights: {kind}")
        assert [each.split() for each in overloads].count(typed.split()) == 1


# --- what type checkers say -----------------------------------------------------------------------------------------


def mypy(files: list[str], folder: Path) -> str:
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--no-error-summary", *files]
    # The cache of the project's own runs: types of torch take longer than all else.
    command += [f"--cache-dir={ROOT / '.mypy_cache'}"]
    paths = os.environ | {"MYPYPATH": str(ROOT)}
    return subprocess.run(command, cwd=folder, env=paths, capture_output=True, text=True, check=False).stdout


def pyright(files: list[str], folder: Path) -> str:
    settings = {"typeCheckingMode": "strict", "extraPaths": [str(ROOT)]}
    (folder / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, *files]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert re.search(r"^\d+ errors?, ", run.stdout, re.MULTILINE), run.stdout + run.stderr
    return "".join(line for line in run.stdout.splitlines(keepends=True) if " - error: " in line)


@pytest.mark.slow
@pytest.mark.parametrize("checker", [mypy, pyright])
def test_a_typed_program_is_clean_and_of_mistakes_all_are_found(checker, tmp_path):
    """In one run over both: a checker spends its time on torch."""
    (tmp_path / "program.py").write_text(PROGRAM.read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "mistakes.py").write_text(MISTAKES, encoding="utf-8")
    said = checker(["program.py", "mistakes.py"], tmp_path)
    assert [line for line in said.splitlines() if "program.py" in line] == []
    found = {int(number) for number in re.findall(r"mistakes\.py:(\d+).* error", said)}
    expected = {number for number, line in enumerate(MISTAKES.splitlines(), 1) if line.endswith("# mistake")}
    assert found == expected


def test_the_typed_program_runs(tmp_path):
    assert typed_program.compose()[:2] == [2, 2]
    assert typed_program.models(tmp_path) > 0


def test_a_list_of_blocks_is_a_module_list_of_the_same_names():
    stack = BlockStack([typed_program.block(), typed_program.block()])
    assert isinstance(stack.blocks[0], DecoderBlock)
    assert len(stack.blocks[1:]) == 1
    assert "blocks.1.attention.q_proj.weight" in stack.state_dict()
