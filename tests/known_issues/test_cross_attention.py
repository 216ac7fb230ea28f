"""Sources of cross-attention: projected once, and never answered from an old one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.counting import calls_of
from tests.oracle import Options
from tests.setups import build, padding, tokens

MODES = {"no_grad": torch.no_grad, "inference": torch.inference_mode}
OPTIONS = Options(causal=False, num_groups=2, qk_norm=True)


def counted(module: nn.Module, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the projections of the source, one for each time that they run from now on."""
    return calls_of({module.k_proj: "k_proj", module.v_proj: "v_proj"}, monkeypatch)


def uncached(module: nn.Module, x: Tensor, kv: Tensor, kv_mask: Tensor | None = None) -> Tensor:
    """What the module gives for this source today."""
    plain = build(OPTIONS, use_kv_cache=False)
    plain.load_state_dict(module.state_dict())
    with torch.no_grad():
        return plain(x, kv, kv_mask=kv_mask)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("masked", [False, True])
def test_a_source_is_projected_once(masked: bool, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Issues: flash-attn `MHA`. The encoder's keys were appended again at each step. Ten steps over one source project
    it once and hold its tokens once; so does equal content in another tensor; a second source is another projection."""
    module = build(OPTIONS)
    ran = counted(module, monkeypatch)
    kv_mask = padding([(0, 5), (1, 3)], 5) if masked else None
    with MODES[mode]():
        kv = tokens(2, 5, 16, seed=1)
        for step in range(10):
            x = tokens(2, 1 + step % 2, 16, seed=step)
            source = kv.clone() if step % 3 == 2 else kv
            mask = kv_mask.clone() if masked and step % 4 == 3 else kv_mask
            assert torch.equal(module(x, source, kv_mask=mask), uncached(module, x, kv, mask))
            assert module.kv_cache["key"].shape == (2, 2, 5, 4)
        assert ran == ["k_proj", "v_proj"]
        module(x, tokens(2, 4, 16, seed=2))
    assert ran == ["k_proj", "v_proj"] * 2
    assert module.kv_cache["key"].shape == (2, 2, 4, 4)
    assert module.kv_cache.length == 0, "a source is no conversation"


def changed_in_place(kv: Tensor) -> Tensor:
    return kv.mul_(-1.5)


def changed_by_a_view(kv: Tensor) -> Tensor:
    kv[1, 2:].add_(1.0)
    return kv


def changed_in_one_number(kv: Tensor) -> Tensor:
    kv[0, 0, 0] += 1.0
    return kv


def another_tensor(kv: Tensor) -> Tensor:
    return kv + 1.0


def other_data(kv: Tensor) -> Tensor:
    kv.data = kv.data + 1.0
    return kv


CHANGES = (changed_in_place, changed_by_a_view, changed_in_one_number, another_tensor, other_data)


# Torch itself refuses to change an inference tensor outside of inference mode, and to replace data within it.
@pytest.mark.parametrize(
    ("made", "mode", "change"),
    [
        *(("no_grad", "no_grad", change) for change in CHANGES),
        *((made, "inference", change) for made in MODES for change in CHANGES if change is not other_data),
        ("inference", "no_grad", another_tensor),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_a_changed_source_is_noticed(made: str, mode: str, change: Callable[[Tensor], Tensor]) -> None:
    """Issues: transformers UMT5 (reproduced, with bit-identical answers). A changed encoder output kept
    being answered from the old one. Changed in place, through a view, or replaced; in and out of inference mode, which
    counts no changes of its own tensors."""
    module, x = build(OPTIONS), tokens(2, 2, 16, seed=3)
    with MODES[made]():
        kv = tokens(2, 5, 16, seed=1)
    with MODES[mode]():
        for _ in range(3):
            assert torch.equal(module(x, kv), uncached(module, x, kv))
            kv = change(kv)


def test_a_source_changed_between_every_two_of_many_layers() -> None:
    """Issues: transformers UMT5. Several layers over one source; each notices by itself, and none is misled by what
    another has already looked at."""
    layers = [build(OPTIONS, seed=seed) for seed in range(3)]
    kv, x = tokens(2, 5, 16, seed=1), tokens(2, 1, 16, seed=2)
    with torch.no_grad():
        for step in range(6):
            for layer in layers[: 1 + step % 3]:
                assert torch.equal(layer(x, kv), uncached(layer, x, kv))
            kv[step % 2, step % 5] += 0.5


@pytest.mark.parametrize("kind", ["changed in place", "other mask", "dropped", "given", "as numbers"])
def test_a_changed_mask_is_noticed(kind: str) -> None:
    """Issues: transformers UMT5. The mask is part of the source."""
    module, kv, x = build(OPTIONS), tokens(2, 5, 16, seed=1), tokens(2, 2, 16, seed=2)
    mask = padding([(0, 5), (1, 3)], 5)
    with torch.no_grad():
        module(x, kv, kv_mask=None if kind == "given" else mask)
        if kind == "changed in place":
            mask[0, 1] = False
        later = {"other mask": padding([(0, 2), (0, 2)], 5), "dropped": None, "as numbers": mask.long()}.get(kind, mask)
        out = module(x, kv, kv_mask=later)
    assert torch.equal(out, uncached(module, x, kv, None if later is None else later.bool()))


def step_of(optimizer: Callable[..., torch.optim.Optimizer], **options: object) -> Callable[[nn.Module], None]:
    def change(module: nn.Module) -> None:
        with torch.enable_grad():
            module(tokens(2, 2, 16, seed=7), tokens(2, 5, 16, seed=8)).square().sum().backward()
        optimizer(module.parameters(), lr=0.1, **options).step()

    return change


def load(module: nn.Module, **options: object) -> None:
    other = build(OPTIONS, seed=5)
    module.load_state_dict(other.state_dict(), **options)


def norm_only(module: nn.Module) -> None:
    with torch.no_grad():
        module.k_norm.weight.mul_(2.0)


def as_one_vector(module: nn.Module) -> None:
    vector = nn.utils.parameters_to_vector(module.k_proj.parameters())
    nn.utils.vector_to_parameters(2.0 * vector.detach(), module.k_proj.parameters())


def other_module(module: nn.Module) -> None:
    module.v_proj = build(OPTIONS, seed=6).v_proj


def parametrized(module: nn.Module) -> None:
    class Twice(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2.0 * weight

    nn.utils.parametrize.register_parametrization(module.k_proj, "weight", Twice())


WEIGHTS = {
    "SGD": step_of(torch.optim.SGD, momentum=0.9),
    "Adam, one by one": step_of(torch.optim.Adam, foreach=False),
    "Adam, foreach": step_of(torch.optim.Adam, foreach=True),
    "AdamW, fused": step_of(torch.optim.AdamW, fused=True),
    "load_state_dict": load,
    "load_state_dict, assign": lambda module: load(module, assign=True),
    "the norm of the keys": norm_only,
    "vector_to_parameters": as_one_vector,
    "another projection": other_module,
    "a parametrization": parametrized,
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("change", WEIGHTS)
def test_changed_weights_are_noticed(change: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Issues: transformers UMT5. An answer from what is no more; here from old weights. Whatever changes them, the same
    source is projected anew, once; at every call through a linear that is not plain any more."""
    module, kv, x = build(OPTIONS), tokens(2, 5, 16, seed=1), tokens(2, 2, 16, seed=2)
    with MODES[mode]():
        module(x, kv)
    before = uncached(module, x, kv)
    WEIGHTS[change](module)
    ran = counted(module, monkeypatch)
    with MODES[mode]():
        again = build(OPTIONS, use_kv_cache=False)
        if change == "a parametrization":
            parametrized(again)
        again.load_state_dict(module.state_dict())
        expected = again(x, kv)
        assert not torch.equal(expected, before)
        for _ in range(2):
            torch.testing.assert_close(module(x, kv), expected, atol=1e-12, rtol=0)
    assert ran == ["k_proj", "v_proj"] * (2 if change == "a parametrization" else 1)


def test_an_autocast_call_is_followed_by_one_without() -> None:
    """Issues: vllm#54338. A source kept in another dtype than this call works in is projected anew, in both
    directions."""
    module = build(Options(causal=False), dtype=torch.float32)
    kv, x = (tokens(2, length, 16, seed=length, dtype=torch.float32) for length in (5, 2))
    with torch.no_grad():
        for enabled in (True, False, True, False):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                out = module(x, kv)
            assert out.dtype == (torch.bfloat16 if enabled else torch.float32)
        module.use_kv_cache = False
        torch.testing.assert_close(out, module(x, kv), atol=1e-6, rtol=0)


def test_while_gradients_are_recorded_it_is_projected_at_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Issues: transformers UMT5. A kept source has no graph; recorded calls neither use one nor leave one."""
    module, kv, x = build(OPTIONS), tokens(2, 5, 16, seed=1).requires_grad_(), tokens(2, 2, 16, seed=2)
    ran = counted(module, monkeypatch)
    for calls in (1, 2):
        module(x, kv).square().sum().backward()
        assert kv.grad.any()
        assert ran == ["k_proj", "v_proj"] * calls
        kv.grad = None
    assert module.kv_cache is None
