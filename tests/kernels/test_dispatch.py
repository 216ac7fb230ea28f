"""The choice of a backend: the table without tensors, requests that never fall back, and the line in the log."""

from __future__ import annotations

import itertools
import logging
import threading

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from transformer import GroupQueryAttention
from transformer.errors import ArgumentError
from transformer.kernels import Backend, Kernel, backend, dispatch, tuned
from transformer.kernels.compiled import are_available
from transformer.kernels.dispatch import choose
from transformer.kernels.refusals import CallDescription, refusal
from transformer.kernels.tuning import DEFAULT
from transformer.positions import ALiBi, RotaryEmbedding

FLOAT = CallDescription(batch=1, heads=8, groups=8, length=1, keys=100, dtype=torch.float32, threads=2)
HALF = FLOAT._replace(dtype=torch.bfloat16)
ONE_HEAD = FLOAT._replace(groups=1, keys=DEFAULT.min_split_keys)
CHUNK = FLOAT._replace(groups=4, length=128, keys=DEFAULT.min_prefix + 128, causal=True)
SDPA, MATMUL, SPLIT_KV = Backend.SDPA, Backend.MATMUL, Backend.SPLIT_KV
PREFIX_MERGE, REFERENCE, COMPILED = Backend.PREFIX_MERGE, Backend.REFERENCE, Backend.COMPILED
FLASH, LONG = Backend.FLASH, DEFAULT.min_cudnn_queries
COMPILABLE = FLOAT._replace(compiled=True)
ON_GPU = HALF._replace(cpu=False, inference=False, flash=True)
MOST_COMPILED, BESIDE_AMX = DEFAULT.max_compiled_query_rows, DEFAULT.max_compiled_query_rows_beside_amx

