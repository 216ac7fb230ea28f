"""Logits of sinks: against plain loops, transformers' GPT-OSS and the log-sum-exp, in every path."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

from tests.attention.splits import assert_splits_change_nothing
from tests.attention.test_against_oracle import Call, run_conversation
from tests.conversations import assert_same, run_chunks
from tests.oracle import Options, cross
from tests.setups import SCHEMES, build, padding, tokens
from transformer import DecoderOnlyTransformer, GroupQueryAttention, MultiHeadAttention
from transformer.attention import to_mha, to_torch
from transformer.checkpoints import load_model, save_model
from transformer.engines import as_pretrained
from transformer.errors import ConfigurationError
from transformer.kernels import Backend, Kernel, backend, tuned
from transformer.kernels.compiled import are_available
from transformer.models import composition_of

PLAIN = Options(num_groups=2, sink_logits=True)
CALLS = [
    Call(5, ((0, 5), (1, 3)), grad="grad"),
    Call(1, weights=False),
    Call(4, ((0, 2), (0, 4)), bias="hidden", weights=False),
    Call(0),
    Call(3, mode=True, grad="inference", bias="float"),
    Call(9, ((3, 6), (0, 0)), mode=False, weights=False),
    Call(2, mode=False),
]


@pytest.mark.parametrize("scheme", ["rotary halves", "alibi"])
@pytest.mark.parametrize(
    "options", [{}, {"window_size": 3, "num_sinks": 2}, {"causal": False, "softcap": 1.5}], ids=str
)
def test_conversations_against_loops(scheme: str, options: dict) -> None:
    given = replace(PLAIN, scheme=SCHEMES[scheme], **options)
    run_conversation(build(given), given, 2, CALLS)
    run_conversation(build(given, dtype=torch.float32), given, 2, CALLS)


def test_a_source_against_loops() -> None:
    options = replace(PLAIN, causal=False)
    module = build(options)
    x, kv, mask = tokens(2, 3, 16), tokens(2, 5, 16, seed=1), padding([(0, 5), (1, 2)], 5)
    expected = cross(module, options, x, kv, mask)
    for _ in range(2):  # projected, and kept
        with torch.no_grad():
            assert_same(module(x, kv, kv_mask=mask, return_weights=True), expected)
    assert expected[1].sum(-1).max() < 1


@torch.inference_mode()
def test_every_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """The output is attention times `sigmoid(lse - logit)`; those that cannot say so refuse."""
    kernel, logits = Kernel(0.5), torch.tensor([-1.0, 0.0, 2.0, 5.0])
    for dtype, tolerance in ((torch.float32, 2e-6), (torch.bfloat16, 2e-2)):
        query, key, value = (tokens(2, heads, 6, 16, seed=heads, dtype=dtype) for heads in (4, 2, 2))
        exact = [each.double() for each in (query, key.repeat_interleave(2, 1), value.repeat_interleave(2, 1))]
        scores = 0.5 * exact[0] @ exact[1].mT
        share = torch.sigmoid(scores.logsumexp(-1) - logits[:, None])
        expected = scores.softmax(-1) @ exact[2] * share.unsqueeze(-1)
        served = [None, Backend.REFERENCE, Backend.MATMUL, *([Backend.COMPILED] if are_available() else [])]
        for each in served:
            with backend(each) if each else tuned():
                out, _ = kernel(query, key, value, sink_logits=logits.to(dtype))
            assert out.dtype == dtype
            assert_same(out.double(), expected, tolerance)
        with tuned(tile_bytes=1):  # head by head
            assert_same(
                kernel(query, key, value, query.new_zeros(()), sink_logits=logits)[0].double(), expected, tolerance
            )
    with backend(Backend.SDPA), pytest.raises(Exception, match="it has no sink_logits"):
        kernel(query, key, value, sink_logits=logits)
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = kernel(*(each.float() for each in (query, key, value)), sink_logits=logits)
    assert_same(out.double(), expected, 2e-2)


@pytest.mark.parametrize("options", [{}, {"window_size": 70, "num_sinks": 2}], ids=str)
@torch.inference_mode()
def test_blocks_of_queries_and_splits(options: dict) -> None:
    module = build(replace(PLAIN, scheme=SCHEMES["rotary halves"], **options)).float()
    assert_splits_change_nothing(module)


@torch.no_grad()
def test_attention_is_that_of_gpt_oss() -> None:
    """Their eager attention of the same heads, in causal order."""
    module = GroupQueryAttention(16, 4, 2, True, head_dim=8, sink_logits=True)
    torch.nn.init.normal_(module.sink_logits)
    x = torch.randn(2, 9, 16)
    query, key, value = module.query_key_value(x)
    mask = torch.full((9, 9), float("-inf")).triu(1)[None, None]
    theirs = SimpleNamespace(sinks=module.sink_logits, num_key_value_groups=2, training=False)
    out, weights = eager_attention_forward(theirs, query, key, value, mask, scaling=8**-0.5)
    found = module(x, return_weights=True)
    assert_same(found[0], module.out_proj(out.flatten(2)), 2e-6)
    assert_same(found[1], weights[..., :9], 2e-6)


@pytest.mark.parametrize("window", [None, 3])
def test_gradients(window: int | None) -> None:
    """By differences, and through cached chunks those of one call."""
    options = replace(PLAIN, window_size=window, cached=False, embed_dim=4, num_heads=2, num_groups=1, head_dim=2)
    module, x = build(options), tokens(1, 5, 4).requires_grad_()

    def called(x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(module, {"sink_logits": logits}, (x,))

    assert torch.autograd.gradcheck(called, (x, module.sink_logits))
    found = []
    for chunks in ((5,), (2, 1, 2)):
        cached = build(replace(options, cached=True))
        out = run_chunks(cached, x, chunks)
        found.append(torch.autograd.grad(out.square().sum(), [x, *cached.parameters()]))
    assert_same(*found)


@pytest.mark.parametrize("options", [{}, {"window_size": 3, "num_sinks": 2, "scheme": SCHEMES["alibi"]}], ids=str)
def test_traced_and_compiled_calls(options: dict) -> None:
    """One graph uncached, and over a cache of a frozen layout; `torch.export`, `vmap`."""
    plain = replace(PLAIN, cached=False, **options)
    module, mask, x = build(plain), padding([(0, 11), (2, 5)], 11), tokens(2, 11, 16)
    expected, weights = module(x, attention_mask=mask, return_weights=True)
    rows = torch.func.vmap(lambda each, real: module(each, attention_mask=real))(x.unsqueeze(1), mask.unsqueeze(1))
    assert_same(rows.squeeze(1), expected)
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, attention_mask=mask, return_weights=True), (expected, weights))
    with torch.no_grad():
        assert_same(torch.export.export(module, (x,)).module()(x), module(x))
        stepped = build(replace(plain, cached=True), max_cache_length=16)
        outputs = [stepped(x[:, :3])]
        stepped.kv_cache.freeze_layout()
        step = torch.compile(stepped.eval(), backend="eager", fullgraph=True)
        outputs += [step(each) for each in x[:, 3:].split(1, 1)]
        reader, kv = build(replace(plain, causal=False, cached=True), max_cache_length=16).eval(), tokens(2, 5, 16)
        read = reader(x, kv)
        reader.kv_cache.freeze_layout()
        assert_same(torch.compile(reader, backend="eager", fullgraph=True)(x, kv), read)
    assert_same(torch.cat(outputs, 1), module(x))
    torch._dynamo.reset()


@torch.inference_mode()
def test_rows_that_share_a_prefix() -> None:
    module = build(PLAIN)
    x, new = tokens(1, 9, 16), tokens(3, 4, 16, seed=1)
    module(x)
    module.kv_cache.select([0, 0, 0])
    together = run_chunks(module, new, (1, 3))
    for row in range(3):
        module.kv_cache = None
        assert_same(together[row : row + 1], module(torch.cat((x, new[row : row + 1]), 1))[:, 9:])


def test_copies_conversions_and_refusals() -> None:
    module, x = build(PLAIN), tokens(1, 6, 16)
    assert "sink_logits=True" in repr(module)
    with torch.no_grad():
        expected = module(x)
        for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), to_mha(module)):
            other.kv_cache = None
            assert_same(other(x), expected)
        old = MultiHeadAttention(16, 4)
        state = old.__getstate__()
        del state["sink_logits"]
        before = MultiHeadAttention.__new__(MultiHeadAttention)
        before.__setstate__(state)
        assert_same(before(x.float()), old(x.float()))
        module.reset_parameters()
        assert not module.sink_logits.any()
    with pytest.raises(ConfigurationError, match="sink_logits=True"):
        to_torch(MultiHeadAttention(16, 4, sink_logits=True))
    with pytest.raises(ConfigurationError, match="sink_logits: expected True or False"):
        MultiHeadAttention(16, 4, sink_logits=1)


def test_models_are_saved_with_them(tmp_path: Path) -> None:
    model = DecoderOnlyTransformer(11, 16, 4, 12, 2, sink_logits=True, window_size=4, layer_pattern="sliding full")
    for block in model.eval().decoder.blocks:
        torch.nn.init.normal_(block.attention.sink_logits)
    assert composition_of(model).config.sink_logits
    save_model(model, tmp_path / "saved")
    ids = torch.randint(11, (2, 9))
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / "saved")(ids), model(ids))
    greedy = model.generate(ids, max_new_tokens=6)
    assert torch.equal(greedy, model.generate(ids, max_new_tokens=6, use_cache=False))
    with pytest.raises(ConfigurationError, match="sink_logits: expected False, which engines run"):
        as_pretrained(model)
