"""Operations on a whole model's conversation, each compared with a model that reads the resulting text."""

from __future__ import annotations

import pickle
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.blocks.stacks import MIXED, READERS, WITH_SINKS, Layer, cache_snapshots, make
from tests.conversations import assert_same
from tests.models.variants import decoder_only, ids
from tests.setups import padding, tokens
from transformer import KVCache
from transformer.blocks import BlockStack
from transformer.cache.policies import AccumulatedAttention, AnyPolicy, KeyNorm, LastQueries
from transformer.errors import ArgumentError, CacheStateError, FileFormatError

STACKS = {"mixed": MIXED, "with sinks": WITH_SINKS, "readers": READERS}
LENGTH = 14


def source_of(name: str, batch: int = 3) -> dict[str, Tensor]:
    return {"source": tokens(batch, 5, 16, seed=9)} if name == "readers" else {}


def uncached(name: str, x: Tensor, **source: Tensor) -> Tensor:
    with torch.no_grad():
        return make(STACKS[name], cached=False)(x, **source)


def fed(name: str, x: Tensor, **source: Tensor) -> tuple[BlockStack, KVCache]:
    stack = make(STACKS[name])
    with torch.no_grad():
        stack(x, **source)
    return stack, KVCache.from_model(stack)


def step(stack: BlockStack, x: Tensor, **source: Tensor) -> Tensor:
    with torch.no_grad():
        return stack(x, **source)


@pytest.mark.parametrize("name", STACKS)
@pytest.mark.parametrize("guess", [1, 2])
def test_a_rejected_guess_is_forgotten(name: str, guess: int) -> None:
    """Back to before the call, or between its tokens, every window is full again; and again after that."""
    source, x = source_of(name), tokens(3, LENGTH, 16)
    stack, cache = fed(name, x[:, :8], **source)
    for kept in range(guess + 1):
        step(stack, tokens(3, guess, 16, seed=5), **source)
        assert cache.truncate(8) is cache
        step(stack, torch.cat((x[:, 8 : 8 + kept], tokens(3, guess - kept, 16, seed=6)), 1), **source)
        cache.truncate(8 + kept)
        assert cache.length == 8 + kept
        out = step(stack, x[:, 8 + kept : 10 + kept], **source)
        assert_same(out, uncached(name, x[:, : 10 + kept], **source)[:, 8 + kept :])
        cache.truncate(9 + kept)
        out = step(stack, x[:, 9 + kept :], **source)
        assert_same(out, uncached(name, x, **source)[:, 9 + kept :])
        cache.clear()
        step(stack, x[:, :8], **source)


@pytest.mark.parametrize("name", STACKS)
def test_rows_forget_different_numbers_of_tokens(name: str) -> None:
    """As after guesses of which each row accepts some: each row goes on as the same row alone."""
    source, x, guessed = source_of(name), tokens(3, LENGTH, 16), tokens(3, 2, 16, seed=5)
    stack, cache = fed(name, x[:, :8], **source)
    step(stack, guessed, **source)
    assert cache.truncate([9, 8, 10]).lengths.tolist() == [9, 8, 10]
    out = step(stack, x[:, 8:10], **source)
    cache.truncate((10, 9, 12))
    out = torch.cat((out, step(stack, x[:, 10:], **source)), 1)
    for row, (first, second) in enumerate(((1, 1), (0, 1), (2, 2))):
        read = torch.cat((x[row, :8], guessed[row, :first], x[row, 8 : 8 + second], x[row, 10:])).unsqueeze(0)
        own = {key: value[row : row + 1] for key, value in source.items()}
        expected = uncached(name, read, **own)[0]
        assert_same(out[row, :second], expected[8 + first : 8 + first + second])
        assert_same(out[row, 2:], expected[8 + first + second :])
    before = cache_snapshots(stack)
    with pytest.raises(ArgumentError, match=r"one for each of 3 rows, got \[1, 2\]"):
        cache.truncate([1, 2])
    with pytest.raises(ArgumentError, match="a whole number from 0 to 16"):
        cache.truncate([3, 17, 3])
    assert cache_snapshots(stack) == before


