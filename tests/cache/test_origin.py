"""Fingerprints of the weights that made a conversation: saved in its file, and compared on request."""

from __future__ import annotations

import copy
import gc
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.blocks.stacks import MIXED, cache_snapshots, make
from tests.setups import tokens
from transformer import KVCache
from transformer.blocks import BlockStack
from transformer.cache.origin import ROW, digests
from transformer.errors import ArgumentError


def begun(stack: BlockStack) -> BlockStack:
    with torch.no_grad():
        stack(tokens(1, 3, 16))
    return stack


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "chat"
    KVCache.from_model(begun(make(MIXED))).save(path)
    return path


def refuses(cache: KVCache, model: nn.Module, said: str) -> None:
    before = cache_snapshots(model)
    with pytest.raises(ArgumentError, match=said):
        cache.install(model, check_weights=True)
    assert cache_snapshots(model) == before
    assert cache.length == 3


def test_the_same_weights_are_taken_wherever_they_are(path: Path) -> None:
    wrapped = nn.Module()
    wrapped._orig_mod = make(MIXED)
    for model in (make(MIXED), copy.deepcopy(make(MIXED)), wrapped):
        assert KVCache.load(path).install(model, check_weights=True).length == 3


def test_any_one_changed_weight_is_refused_and_named(path: Path) -> None:
    """One number of each tensor in turn, in its last bit, the first and the last of them."""
    model = make(MIXED[:1])
    expected = digests(model)
    for name, parameter in model.named_parameters():
        words = parameter.data.view(torch.int64).view(-1)
        for place in (0, -1):
            words[place] ^= 1
            found = digests(model)
            assert [each for each in expected if found[each] != expected[each]] == [name]
            words[place] ^= 1
    model = make(MIXED)
    model.norm.weight.data.view(torch.int64)[-1] ^= 1
    refuses(KVCache.load(path), model, r"^model: .* the weights .*; differences: 'norm.weight' has other numbers; load")


def test_what_was_moved_is_refused(path: Path) -> None:
    model = make(MIXED)
    weight = model.blocks[0].attention.q_proj.weight.data
    weight[[0, 1]] = weight[[1, 0]]
    refuses(KVCache.load(path), model, "q_proj.weight' has other numbers")
    model = make(MIXED)
    one, other = (model.blocks[0].attention.get_submodule(name).weight for name in ("k_proj", "v_proj"))
    one.data, other.data = other.data, one.data
    refuses(KVCache.load(path), model, "k_proj.weight' has other numbers; .*v_proj.weight' has other numbers; load")


def test_another_dtype_and_shape_and_name_are_named(path: Path) -> None:
    refuses(KVCache.load(path), make(MIXED).float(), r"is float32 \[.*\] there and float64 \[.*\] here.*; and \d+ more")
    other = make(MIXED)
    other.norm = nn.LayerNorm(16)
    refuses(KVCache.load(path), other, "'norm.bias' is not known to the conversation; 'norm.weight' is float32")
    other.norm = nn.Identity()
    refuses(KVCache.load(path), other, "'norm.weight' is not in the model")


def test_without_the_check_only_layers_are_compared(path: Path) -> None:
    model = make(MIXED)
    model.blocks[0].attention.q_proj.weight.data.add_(1)
    assert KVCache.load(path).install(model).length == 3


def test_a_conversation_in_memory_knows_its_model_as_long_as_that_lives(tmp_path: Path) -> None:
    stack, other = begun(make(MIXED)), make(MIXED)
    cache = KVCache.from_model(stack).remove(stack)
    for conversation in (cache.fork(), KVCache.join([cache, cache]).select([0]), cache):
        conversation.install(other, check_weights=True).remove(other)
    cache.install(stack, check_weights=True).remove(stack)
    other.norm.weight.data.mul_(2)
    refuses(cache.fork(), other, "'norm.weight' has other numbers")
    cache.save(tmp_path / "known")
    del stack
    gc.collect()
    refuses(cache, make(MIXED), "got a conversation with unknown weights")
    cache.save(tmp_path / "unknown")
    refuses(KVCache.load(tmp_path / "unknown"), make(MIXED), "got a conversation with unknown weights")
    KVCache.load(tmp_path / "known").install(make(MIXED), check_weights=True)


def doubled(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: 2 * tensor for name, tensor in model.state_dict().items()}


@torch.no_grad()
def step(model: BlockStack) -> None:
    """One of training, with gradients that are all one."""
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW(model.parameters()).step()


CHANGES = {
    "in place": lambda model: model.blocks[0].attention.k_proj.weight.mul_(2),
    "in training": step,
    "loaded": lambda model: model.load_state_dict(doubled(model)),
    "assigned": lambda model: model.load_state_dict(doubled(model), assign=True),
    "replaced": lambda model: setattr(model.norm, "weight", nn.Parameter(torch.ones(16).double())),
    "exchanged data": lambda model: setattr(model.norm.weight, "data", torch.ones(16).double()),
    "cast": lambda model: model.float(),
}
LEAVES = {
    "removed": lambda stack: KVCache.from_model(stack).remove(stack),
    "forked": lambda stack: KVCache.from_model(stack).fork(),
    "split": lambda stack: KVCache.from_model(stack).split()[0],
    "joined": lambda stack: KVCache.join([KVCache.from_model(stack)]),
    "a fork of one that was removed": lambda stack: KVCache.from_model(stack).remove(stack).fork(),
}


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("leave", LEAVES)
def test_weights_that_change_after_a_conversation_left_their_model(leave: str, change: str, tmp_path: Path) -> None:
    """Refused in memory, where fingerprints are compared, but not from a file that was saved later."""
    stack = begun(make(MIXED))
    cache = LEAVES[leave](stack)
    cache.save(tmp_path / "before")
    CHANGES[change](stack)
    for model in (stack, make(MIXED)):
        refuses(
            cache, model, "^check_weights: .* of its model changed, or were moved, since it was taken out or forked"
        )
    cache.save(tmp_path / "after")
    refuses(KVCache.load(tmp_path / "after"), stack, "got a conversation with unknown weights")
    KVCache.load(tmp_path / "before").install(make(MIXED), check_weights=True)