TABLE: list[tuple[str, CallDescription, dict[str, object], Backend]] = [
    ("few keys", FLOAT, {}, SDPA),
    ("a soft cap", FLOAT, {"softcap": True}, MATMUL),
    ("sinks", FLOAT, {"sinks": True}, MATMUL),
    ("weights", FLOAT, {"weights": True}, MATMUL),
    ("keys below the threshold", FLOAT, {"keys": 1023}, SDPA),
    ("keys at the threshold", FLOAT, {"keys": 1024}, MATMUL),
    ("the same with a bias", FLOAT, {"keys": 1024, "bias": True}, MATMUL),
    ("the same in float64", FLOAT, {"keys": 1024, "dtype": torch.float64}, MATMUL),
    ("rows at the threshold", FLOAT, {"keys": 1024, "groups": 1, "length": 8}, MATMUL),
    ("rows above the threshold", FLOAT, {"keys": 1024, "groups": 1, "length": 9}, SDPA),
    ("another device", FLOAT, {"keys": 1024, "cpu": False, "inference": False}, SDPA),
    ("sdpa_kernel()", FLOAT, {"keys": 1024, "restricted": True}, SDPA),
    ("16-bit keys of all heads below the threshold", HALF, {"keys": 127}, SDPA),
    ("16-bit keys of all heads at the threshold", HALF, {"keys": 128}, MATMUL),
    ("two bfloat16 rows", HALF, {"keys": 4000, "groups": 4}, SDPA),
    ("two float16 rows", HALF, {"keys": 4000, "groups": 4, "dtype": torch.float16}, MATMUL),
    ("16-bit products in the processor", HALF, {"keys": 4000, "native_half": True}, SDPA),
    ("one head", ONE_HEAD, {}, SPLIT_KV),
    ("one head of fewer keys", ONE_HEAD, {"keys": DEFAULT.min_split_keys - 1}, MATMUL),
    ("three heads", ONE_HEAD, {"batch": 3}, SPLIT_KV),
    ("two heads", ONE_HEAD, {"batch": 2}, MATMUL),
    ("one head, one thread", ONE_HEAD, {"threads": 1}, SDPA),
    ("one head, four threads", ONE_HEAD, {"threads": 4}, SPLIT_KV),
    ("three heads, one thread", ONE_HEAD, {"batch": 3, "threads": 1}, SDPA),
    ("two heads, one thread", ONE_HEAD, {"batch": 2, "threads": 1}, MATMUL),
    ("five heads", ONE_HEAD, {"batch": 5}, MATMUL),
    ("two heads, four threads", ONE_HEAD, {"batch": 2, "threads": 4}, SPLIT_KV),
    ("four heads, four threads", ONE_HEAD, {"batch": 4, "threads": 4}, MATMUL),
    ("six heads, four threads", ONE_HEAD, {"batch": 6, "threads": 4}, SPLIT_KV),
    ("seven heads, four threads: the gain is too small", ONE_HEAD, {"batch": 7, "threads": 4}, MATMUL),
    ("nine heads, four threads", ONE_HEAD, {"batch": 9, "threads": 4}, MATMUL),
    ("one head with a bias", ONE_HEAD, {"bias": True}, MATMUL),
    ("one head with gradients or dropout", ONE_HEAD, {"inference": False}, MATMUL),
    ("one head, two tokens", ONE_HEAD, {"length": 2}, MATMUL),
    ("one head in 16 bits", ONE_HEAD, {"dtype": torch.bfloat16}, SDPA),
    ("one head, no log-sum-exp", ONE_HEAD, {"has_lse": False}, MATMUL),
    ("one head, sdpa_kernel()", ONE_HEAD, {"restricted": True}, SDPA),
    ("one head of very many keys", ONE_HEAD, {"keys": DEFAULT.min_onednn_keys}, MATMUL),
    ("the same with many rows", ONE_HEAD, {"keys": DEFAULT.min_onednn_keys, "heads": 17}, SPLIT_KV),
    ("the same with one row", ONE_HEAD, {"keys": DEFAULT.min_onednn_keys, "heads": 1}, SPLIT_KV),
    ("the same in float64", ONE_HEAD, {"keys": DEFAULT.min_onednn_keys, "dtype": torch.float64}, SPLIT_KV),
    ("a chunk", CHUNK, {}, PREFIX_MERGE),
    ("a chunk after a shorter prefix", CHUNK, {"keys": DEFAULT.min_prefix + 127}, SDPA),
    ("a chunk of few rows", CHUNK, {"length": 32}, MATMUL),
    ("a chunk in 16 bits, no log-sum-exp", CHUNK, {"dtype": torch.bfloat16, "has_lse": False}, PREFIX_MERGE),
    ("a chunk, no log-sum-exp", CHUNK, {"has_lse": False}, SDPA),
    ("a chunk with a bias", CHUNK, {"bias": True}, SDPA),
    ("a chunk with gradients", CHUNK, {"inference": False}, SDPA),
    ("a chunk with sdpa_kernel()", CHUNK, {"restricted": True}, SDPA),
    ("a chunk without causal order", CHUNK, {"causal": False}, SDPA),
    ("compiled kernels", COMPILABLE, {}, COMPILED),
    ("compiled, a soft cap", COMPILABLE, {"softcap": True}, COMPILED),
    ("compiled, 16 bits", COMPILABLE, {"dtype": torch.bfloat16, "native_half": True}, COMPILED),
    ("compiled, one head of many keys", ONE_HEAD, {"compiled": True}, COMPILED),
    (
        "compiled, a chunk of as many rows as it takes",
        CHUNK,
        {"compiled": True, "length": MOST_COMPILED // 2},
        COMPILED,
    ),
    ("compiled, one token more", CHUNK, {"compiled": True, "length": MOST_COMPILED // 2 + 1}, SDPA),
    ("compiled, with AMX", COMPILABLE, {"amx": True, "dtype": torch.bfloat16, "length": BESIDE_AMX}, COMPILED),
    (
        "compiled, with AMX, one more",
        COMPILABLE,
        {"amx": True, "dtype": torch.bfloat16, "length": BESIDE_AMX + 1},
        SDPA,
    ),
    ("compiled, float32 beside AMX", COMPILABLE, {"amx": True, "length": BESIDE_AMX + 1}, COMPILED),
    ("compiled, with a bias", COMPILABLE, {"bias": True}, SDPA),
    ("compiled, with sinks", COMPILABLE, {"sinks": True}, MATMUL),
    ("compiled, with weights", COMPILABLE, {"weights": True}, MATMUL),
    ("compiled, with gradients", COMPILABLE, {"inference": False}, SDPA),
    ("compiled, without keys", COMPILABLE, {"keys": 0}, SDPA),
    ("compiled, sdpa_kernel()", COMPILABLE, {"restricted": True}, SDPA),
    ("16 bits on another device", ON_GPU, {"flash": False}, SDPA),
    ("flash on a GPU", ON_GPU, {}, FLASH),
    ("flash, soft cap", ON_GPU, {"softcap": True}, MATMUL),
    ("flash, with a bias", ON_GPU, {"bias": True}, SDPA),
    ("flash, sdpa_kernel()", ON_GPU, {"restricted": True}, SDPA),
    ("flash, a chunk", ON_GPU, {"length": 9000, "keys": 9001, "causal": True}, FLASH),
    ("flash, a prompt that cuDNN gains on", ON_GPU, {"length": LONG, "keys": LONG, "causal": True}, SDPA),
    ("flash, one token less", ON_GPU, {"length": LONG - 1, "keys": LONG - 1, "causal": True}, FLASH),
    ("traced", FLOAT, {"traced": True, "inference": False, "keys": 1024}, SDPA),
    ("traced weights", FLOAT, {"traced": True, "inference": False, "weights": True}, REFERENCE),
    ("within vmap", FLOAT, {"traced": True, "inference": False, "transformed": True}, REFERENCE),
]


@pytest.mark.parametrize(("call", "changes", "expected"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE])
def test_the_table(call: CallDescription, changes: dict[str, object], expected: Backend) -> None:
    assert choose(call._replace(**changes), DEFAULT) is expected


def test_thresholds_are_an_argument() -> None:
    assert choose(FLOAT, DEFAULT) is SDPA
    with tuned(min_matmul_keys=100) as limits:
        assert choose(FLOAT, limits) is MATMUL
        assert choose(FLOAT._replace(keys=99), limits) is SDPA


def test_what_is_chosen_serves_the_call() -> None:
    flags = ("bias", "causal", "softcap", "sinks", "weights", "restricted", "native_half", "has_lse")
    chosen = set()
    for base, dtype in itertools.product((FLOAT, ONE_HEAD, CHUNK), (torch.float32, torch.float64, torch.bfloat16)):
        for state in (
            {},
            {"inference": False},
            {"inference": False, "traced": True},
            {"threads": 1},
            {"compiled": True},
            {"compiled": True, "amx": True},
            {"compiled": True, "inference": False},
            {"cpu": False, "inference": False},
            {"cpu": False, "inference": False, "flash": True},
        ):
            for values in itertools.product((False, True), repeat=len(flags)):
                call = base._replace(dtype=dtype, **state, **dict(zip(flags, values, strict=True)))
                found = choose(call, DEFAULT)
                chosen.add(found)
                assert refusal(found, call, DEFAULT) is None, (found, call)
    assert chosen == set(Backend)


# --- requests ---------------------------------------------------------------------------------------------------------


def heads(number: int, length: int) -> torch.Tensor:
    return torch.randn(1, number, length, 8)


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ("split_kv", "it is for one query"),
        ("prefix_merge", "it is for causal queries after a prefix"),
        (Backend.SDPA, "it has no weights"),
    ],
)
def test_a_request_never_falls_back(asked: Backend | str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("some backend ran")

    for name in ("sdpa", "MatmulAttention", "reference_attention"):
        monkeypatch.setattr(dispatch, name, never)
    with torch.no_grad(), backend(asked), pytest.raises(ArgumentError, match=reason):
        Kernel(0.3)(heads(2, 3), heads(2, 9), heads(2, 9), return_weights=asked is Backend.SDPA)


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ({"inference": False}, "it needs the CPU, without gradients"),
        ({"restricted": True}, "sdpa_kernel"),
        ({"has_lse": False}, "it needs SDPA's log-sum-exp"),
        ({"dtype": torch.float16}, "rounded twice"),
        ({"keys": DEFAULT.split_kv_parts - 1}, "at least 4 keys"),
        ({"bias": True}, "it has no bias"),
        ({"softcap": True}, "it has no softcap"),
    ],
)
def test_reasons_of_a_refusal(state: dict[str, object], reason: str) -> None:
    assert refusal(SPLIT_KV, ONE_HEAD, DEFAULT) is None
    assert reason in str(refusal(SPLIT_KV, ONE_HEAD._replace(**state), DEFAULT))


