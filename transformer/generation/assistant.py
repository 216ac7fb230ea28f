"""Assistant of a speculative decoding: its caches, and the models and caches that cannot be helped."""

from dataclasses import replace

from ..cache import readers
from ..errors import ArgumentError
from .decoding import CachedDecoding
from .model_adapter import ForwardAdapter, ModelAdapter
from .options import GenerationOptions
from .prompt import Prompt
from .session import Session
from .shared_by_ranks import SharedByRanks


def check_can_speculate(adapter: ModelAdapter, session: Session, options: GenerationOptions) -> None:
    """Raises ArgumentError if guesses cannot be checked by this model, or taken out of its caches."""
    names = "assistant_model, prompt_lookup_num_tokens"
    if options.assistant_model is not None and adapter.source is not None:
        raise ArgumentError(
            "assistant_model: expected a decoder-only model, since the assistant does not read a source, got an "
            "encoder-decoder; give prompt_lookup_num_tokens instead"
        )
    if session.cache is None:
        raise ArgumentError(f"{names}: expected a model with caches, from which wrong guesses are taken, got none")
    if session.compresses:
        raise ArgumentError(
            f"{names}: expected caches without a cache_budget, since tokens that its policy drops for a guess cannot "
            "come back when the guess is wrong; leave one of the two out"
        )


def assistant_of(prompt: Prompt, options: GenerationOptions) -> CachedDecoding | None:
    """The assistant with caches of its own; None if there is none.

    Raises ArgumentError or CacheFullError for a model that cannot read the prompt, has no caches, or no room for it.
    """
    model = options.assistant_model
    if model is None:
        return None
    if prompt.vectors is not None:
        raise ArgumentError("assistant_model: expected input_ids, which the assistant reads too, got inputs_embeds")
    if any(True for _ in readers(model)):
        raise ArgumentError("assistant_model: expected a decoder-only model, got one with cross-attention")
    if any(isinstance(module, SharedByRanks) for module in model.modules()):
        raise ArgumentError("assistant_model: expected a model of this process alone, got one that ranks share")
    adapter = ForwardAdapter(model)
    limits = options.limits(prompt.lengths)
    try:
        adapter.check_prompt(prompt.tokens, None if prompt.mask is None else prompt.mask.mask)
        session = adapter.session(True, max(limits)).fork()
        adapter.check_room(session, prompt.lengths, limits)
    except ArgumentError as error:
        raise ArgumentError(f"assistant_model: expected one that reads and continues the prompt; {error}") from error
    if session.cache is None:
        raise ArgumentError("assistant_model: expected a model with caches, got none")
    rows, own = len(prompt.lengths), session.cache.batch
    if own not in (None, rows):
        raise ArgumentError(
            f"assistant_model: expected a conversation of {rows} rows, as input_ids has, got {own}; clear its cache"
        )
    return CachedDecoding(adapter, session, session.cache, replace(options, prompt_progress_callback=None))