@pytest.mark.parametrize("name", STACKS)
def test_making_room_forgets_nothing_that_a_guess_may_need(name: str) -> None:
    """`reserve` between drafted tokens and their rejection: evicted tokens are restored, and the room stays."""
    source, x = source_of(name), tokens(3, LENGTH, 16)
    stack, cache = fed(name, x[:, :8], **source)
    step(stack, tokens(3, 2, 16, seed=5), **source)
    cache.reserve(100).truncate(8)
    nbytes = cache.nbytes
    assert_same(step(stack, x[:, 8:], **source), uncached(name, x, **source)[:, 8:])
    assert cache.nbytes == nbytes


def test_what_is_not_stored_any_more_is_refused_by_name() -> None:
    """Issues: transformers#47433 #45745, mlx-vlm#1748. A crop by a sign convention, past the end, or after the window
    had wrapped did something else."""
    stack, cache = fed("mixed", tokens(2, 8, 16))
    before = cache_snapshots(stack)
    with pytest.raises(CacheStateError, match=r"^length: expected at least \d+, .*got 1;"):
        cache.truncate(1)
    for wrong in (9, -1, 2.0):
        with pytest.raises(ArgumentError, match=r"^length: expected a whole number from 0 to 8"):
            cache.truncate(wrong)
    assert cache_snapshots(stack) == before


def test_rows_of_different_lengths_are_truncated_alone() -> None:
    """A row that is shorter stays as it is; what lay beyond the others is not read again, be it NaN."""
    x, stack = tokens(2, LENGTH, 16), make((MIXED[2],))
    step(stack, x[:, :6], attention_mask=padding([(0, 3), (0, 6)], 6))
    step(stack, torch.full((2, 4, 16), float("nan"), dtype=x.dtype), attention_mask=padding([(0, 0), (0, 4)], 4))
    KVCache.from_model(stack).truncate(6)
    out = step(stack, x[:, 6:8])
    alone = make((MIXED[2],))
    step(alone, x[:1, :3])
    assert_same(out[:1], step(alone, x[:1, 6:8]))
    assert_same(out[1:], make((MIXED[2],), cached=False)(x[1:, :8])[:, 6:])


@pytest.mark.parametrize("way", ["truncate", "select"])
def test_what_was_rejected_is_not_read_by_rows_that_end_apart(way: str) -> None:
    """Dead slots of a shorter row are read with weight 0, which makes no number of a NaN: of a guess that was taken
    back, or that another holder of the same buffers has made."""
    x, stack = tokens(2, 7, 16), make((MIXED[2],))
    step(stack, x[:, :4])
    cache = KVCache.from_model(stack)
    fork = cache.fork() if way == "select" else cache
    step(stack, torch.full((2, 3, 16), float("nan"), dtype=x.dtype))
    if way == "select":
        cache.remove(stack)
        fork.select([0, 1]).install(stack)
    else:
        cache.truncate(4)
    out = step(stack, x[:, 4:], attention_mask=padding([(0, 1), (0, 3)], 3))
    expected = make((MIXED[2],), cached=False)(x)[:, 4:]
    assert_same(out[0, :1], expected[0, :1])
    assert_same(out[1], expected[1])


@pytest.mark.parametrize("name", STACKS)
def test_forks_go_their_own_ways(name: str) -> None:
    """In either order, alternating, and with one side truncated and rewritten while the other reads."""
    source, x, other = source_of(name), tokens(3, LENGTH, 16), tokens(3, LENGTH, 16, seed=1)
    stack, cache = fed(name, x[:, :8], **source)
    fork = cache.fork()
    assert fork.nbytes == cache.nbytes
    step(stack, x[:, 8:9], **source)
    cache.truncate(8)
    step(stack, x[:, 8:10], **source)
    cache.remove(stack)
    fork.install(stack)
    both = torch.cat((x[:, :8], other[:, 8:]), 1)
    out = step(stack, other[:, 8:11], **source)
    assert_same(out, uncached(name, both[:, :11], **source)[:, 8:])
    fork.remove(stack)
    cache.install(stack)
    assert_same(step(stack, x[:, 10:], **source), uncached(name, x, **source)[:, 10:])
    cache.remove(stack)
    fork.install(stack)
    assert_same(step(stack, other[:, 11:], **source), uncached(name, both, **source)[:, 11:])


