"""Checks of the options of speculative decoding."""

from torch import nn

from ..errors import ArgumentError, shown


def check_guesses(
    assistant_model: object, prompt_lookup_num_tokens: int | None, num_beams: int, use_cache: object
) -> None:
    """Raises ArgumentError if options of speculative decoding do not go with each other, or with these others."""
    if not isinstance(assistant_model, nn.Module | None):
        raise ArgumentError(f"assistant_model: expected a torch.nn.Module, got {shown(assistant_model)}")
    if assistant_model is None and prompt_lookup_num_tokens is None:
        return
    names = "assistant_model, prompt_lookup_num_tokens"
    if assistant_model is not None and prompt_lookup_num_tokens is not None:
        raise ArgumentError(f"{names}: expected one of the two, got both")
    if num_beams > 1:
        raise ArgumentError(
            f"{names}: expected num_beams=1, since beams choose among many tokens, got {shown(num_beams)}"
        )
    if use_cache is not True:
        raise ArgumentError(
            f"{names}: expected use_cache=True, since guesses that are wrong are taken out of the caches, "
            f"got {shown(use_cache)}"
        )


def check_no_guesses(speculates: bool) -> None:
    """Raises ArgumentError for options of speculative decoding in a running batch."""
    if speculates:
        raise ArgumentError(
            "assistant_model, prompt_lookup_num_tokens: expected neither in a batch, where each row has one token a "
            "step; use generate()"
        )
