"""Continuous batching: requests join a running batch when there is a row free, and leave it when they end."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import count
from typing import NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from ..cache import KVCache, on_device
from ..errors import ArgumentError, shown
from .decoding import CachedDecoding
from .guess_options import check_no_guesses
from .keywords import generation_options
from .option_types import GenerationKeywords
from .options import GenerationOptions
from .prompt import Prompt
from .requests import Chooser, Outcome, Request, prompt_on_host, same_generators
from .rows import rows_of
from .separate import device_of, separate_adapter, separate_session
from .session import Session
from .shared_by_ranks import check_ranks
from .steps import without_gradients
from .stops import Deadline
from .turns import Turns


class Rows(NamedTuple):
    """Rows of one conversation, each with its request; None: those that have left."""

    decoding: CachedDecoding
    requests: tuple[Request | None, ...]


class Running(NamedTuple):
    """Rows of one conversation, all of which go on."""

    decoding: CachedDecoding
    requests: tuple[Request, ...]


@dataclass(frozen=True)
class State:
    """A batch between two steps, as one immutable value."""

    parts: tuple[Rows, ...] = ()
    """The running conversation, and those that join it in the next step."""
    latest: int = -1
    """The last request that has left the queue."""
    finished: dict[int, Tensor] = field(default_factory=dict)
    failed: dict[int, Exception] = field(default_factory=dict)

    @property
    def running(self) -> list[Request]:
        """The requests that go on."""
        return [request for part in self.parts for request in part.requests if request is not None]

    def without(self, number: int) -> "State":
        """The same without a request; its row leaves in the next step."""
        parts = (
            Rows(part.decoding, tuple(None if r is None or r.number == number else r for r in part.requests))
            for part in self.parts
        )
        return replace(
            self,
            parts=tuple(part for part in parts if any(part.requests)),
            finished={key: value for key, value in self.finished.items() if key != number},
            failed={key: value for key, value in self.failed.items() if key != number},
        )


class Batch:
    """Continuous batching: requests of different lengths and options in one running batch of a decoder-only model.

    Each request gets the tokens that `generate` gives it alone, whatever others join and leave: also samples, where it
    has a `seed`. The batch has a conversation of its own: the model's is neither read nor changed, and caches of the
    model may be on, with their options, or off.

    Args:
        model: a module as `generate` takes it, with attention of this library.
        max_rows: how many requests run at once; others wait. None: all of them.

    Calls of several threads take turns; `add` does not wait for a step. Raises ArgumentError for another `max_rows`,
    and for a model without caches or with cross-attention, whose requests would need a source each.
    """

    def __init__(self, model: nn.Module, *, max_rows: int | None = None) -> None:
        if max_rows is not None and (type(max_rows) is not int or max_rows < 1):
            raise ArgumentError(f"max_rows: expected None or a whole number of at least 1, got {shown(max_rows)}")
        self._adapter = separate_adapter(model)
        self._session = separate_session(self._adapter)
        self._device = device_of(model)
        self._max_rows = max_rows
        self._numbers = count()
        self._waiting: dict[int, Request] = {}
        self._state = State()
        self._choose = Chooser()
        self._turns = Turns("batch")

    def __len__(self) -> int:
        """How many requests wait or run."""
        return len(self._waiting) + len(self._state.running)

    def add(self, prompt: Sequence[int] | Tensor, **options: Unpack[GenerationKeywords]) -> int:
        """Adds a request to the end of the queue, and gives its number.

        Args:
            prompt: token ids, a list or int64 [L].
            options: those of `GenerationOptions`, for one row, with the model's own stop tokens where they give no
                others. `max_time` begins when the prompt is read. Beams and several sequences of one prompt are
                refused: add the prompt several times, with a seed each.

        Raises ArgumentError, ShapeError or DtypeError for invalid arguments, and CacheFullError where a cache of fixed
        size has no room for the request.
        """
        ids = prompt_on_host(prompt)
        chosen = generation_options(self._adapter.generating(options))
        _check_options(chosen)
        # On the host, since a device could only assert.
        self._adapter.check_prompt(ids, None)
        given = Prompt(ids.to(self._device), None, [ids.shape[1]])
        (row,), limits = rows_of(chosen, given), chosen.limits(given.lengths)
        # Refused in train(), as generate() is.
        self._adapter.session(True, limits[0])
        if self._adapter.sharded:
            check_ranks(self._adapter.modules(), {"prompt": given.tokens}, chosen)
        self._adapter.check_room(self._session, given.lengths, limits)
        number = next(self._numbers)
        self._waiting[number] = Request(number, given, chosen, row, Deadline(None))
        return number

    def step(self) -> dict[int, list[int]]:
        """The next token of each request that runs: a list of new ids for each number.

        Requests that wait join where a row is free: their prompts are read in this step, each alone. An exception, such
        as one of the model's forward, leaves the batch as it was, so that the step can be repeated. What is raised
        while the prompt of a request is read, by logits of its own that are not finite, or by its own processors,
        criteria and tokenizer ends that request alone: see `failed`.
        """
        with self._turns, without_gradients(self._adapter):
            state = self._state
            running = self._composed(state.parts)
            own = () if running is None else running.requests
            waiting = [request for number, request in list(self._waiting.items()) if number > state.latest]
            arriving = waiting if self._max_rows is None else waiting[: self._max_rows - len(own)]
            if running is None and not arriving:
                return {}
            unchanged = nullcontext() if running is None else running.decoding.cache.transaction()
            with unchanged, same_generators([*own, *arriving]):
                parts, chosen, unread = self._stepped(running, arriving)
                after = _after(state, parts, [*chosen, *unread])
            self._state = after
            for request in arriving:
                self._waiting.pop(request.number, None)
        return {each.request.number: [each.request.written[-1]] for each in chosen if each.error is None}

    def _stepped(
        self, running: Running | None, arriving: Sequence[Request]
    ) -> tuple[list[Running], list[Outcome], list[Outcome]]:
        """The rows after a step, the outcome of each request in them, in order, and of those that were not read."""
        parts, logits, unread = list[Running](), list[Tensor](), list[Outcome]()
        if running is not None:
            tokens = on_device([request.written[-1] for request in running.requests], self._device)
            logits.append(running.decoding.advance(tokens, None))
            parts.append(running)
        for request in arriving:
            request = request.begun()
            decoding = self._decoding(self._session.separated(), request.options)
            try:
                decoding.session.reserve(request.prompt.columns)
                logits.append(decoding.read_prompt(request.prompt, request.options.prompt_progress_callback))
            except Exception as error:
                unread.append(Outcome(request, True, error))
            else:
                parts.append(Running(decoding, (request,)))
        requests = [request for part in parts for request in part.requests]
        return parts, self._choose(requests, torch.cat(logits)) if requests else [], unread

    def finished(self) -> dict[int, Tensor]:
        """The requests that have ended since the last call: the prompt and the new tokens of each, int64 [L + N]."""
        with self._turns:
            finished, self._state = self._state.finished, replace(self._state, finished={})
            return finished

    def failed(self) -> dict[int, Exception]:
        """The requests that an error of their own has ended since the last call, with it."""
        with self._turns:
            failed, self._state = self._state.failed, replace(self._state, failed={})
            return failed

    def remove(self, number: int) -> None:
        """Removes a request, which waits, runs, or has ended and was not fetched. Raises ArgumentError for others."""
        with self._turns:
            state = self._state
            known = {request.number for request in state.running} | {*self._waiting, *state.finished, *state.failed}
            if number not in known:
                raise ArgumentError(f"number: expected that of a request in the batch, got {shown(number)}")
            self._waiting.pop(number, None)
            self._state = state.without(number)

    def _composed(self, parts: Sequence[Rows]) -> Running | None:
        """The rows that go on in one conversation; copied only where rows have left or come."""
        if not parts:
            return None
        requests = tuple(request for part in parts for request in part.requests if request is not None)
        if len(parts) == 1 and len(requests) == len(parts[0].requests):
            return Running(parts[0].decoding, requests)
        caches = []
        for decoding, own in parts:
            rows = [row for row, request in enumerate(own) if request is not None]
            caches.append(decoding.cache if len(rows) == len(own) else decoding.cache.fork().select(rows))
        joined = caches[0] if len(caches) == 1 else KVCache.join(caches)
        # The options are those of reading a prompt, which all of them have done.
        return Running(self._decoding(self._session.separated(joined.layers), requests[0].options), requests)

    def _decoding(self, session: Session, options: GenerationOptions) -> CachedDecoding:
        if session.cache is None:
            raise RuntimeError("batch: expected a session with caches")
        return CachedDecoding(self._adapter, session, session.cache, options)


def _check_options(options: GenerationOptions) -> None:
    for name in ("num_beams", "num_return_sequences"):
        if getattr(options, name) != 1:
            raise ArgumentError(
                f"{name}: expected 1 in a batch, got {getattr(options, name)}; add the prompt several times, with a "
                "seed each, or use generate()"
            )
    check_no_guesses(options.speculates)
    if options.use_cache is not True:
        raise ArgumentError(f"use_cache: expected True in a batch, which is cached, got {shown(options.use_cache)}")


def _after(state: State, parts: Sequence[Running], outcomes: Sequence[Outcome]) -> State:
    """The state after a step in which the requests of all parts, in order, and then others have these outcomes."""
    results = iter(outcomes)
    rows = [Rows(part.decoding, tuple(next(results).going_on for _ in part.requests)) for part in parts]
    ended = [each for each in outcomes if each.ended]
    return State(
        tuple(part for part in rows if any(part.requests)),
        max([state.latest, *(each.request.number for each in outcomes)]),
        state.finished | {each.request.number: each.request.tokens() for each in ended if each.error is None},
        state.failed | {each.request.number: each.error for each in ended if each.error is not None},
    )