def projected_keys(cache: KVCache) -> list[Tensor]:
    """Those of the sources that are kept."""
    return [layer.source.key for layer in cache.layers.values() if layer.source is not None]


@pytest.mark.parametrize("name", STACKS)
@pytest.mark.parametrize("rows", [[2, 0], [2, 0, 1], [1, 1, 1, 0], [0]], ids=str)
def test_rows_are_kept_reordered_and_repeated(name: str, rows: list[int]) -> None:
    """Issues: transformers#46612 #45510 #48700. Beams were reordered in one cache but not in the other."""
    source, x = source_of(name), tokens(3, LENGTH, 16)
    chosen = {key: tensor[rows] for key, tensor in source.items()}
    stack, cache = fed(name, x[:, :9], **source)
    cache.select(torch.tensor(rows))
    kept = projected_keys(cache)
    assert_same(step(stack, x[rows][:, 9:], **chosen), uncached(name, x, **source)[rows][:, 9:])
    assert all(map(torch.Tensor.is_set_to, projected_keys(cache), kept)), "in another order it is not projected anew"
    for wrong in ([], [len(rows)], [-1], torch.ones(7, dtype=torch.bool), torch.tensor([0.5])):
        with pytest.raises(ArgumentError, match=r"^rows: expected"):
            cache.select(wrong)


@pytest.mark.parametrize("name", STACKS)
def test_conversations_join_a_running_batch_and_leave_it(name: str) -> None:
    source, x = source_of(name), tokens(3, LENGTH, 16)
    apart = []
    for row, length in enumerate((4, 9, 1)):
        own = {key: tensor[row : row + 1] for key, tensor in source.items()}
        stack, cache = fed(name, x[row : row + 1, :length], **own)
        apart.append(cache.remove(stack))
    joint = KVCache.join(apart)
    assert joint.lengths.tolist() == [4, 9, 1]
    stack = make(STACKS[name])
    joint.install(stack)
    out = step(stack, x[:, 10:12], **source)
    joint.select([0, 2])
    later = step(stack, x[[0, 2], 12:], **{key: tensor[[0, 2]] for key, tensor in source.items()})
    for row, length in enumerate((4, 9, 1)):
        own = {key: tensor[row : row + 1] for key, tensor in source.items()}
        alone = uncached(name, torch.cat((x[row : row + 1, :length], x[row : row + 1, 10:]), 1), **own)
        assert_same(out[row : row + 1], alone[:, length : length + 2])
        if row != 1:
            assert_same(later[[0, None, 1][row]][None], alone[:, length + 2 :])


@pytest.mark.parametrize("name", STACKS)
def test_each_row_goes_on_alone_and_the_batch_as_well(name: str) -> None:
    """Rows of different lengths; what joins them again is the batch that was split."""
    x, real = tokens(3, LENGTH, 16), padding([(0, 9), (4, 5), (8, 1)], 9)
    source = source_of(name)
    stack, cache = fed(name, x[:, :9], attention_mask=real, **source)
    parts = cache.split()
    assert [part.lengths.tolist() for part in parts] == [[9], [5], [1]]
    joined = KVCache.join([part.fork() for part in parts])
    whole = step(stack, x[:, 9:], **source)
    for row, part in enumerate(parts):
        other = make(STACKS[name])
        part.install(other)
        own = {key: tensor[row : row + 1] for key, tensor in source.items()}
        assert_same(step(other, x[row : row + 1, 9:], **own), whole[row : row + 1])
    cache.remove(stack)
    with joined.installed(stack):
        assert_same(step(stack, x[:, 9:], **source), whole)
    assert cache.lengths.tolist() == joined.lengths.tolist()