def test_a_request_ends_with_its_block() -> None:
    query, key = heads(2, 3), heads(2, 9)
    with torch.no_grad():
        with pytest.raises(ZeroDivisionError), backend("split_kv"):
            raise ZeroDivisionError
        Kernel(0.3)(query, key, key)
        with backend("split_kv"), backend(None):
            Kernel(0.3)(query, key, key)
        with backend("split_kv"):
            with backend("matmul"):
                Kernel(0.3)(query, key, key)
            with pytest.raises(ArgumentError, match="split_kv"):
                Kernel(0.3)(query, key, key)


@pytest.mark.parametrize("name", ["fastest", "", 3, True])
def test_unknown_names_are_refused(name: object) -> None:
    with pytest.raises(ArgumentError, match="backend: expected a Backend, None or one of"), backend(name):
        pass


def test_a_request_is_of_its_thread() -> None:
    query, key, outs = heads(2, 3), heads(2, 9), []
    with torch.no_grad(), backend("split_kv"):
        thread = threading.Thread(target=lambda: outs.append(Kernel(0.3)(query, key, key)[0]))
        thread.start()
        thread.join()
    assert outs[0].shape == query.shape


def test_a_request_stands_above_sdpa_kernel() -> None:
    """Products need no SDPA; the operator behind SDPA must not stand in for a backend that was switched off."""
    query, key = heads(2, 1), heads(1, 9)
    with torch.no_grad(), sdpa_kernel([SDPBackend.MATH]):
        with backend("matmul"):
            Kernel(0.3)(query, key, key)
        with backend("split_kv"), pytest.raises(ArgumentError, match="sdpa_kernel"):
            Kernel(0.3)(query, key, key)


