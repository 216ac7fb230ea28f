"""Requests of a running batch: one prompt each, with options of its own, and how far it is written."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..cache import on_device
from ..errors import ArgumentError, DtypeError, ShapeError
from .choice import Choice
from .decoding import checked, checked_choice
from .edges import Edges
from .options import GenerationOptions
from .progress import NO_CHOICE, NOTHING_LEFT, finite_rows, non_finite, nothing_left
from .prompt import Prompt
from .rows import Row
from .stops import Deadline, by_criteria, stop_reason


def prompt_on_host(prompt: object) -> Tensor:
    """The ids of a prompt, int64 [1, L] on the host. Raises ArgumentError, ShapeError or DtypeError for others."""
    if isinstance(prompt, list | tuple):
        if any(type(token) is not int for token in prompt):
            raise ArgumentError("prompt: expected token ids (int), got others among them")
        ids = torch.tensor(prompt, dtype=torch.int64, device="cpu")
    elif isinstance(prompt, Tensor):
        ids = prompt.detach().cpu()
    else:
        raise ArgumentError(
            f"prompt: expected a list of token ids, or a tensor of them, got {type(prompt).__name__}; encode a text "
            "with the tokenizer first"
        )
    if ids.dtype not in (torch.int64, torch.int32):
        raise DtypeError(f"prompt: expected int64 token ids, got {ids.dtype}")
    if not ids.numel() or ids.shape not in ((ids.numel(),), (1, ids.numel())):
        raise ShapeError(f"prompt: expected [L] or [1, L] with at least one token, got {list(ids.shape)}")
    return ids.long().reshape(1, -1)


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt with its options, and the new tokens so far."""

    number: int
    prompt: Prompt
    options: GenerationOptions
    row: Row
    deadline: Deadline
    written: tuple[int, ...] = ()

    @property
    def chooses_alone(self) -> bool:
        """True if what chooses its tokens may raise, or must see no other row because it knows their history."""
        options = self.row.options
        return bool(
            options.scoring or options.processors or self.options.stopping_criteria or Edges.are_needed([self.row])
        )

    def begun(self) -> "Request":
        """The same, whose time begins now."""
        return replace(self, deadline=Deadline(self.options.max_time))

    def followed_by(self, token: int) -> "Request":
        """The same with one new token more."""
        return replace(self, written=(*self.written, token))

    def is_over(self) -> bool:
        """True if its last token, its length or its time ends it."""
        return stop_reason(self.row, self.written) is not None or self.deadline.is_over()

    def tokens(self) -> Tensor:
        """The prompt and the new tokens, int64 [L + N]."""
        ids = self.prompt.tokens[0]
        with torch.inference_mode(False):
            return torch.cat((ids, on_device(self.written, ids.device)))

    def choose(self, logits: Tensor) -> tuple[Tensor, bool]:
        """Its next token, int64 [1], by logits [1, V], and whether a criterion ends it there, as in a batch of one.

        Raises as the decode loop, and what processors and criteria raise.
        """
        step, options = len(self.written), self.options
        history = torch.cat((self.prompt.tokens, on_device(self.written, logits.device).unsqueeze(0)), 1)
        choice = Choice([self.row], logits.device)
        scores = choice.scores(history, checked(logits, None, step).clone(), step)
        if options.processors:
            scores = checked_choice(scores, None, step)
        token = choice.take(scores)
        if choice.excludes_tokens and not options.processors:
            token = token.where(scores.amax(-1).isfinite(), NOTHING_LEFT)
        criteria = options.stopping_criteria
        if not criteria:
            return token, False
        return token, by_criteria(criteria, torch.cat((history, token.unsqueeze(-1)), 1), scores)[0]


class Outcome(NamedTuple):
    """A request after a step: with one new token more, or with the error that has ended it."""

    request: Request
    ended: bool
    error: Exception | None = None

    @property
    def going_on(self) -> Request | None:
        """The request, unless it has ended."""
        return None if self.ended else self.request


class Chooser:
    """Choice of the next tokens of requests: those that need no history together, each of the others alone."""

    def __init__(self) -> None:
        self._latest: tuple[list[int], Choice | None] = [], None

    def __call__(self, requests: Sequence[Request], logits: Tensor) -> list[Outcome]:
        """Each request with its next token, by logits [B, V], float32 or float64."""
        chosen: list[Tensor] = []
        results: dict[int, bool | Exception] = {}
        together = [place for place, request in enumerate(requests) if not request.chooses_alone]
        order = list(together)
        if together:
            own = logits if len(together) == len(requests) else logits[on_device(together, logits.device)]
            chosen.append(self._together([requests[place] for place in together], own))
        for place, request in enumerate(requests):
            if not request.chooses_alone:
                continue
            try:
                token, results[place] = request.choose(logits[place : place + 1])
            except Exception as error:
                # What its own processors and criteria raise is no other request's affair.
                results[place] = error
            else:
                chosen.append(token)
                order.append(place)
        # The one look of the host.
        tokens = dict(zip(order, torch.cat(chosen).tolist() if chosen else [], strict=True))
        return [
            _outcome(request, tokens.get(place, NO_CHOICE), results.get(place, False))
            for place, request in enumerate(requests)
        ]

    def _together(self, requests: Sequence[Request], logits: Tensor) -> Tensor:
        numbers = [request.number for request in requests]
        choice = self._latest[1]
        if choice is None or self._latest[0] != numbers:
            choice = Choice([request.row for request in requests], logits.device)
            self._latest = numbers, choice
        finite = finite_rows(logits)
        if choice.changes_scores:
            history = torch.zeros(len(requests), 1, dtype=torch.int64, device=logits.device)
            logits = choice.scores(history, logits, [len(request.written) for request in requests])
        return choice.take(logits).where(finite, NO_CHOICE)


def _outcome(request: Request, token: int, result: bool | Exception) -> Outcome:
    """The outcome of a request that has got this token, and whose criteria, or error, say that it ends."""
    if isinstance(result, Exception):
        return Outcome(request, True, result)
    for no_token, reason in ((NO_CHOICE, non_finite), (NOTHING_LEFT, nothing_left)):
        if token == no_token:
            return Outcome(request, True, reason([0], len(request.written)))
    request = request.followed_by(token)
    try:
        return Outcome(request, result or request.is_over())
    except Exception as error:
        # Its own tokenizer, which looks for stop strings.
        return Outcome(request, True, error)


@contextmanager
def same_generators(requests: Sequence[Request]) -> Iterator[None]:
    """A context in which an exception leaves the random generators of requests as they were."""
    generators = {id(request.row.generator): request.row.generator for request in requests}.values()
    states = [(generator, generator.get_state()) for generator in generators if generator is not None]
    try:
        yield
    except BaseException:
        for generator, state in states:
            generator.set_state(state)
        raise