@torch.no_grad()
def test_conversations_of_one_model_before_and_after_a_change_know_nothing_together() -> None:
    stack = begun(make(MIXED))
    before = KVCache.from_model(stack).fork()
    stack.norm.weight.mul_(2)
    refuses(KVCache.join([before, KVCache.from_model(stack)]).select([0]), stack, "with unknown weights")


@torch.no_grad()
def test_a_live_view_is_of_the_weights_that_its_model_has(tmp_path: Path) -> None:
    stack = begun(make(MIXED))
    cache = KVCache.from_model(stack)
    stack.norm.weight.mul_(2)
    cache.save(tmp_path / "file")
    cache.remove(stack)
    KVCache.load(tmp_path / "file").install(stack, check_weights=True).remove(stack)
    cache.install(stack, check_weights=True)


def test_weights_made_in_inference_mode_have_no_version(tmp_path: Path) -> None:
    with torch.inference_mode():
        stack = begun(make(MIXED))
    cache = KVCache.from_model(stack).remove(stack)
    cache.save(tmp_path / "file")
    cache.install(stack, check_weights=True).remove(stack)
    KVCache.load(tmp_path / "file").install(make(MIXED), check_weights=True)
    stack.norm.weight = nn.Parameter(torch.ones(16).double())
    refuses(cache, stack, "of its model changed, or were moved")


def test_a_loaded_conversation_is_saved_with_what_it_knows(path: Path, tmp_path: Path) -> None:
    loaded = KVCache.load(path)
    for number, conversation in enumerate((loaded, loaded.fork(), KVCache.join([loaded.fork(), loaded]).select([0]))):
        conversation.save(tmp_path / str(number))
        KVCache.load(tmp_path / str(number)).install(make(MIXED), check_weights=True)


def test_a_conversation_of_two_models_knows_neither(path: Path) -> None:
    stack = begun(make(MIXED))
    joint = KVCache.join([KVCache.load(path), KVCache.from_model(stack)]).select([0])
    refuses(joint, make(MIXED), "got a conversation with unknown weights")


def test_pickles_and_copies_hold_no_model(path: Path) -> None:
    stack = begun(make(MIXED))
    cache = KVCache.from_model(stack).remove(stack)
    for conversation in (pickle.loads(pickle.dumps(cache)), copy.deepcopy(cache)):
        assert conversation.install(make(MIXED)).length == 3
    loaded = pickle.loads(pickle.dumps(KVCache.load(path)))
    assert loaded.install(make(MIXED), check_weights=True).length == 3


def test_weights_that_cannot_be_told(path: Path) -> None:
    refuses(KVCache.load(path), make(MIXED).to("meta"), "got a model with unknown weights")


# --- digests --------------------------------------------------------------------------------------------------------


def holding(**tensors: torch.Tensor) -> nn.Module:
    module = nn.Module()
    for name, tensor in tensors.items():
        module.register_buffer(name, tensor)
    return module


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.bool])
@pytest.mark.parametrize("size", [0, 1, 3, ROW, 2 * ROW + 5, 70 * ROW])
def test_a_digest_is_of_numbers_alone(dtype: torch.dtype, size: int) -> None:
    """Not of how they lie in memory."""
    numbers = torch.randn(size + 3, generator=torch.Generator().manual_seed(0)).mul(50)
    numbers = numbers > 0 if dtype == torch.bool else numbers.to(dtype)
    expected = digests(holding(a=numbers[3:].clone()))
    apart = torch.stack((numbers, numbers), 1)[3:, 0]
    assert digests(holding(a=numbers[3:])) == digests(holding(a=apart)) == expected
    assert digests(holding(b=numbers[3:])) != expected
    if size > 1:
        assert digests(holding(a=numbers[3:].flip(0))) != expected


def test_numbers_that_are_alike_may_not_be_exchanged() -> None:
    """Pairs that differ in one bit, the sign or the lowest, at any distance; and whole identity matrices."""
    for one, other in ((1.0, -1.0), (0.0, -0.0), (1.0, 1.0 + 2**-23), (0.0, 1.0)):
        expected = digests(holding(a=torch.full((2 * ROW,), other).index_fill_(0, torch.tensor(0), one)))
        for place in (1, 2, 3, 64, 1024, ROW - 1, ROW, 2 * ROW - 1):
            moved = torch.full((2 * ROW,), other).index_fill_(0, torch.tensor(place), one)
            assert digests(holding(a=moved)) != expected
    identity = torch.eye(128)
    assert digests(holding(a=identity)) != digests(holding(a=identity.flip(0)))
    assert digests(holding(a=identity)) != digests(holding(a=identity.roll(1, 0)))


def test_buffers_that_no_state_dict_holds_are_left_out() -> None:
    module = holding(a=torch.ones(3))
    expected = digests(module)
    module.register_buffer("table", torch.zeros(2), persistent=False)
    assert digests(module) == expected