@pytest.mark.parametrize("position", [None, RotaryEmbedding(8), ALiBi(4)], ids=["none", "rotary", "alibi"])
@pytest.mark.parametrize("window", [None, 16])
@torch.no_grad()
def test_whole_modules_follow_a_request(position: object, window: int | None) -> None:
    """Prefill, a chunk over cached keys, and single steps, with and without a window."""
    module = GroupQueryAttention(32, 4, 2, True, True, position=position, window_size=window).eval()
    x, outs = torch.randn(2, 70, 32), []
    for asked in (None, Backend.REFERENCE, Backend.MATMUL, Backend.SDPA):
        module.kv_cache = None
        with backend(asked):
            outs.append(torch.cat([module(part) for part in x.split([40, 28, 1, 1], 1)], 1))
    for out in outs[1:]:
        torch.testing.assert_close(out, outs[0], rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_module_gives_a_chunk_to_prefix_merge() -> None:
    module = GroupQueryAttention(32, 4, 2, True, True, position=RotaryEmbedding(8)).eval()
    x, outs = torch.randn(2, 50, 32), []
    for asked in (None, Backend.PREFIX_MERGE):
        module.kv_cache = None
        module(x[:, :20])
        with backend(asked):
            outs.append(module(x[:, 20:]))
    torch.testing.assert_close(outs[1], outs[0], rtol=0, atol=1e-5)
    with backend(Backend.PREFIX_MERGE), pytest.raises(ArgumentError, match="prefix_merge"):
        module(x[:, :1])


def test_a_compiled_call_follows_a_request() -> None:
    """The compiler guards on the request, so one compiled function serves both."""
    torch._dynamo.reset()
    graphs: list[str] = []

    def recording(graph, _inputs):
        graphs.append(" ".join(str(node.target) for node in graph.graph.nodes))
        return graph

    kernel, query, key = Kernel(0.3), heads(4, 3), heads(2, 9)
    compiled = torch.compile(lambda: kernel(query, key, key)[0], fullgraph=True, backend=recording)
    with torch.no_grad():
        expected = compiled()
        with backend("reference"):
            torch.testing.assert_close(compiled(), expected, rtol=0, atol=1e-5)
        compiled()
    assert ["scaled_dot_product" in graph for graph in graphs] == [True, False]


# --- the log ----------------------------------------------------------------------------------------------------------


def test_a_line_names_the_choice(caplog: pytest.LogCaptureFixture) -> None:
    query, key = heads(4, 1), heads(2, 9)
    with torch.no_grad():
        Kernel(0.3)(query, key, key)  # a kernel that is compiled says so
    with torch.no_grad(), caplog.at_level(logging.DEBUG, "transformer.kernels"):
        Kernel(0.3)(query, key, key)
        Kernel(0.3, softcap=2.0)(query, key, key)
    lines = [record.getMessage() for record in caplog.records]
    names = ["compiled", "compiled"] if are_available() else ["sdpa", "matmul"]
    assert [line.split(" for ")[0] for line in lines] == names
    assert "heads=4, groups=2, length=1, keys=9, dtype=torch.float32" in lines[0]


def test_a_log_that_is_off_costs_one_question(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(dispatch.logger, "isEnabledFor", lambda level: bool(asked.append(level)))
    monkeypatch.setattr(dispatch.logger, "debug", lambda *_: pytest.fail("formatted"))
    with torch.no_grad():
        Kernel(0.3)(heads(4, 1), heads(2, 9), heads(2, 9))
    assert asked == [logging.DEBUG]