def test_nothing_is_split_before_the_first_token() -> None:
    assert KVCache.from_model(make(MIXED)).split() == []


@pytest.mark.parametrize("ending", [None, ValueError, KeyboardInterrupt, GeneratorExit])
def test_an_installed_conversation_is_out_again_on_any_exit(ending: type[BaseException] | None) -> None:
    stack, cache = fed("mixed", tokens(1, 4, 16))
    cache.remove(stack)
    with suppress(BaseException), cache.installed(stack) as live:
        assert live is cache
        step(stack, tokens(1, 2, 16))
        if ending is not None:
            raise ending
    assert cache_snapshots(stack) == [None] * 3
    assert cache.length == 6
    with cache.installed(stack):
        cache.remove(stack)
    cache.install(stack)
    refused = pytest.raises(CacheStateError, match=r"^model: expected one without")
    with refused, cache.fork().installed(stack):
        pytest.fail("a model holds one conversation at a time")
    cache.remove(stack)
    assert cache_snapshots(stack) == [None] * 3


def test_sources_that_not_all_have_kept_are_projected_anew() -> None:
    """While gradients are recorded no source is kept. Such conversations can be joined, with each other and with
    others, also with one without tokens."""
    x, source = tokens(2, 6, 16), tokens(2, 5, 16, seed=9)

    def said(row: int, *grads: bool) -> KVCache:
        stack = make(READERS)
        for number, grad in enumerate(grads):
            with torch.set_grad_enabled(grad):
                stack(x[row : row + 1, 2 * number : 2 * number + 2], source=source[row : row + 1])
        return KVCache.from_model(stack).remove(stack)

    forgotten, never, kept = (False, True), (True, True), (False, False)
    for first, second in ((forgotten, forgotten), (never, kept), (forgotten, never)):
        stack = make(READERS)
        KVCache.join([said(0, *first), said(1, *second)]).install(stack)
        assert_same(step(stack, x[:, 4:], source=source), uncached("readers", x, source=source)[:, 4:])
    padded = make(READERS)
    with torch.no_grad():
        padded(x[:1, :2], source=source[:1], attention_mask=padding([(0, 0)], 2))
    for other in (said(1), KVCache.from_model(padded)):
        stack = make(READERS)
        joined = KVCache.join([said(0, False), other]).install(stack)
        assert joined.lengths.tolist() == [2, 0]
        with torch.no_grad():
            out = stack(x[:, :4], source=source, attention_mask=padding([(2, 2), (0, 4)], 4))
        whole = torch.stack((torch.cat((x[0, :2], x[0, 2:4])), x[1, :4]))
        expected = uncached("readers", whole, source=source)
        assert_same(out[0, 2:], expected[0, 2:])
        assert_same(out[1], expected[1])


@pytest.mark.parametrize("name", STACKS)
@pytest.mark.parametrize("lengths", [[0, 9], [5, 0, 0, 9], [0, 0]], ids=str)
def test_conversations_without_tokens_join(name: str, lengths: list[int]) -> None:
    """One is a row of length 0. Where none has read anything, the first call says how many rows there are."""
    rows, most = len(lengths), 9
    source, x = source_of(name, rows), tokens(rows, LENGTH, 16)
    caches = []
    for row, length in enumerate(lengths):
        given = {key: value[row : row + 1] for key, value in source.items()}
        stack = make(STACKS[name])
        if length:
            step(stack, x[row : row + 1, :length], **given)
        caches.append(KVCache.from_model(stack).remove(stack))
    stack = make(STACKS[name])
    joined = KVCache.join(caches).install(stack)
    assert joined.lengths.tolist() == (lengths if any(lengths) else [])
    real = padding([(0, most + 2 - length) for length in lengths], most + 2)
    unread = torch.stack(
        [torch.cat((x[row, length : most + 2], x[row, :length])) for row, length in enumerate(lengths)]
    )
    with torch.no_grad():
        out = stack(unread, attention_mask=real, **source)
    expected = uncached(name, x, **source)
    for row, length in enumerate(lengths):
        assert_same(out[row, : most + 2 - length], expected[row, length : most + 2])
    assert_same(step(stack, x[:, most + 2 :], **source), expected[:, most + 2 :])


