"""vLLM plugin: registration and refusals; and, where vLLM is installed, equal tokens in it."""

from __future__ import annotations

import ast
import importlib.util
import json
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import ClassVar

import pytest

from benchmarks import engines
from benchmarks.engine_compositions import COMPOSITIONS, made
from transformer import GroupQueryAttention, MultiHeadAttention
from transformer.blocks import BlockStack, DecoderBlock, GatedFeedForward, RMSNorm
from transformer.checkpoints import save_model
from transformer.engines import ModularForCausalLM, vllm_plugin
from transformer.errors import ConfigurationError
from transformer.models import DecoderOnlyTransformer
from transformer.models.composition import composition_of
from transformer.models.tokens import LanguageHead, TokenEmbedding

ROOT = Path(__file__).resolve().parents[2]


def registry(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What a stand-in for vLLM keeps of `register_model`."""
    kept: dict[str, str] = {}

    class ModelRegistry:
        register_model: ClassVar = staticmethod(kept.__setitem__)

    vllm = ModuleType("vllm")
    vllm.ModelRegistry = ModelRegistry  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    return kept


def test_the_plugin_registers_a_class_that_exists_and_may_be_called_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = registry(monkeypatch)
    vllm_plugin.register()
    vllm_plugin.register()
    assert list(kept) == [ModularForCausalLM.__name__]
    module, _, name = kept[ModularForCausalLM.__name__].partition(":")
    # Only vLLM can import it.
    source = (ROOT / module.replace(".", "/")).with_suffix(".py").read_text("utf-8")
    assert name in {node.name for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}


def test_the_plugin_does_nothing_without_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    vllm_plugin.register()


def test_the_entry_point_names_the_plugin() -> None:
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    points = text.partition("[project.entry-points.'vllm.general_plugins']\n")[2].partition("\n[")[0]
    assert 'modular-attention = "transformer.engines.vllm_plugin:register"\n' in points
    for installed in entry_points(group="vllm.general_plugins", name="modular-attention"):
        assert installed.load() is vllm_plugin.register


def composed(*attentions: MultiHeadAttention | GroupQueryAttention) -> DecoderOnlyTransformer:
    blocks = [DecoderBlock(attention, GatedFeedForward(32, 48), RMSNorm) for attention in attentions]
    embedding = TokenEmbedding(50, 32)
    head = LanguageHead(32, 50, tied=embedding)
    return DecoderOnlyTransformer.from_parts(embedding, BlockStack(blocks, RMSNorm(32)), head)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (MultiHeadAttention(32, 2, True), r"num_heads: expected 4 in all layers, .* got 2 in layer 1"),
        (GroupQueryAttention(32, 4, 2, True), r"num_kv_heads: expected 4 in all layers, .* got 2 in layer 1"),
        (MultiHeadAttention(32, 4, True, head_dim=16), r"head_dim: expected 8 in all layers, .* got 16 in layer 1"),
        (MultiHeadAttention(32, 4, True, softcap=5.0), r"softcap: expected None in all layers, .* got 5\.0 in layer 1"),
    ],
)
def test_layers_that_differ_in_what_vllm_has_once_are_refused(
    second: MultiHeadAttention | GroupQueryAttention, message: str
) -> None:
    first = MultiHeadAttention(32, 4, True)
    with pytest.raises(ConfigurationError, match=message):
        vllm_plugin.check_layers(composition_of(composed(first, second)).expanded())


def test_layers_may_differ_in_windows_norms_and_scales() -> None:
    first = MultiHeadAttention(32, 4, True, window_size=4)
    second = MultiHeadAttention(32, 4, True, qk_norm=RMSNorm, scale=0.5, head_dim=8)
    vllm_plugin.check_layers(composition_of(composed(first, second)).expanded())


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        (4, r"num_kv_heads: expected a multiple or a divisor of tensor_parallel_size=4, got 3 in layer 0; .* to_gqa"),
        (9, r"d_ff: expected a multiple of tensor_parallel_size=9, got 48 in layer 0"),
    ],
)
def test_sizes_that_ranks_cannot_share_are_refused(ranks: int, message: str) -> None:
    whole = composition_of(composed(GroupQueryAttention(32, 6, 3, True, head_dim=8))).expanded()
    for possible in (1, 3, 6):
        vllm_plugin.check_layers(whole, possible)
    with pytest.raises(ConfigurationError, match=message):
        vllm_plugin.check_layers(whole, ranks)


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_the_compositions_of_the_benchmark_suit_vllm_and_are_no_family(name: str, tmp_path: Path) -> None:
    model = made(name)
    for ranks in (1, 2):
        vllm_plugin.check_layers(composition_of(model).expanded(), ranks)
    save_model(model, tmp_path / name)
    config = json.loads((tmp_path / name / "config.json").read_text("utf-8"))
    assert (config["model_type"], config["architectures"]) == ("modular_attention", [vllm_plugin.ARCHITECTURE])


def test_the_benchmark_counts_equal_tokens() -> None:
    assert (*COMPOSITIONS,) == engines.COMPOSITIONS
    assert engines.equal_tokens([[1, 2, 3], [4, 5, 6]], [[1, 0, 3], [4, 5, 6]]) == 5


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None,
    reason="vLLM has an environment of its own: python -m benchmarks.engines vllm --environment FOLDER",
)
def test_tokens_in_vllm_equal_our_own() -> None:
    command = [sys.executable, "-m", "benchmarks.engines", "vllm", "--environment", sys.prefix]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.count("72 of 72") == 6
    for fused in ("qkv_proj (QKVParallelLinear)", "gate_up_proj (MergedColumnParallelLinear)", "-> RMSNorm (CustomOp)"):
        assert fused in ran.stdout
