"""Generation with a model that several processes share: each of them must be given the same, and draw the same."""

import ctypes
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields

import torch
from torch import Tensor, nn

from ..errors import ArgumentError
from .options import GenerationOptions

NOT_COMPARED = frozenset(
    {"processors", "prefix_allowed_tokens_fn", "stopping_criteria", "tokenizer", "generator", "use_cache"}
    | {"prompt_progress_callback"}
)
"""Options whose text says nothing of them, or that change no token."""


class SharedByRanks(ABC):
    """A module of which each process has a part."""

    @abstractmethod
    def check_gives_logits(self) -> None:
        """Raises ArgumentError where no process has the logits of the whole vocabulary."""

    @abstractmethod
    def check_equal(self, given: Mapping[str, str]) -> None:
        """Raises RanksError, on every process, where one was given something else, naming it."""


def check_logits_are_whole(module: nn.Module) -> None:
    """Raises ArgumentError where ranks share this module and none of them has the logits of the whole vocabulary."""
    for each in module.modules():
        if isinstance(each, SharedByRanks):
            each.check_gives_logits()


def check_ranks(modules: Iterable[nn.Module], inputs: Mapping[str, Tensor | None], options: GenerationOptions) -> None:
    """Raises ArgumentError or RanksError where these modules are shared and a generation cannot be the same for all."""
    shared = [module for module in modules if isinstance(module, SharedByRanks)]
    for module in shared:
        module.check_gives_logits()
    if shared:
        if options.max_time is not None:
            raise ArgumentError(
                f"max_time: expected None where ranks share a model, whose clocks differ, got {options.max_time}; give "
                "max_new_tokens"
            )
        if options.assistant_model is not None:
            raise ArgumentError(
                "assistant_model: expected None where ranks share a model, since ranks that guess differently would "
                f"read different tokens, got {type(options.assistant_model).__name__}; give prompt_lookup_num_tokens"
            )
        given = {name: _digest(tensor) for name, tensor in inputs.items()}
        named = {each.name for each in fields(options)} - NOT_COMPARED
        given.update((name, repr(getattr(options, name))) for name in sorted(named))
        if _draws(options):
            given["the random generator (seed it alike on every rank, or give seed=)"] = _drawn(inputs, options)
        shared[0].check_equal(given)


def _draws(options: GenerationOptions) -> bool:
    """True if some row may be drawn without a seed of its own."""
    temperatures = options.temperature if isinstance(options.temperature, Sequence) else [options.temperature]
    seeds = options.seed if isinstance(options.seed, Sequence) else [options.seed]
    return any(temperatures) and None in seeds


def _drawn(inputs: Mapping[str, Tensor | None], options: GenerationOptions) -> str:
    """Digest of the state of the generator that tokens are drawn by."""
    if options.generator is not None:
        return _digest(options.generator.get_state())
    device = next(tensor.device for tensor in inputs.values() if tensor is not None)
    module = torch if device.type == "cpu" else torch.get_device_module(device)
    state: Tensor = module.get_rng_state()
    return _digest(state)


def _digest(tensor: Tensor | None) -> str:
    if tensor is None:
        return "None"
    numbers = tensor.detach().cpu().contiguous()
    content = ctypes.string_at(numbers.data_ptr(), numbers.nbytes)
    return f"{tensor.dtype} {list(tensor.shape)} {hashlib.sha256(content).hexdigest()[:32]}"