@pytest.mark.parametrize("name", STACKS)
def test_a_loaded_conversation_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    source, x, path = source_of(name), tokens(3, LENGTH, 16), tmp_path / "chat.safetensors"
    stack, cache = fed(name, x[:, :9], **source)
    cache.save(path)
    expected = step(stack, x[:, 9:10], **source)
    other = make(STACKS[name])
    loaded = KVCache.load(path).install(other)
    assert torch.equal(step(other, x[:, 9:10], **source), expected)
    loaded.truncate(9)
    assert_same(step(other, x[:, 9:], **source), uncached(name, x, **source)[:, 9:])
    assert [entry.name for entry in tmp_path.iterdir()] == ["chat.safetensors"]


@pytest.mark.parametrize("way", ["file", "pickle"])
@pytest.mark.parametrize("rows", [[0, 1, 2], [2, 0]], ids=str)
def test_a_conversation_whose_source_has_changed_is_saved(rows: list[int], way: str, tmp_path: Path) -> None:
    """In place, under two layers that read it, and before rows leave: it is projected anew from then on."""
    source, x = tokens(3, 5, 16, seed=9), tokens(3, LENGTH, 16)
    stack, cache = fed("readers", x[:, :9], source=source)
    source.add_(0.25)
    cache.select(rows).remove(stack)
    if way == "file":
        cache.save(tmp_path / "chat")
        copied = KVCache.load(tmp_path / "chat")
    else:
        copied = pickle.loads(pickle.dumps(cache))
    outs = []
    for each in (cache, copied):
        with each.installed(stack):
            outs.append(step(stack, x[rows, 9:], source=source[rows]))
    assert_same(*outs)


@pytest.mark.parametrize("name", STACKS)
@pytest.mark.parametrize("way", ["file", "pickle"])
def test_what_was_loaded_in_inference_mode_can_be_used_in_any(name: str, way: str, tmp_path: Path) -> None:
    """Issues: transformers#32681. Buffers of `torch.inference_mode` could not be used later: with gradients, and
    without."""
    source, x, path = source_of(name), tokens(3, LENGTH, 16), tmp_path / "chat.safetensors"
    expected = uncached(name, x, **source)[:, 9:]
    _, cache = fed(name, x[:, :9], **source)
    cache.save(path)
    content = pickle.dumps(cache.fork())
    for grad in (True, False):
        with torch.inference_mode():
            loaded = KVCache.load(path) if way == "file" else pickle.loads(content)
        stack = make(STACKS[name])
        loaded.install(stack)
        with torch.set_grad_enabled(grad):
            out = torch.cat([stack(chunk, **source) for chunk in x[:, 9:].split(1, 1)], 1)
        assert_same(out.detach(), expected)
        if grad:
            out.sum().backward()


def test_the_oldest_length_is_that_of_the_whole_model() -> None:
    """Windows differ: what is named is what every layer can reach, and nothing has changed before."""
    stack = make((Layer(3), Layer(2), Layer(5)))
    x = tokens(1, LENGTH, 16)
    for chunk in x[:, :11].split((7, 3, 1), 1):
        step(stack, chunk)
    cache, before = KVCache.from_model(stack), cache_snapshots(stack)
    with pytest.raises(CacheStateError, match=r"^length: expected at least 10, .*got 0;"):
        cache.truncate(0)
    with pytest.raises(CacheStateError, match=r"^length: expected at least 10, .*got 9;"):
        cache.truncate(9)
    assert cache_snapshots(stack) == before
    cache.truncate(10)


def test_a_file_of_another_model_or_a_changed_one_is_refused(tmp_path: Path) -> None:
    _, cache = fed("mixed", tokens(1, 6, 16))
    path = tmp_path / "chat.safetensors"
    cache.save(path)
    for layers, difference in ((WITH_SINKS, "num_sinks"), (MIXED[:2], "is not in the model")):
        with pytest.raises(ArgumentError, match=rf"^model: .*{difference}"):
            KVCache.load(path).install(make(layers))
    with pytest.raises(ArgumentError, match=r"^model: .*position="):
        KVCache.load(path).install(make(MIXED, "alibi"))
    whole = path.read_bytes()
    changed = tmp_path / "changed.safetensors"
    for place in range(0, len(whole), 41):
        changed.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(FileFormatError, match=r"changed\.safetensors: expected"):
            KVCache.load(changed)
    changed.write_bytes(whole[:-1])
    with pytest.raises(FileFormatError, match=r"changed\.safetensors: expected"):
        KVCache.load(changed)


def test_a_conversation_is_in_one_place() -> None:
    """Nothing is overwritten in silence: a model that holds a conversation takes no other."""
    stack, cache = fed("mixed", tokens(1, 6, 16))
    fork, before = cache.fork(), cache_snapshots(stack)
    with pytest.raises(CacheStateError, match=r"^model: expected one without a conversation"):
        fork.install(stack)
    with pytest.raises(CacheStateError, match=r"^install: this conversation is in another model"):
        cache.install(make(MIXED))
    assert cache_snapshots(stack) == before
    cache.remove(stack)
    assert cache_snapshots(stack) == [None] * 3
    with pytest.raises(CacheStateError, match=r"^model: expected the one that this conversation is in"):
        cache.remove(stack)


@pytest.mark.parametrize("name", STACKS)
def test_room_is_reserved_before_the_first_token(name: str) -> None:
    """On the live view of a model that holds nothing yet: the first call's buffers are then large enough."""
    stack, x, source = make(STACKS[name]), tokens(3, 3, 16), source_of(name)
    KVCache.from_model(stack).reserve(500)
    assert_same(step(stack, x, **source), uncached(name, x, **source))
    key = stack.blocks[-1 if name == "mixed" else 1].attention.kv_cache["key"]
    for seed in range(40):
        step(stack, tokens(3, 10, 16, seed=seed), **source)
    later = stack.blocks[-1 if name == "mixed" else 1].attention.kv_cache["key"]
    assert later.data_ptr() == key.data_ptr(), "the layer that sees everything still has its first buffer"


def test_no_conversation_is_left_aside_by_caches_that_are_off() -> None:
    """It would be ignored by every call, and lost when the caches are turned on."""
    stack, cache = fed("mixed", tokens(1, 4, 16))
    cache.remove(stack)
    other = make(MIXED, cached=False)
    for put in (cache.install, lambda model: cache.installed(model).__enter__()):
        with pytest.raises(CacheStateError, match=r"^model: expected its caches to be on"):
            put(other)
    assert cache_snapshots(other) == [None] * 3
    cache.install(stack)


@pytest.mark.parametrize("policy", [LastQueries(3), AccumulatedAttention(2), KeyNorm()], ids=repr)
def test_a_conversation_without_tokens_joins_those_of_a_budget(policy: AnyPolicy) -> None:
    """Its policy observes from the first token on, as alone."""
    model, x = decoder_only().enable_cache(cache_budget=(6, policy)), ids(3, 4)

    @torch.inference_mode()
    def said(row: int, length: int) -> KVCache:
        if length:
            model(ids(3, 20, seed=1)[row : row + 1, :length])
        return model.kv_cache.remove(model)

    lengths = 9, 0, 4
    joined = KVCache.join([said(row, length) for row, length in enumerate(lengths)])
    with torch.inference_mode(), joined.installed(model):
        out = torch.cat((model(x[:, :3]), model(x[:, 3:])), 1)
    for row, length in enumerate(lengths):
        with torch.inference_mode(), said(row, length).installed(model):
            own = torch.cat((model(x[row : row + 1, :3]), model(x[row : row + 1, 3:])), 1)
        assert_same(out[row : row + 1], own)
