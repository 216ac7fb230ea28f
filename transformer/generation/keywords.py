"""Names of generation options, and the option to use instead of a name from another library."""

from collections.abc import Mapping
from dataclasses import fields
from difflib import get_close_matches

from ..errors import ArgumentError
from .options import GenerationKeywords, GenerationOptions

NAMES_ELSEWHERE: Mapping[str, str] = {
    "do_sample": "temperature (0 takes the most probable token, a greater value samples)",
    "temp": "temperature",
    "eos_token_id": "stop_tokens, a list of ids",
    "stop_token_ids": "stop_tokens, a list of ids",
    "stop": "stop_tokens or stop_sequences, lists of ids",
    "stop_strings": "stop_sequences, lists of ids",
    "stopping_criteria": "stop_tokens or stop_sequences, or end the loop over a stream",
    "pad_token_id": "pad_token",
    "max_tokens": "max_new_tokens",
    "n_predict": "max_new_tokens",
    "streamer": "stream() instead of generate(), which gives tokens one at a time",
    "stream": "stream() instead of generate(), which gives tokens one at a time",
    "logits_processor": "processors, a list",
    "logits_processors": "processors, a list",
    "no_repeat_ngram_size": "processors=[transformers.NoRepeatNGramLogitsProcessor(n)]",
    "bad_words_ids": "processors=[transformers.NoBadWordsLogitsProcessor(...)]",
    "suppress_tokens": "processors=[transformers.SuppressTokensLogitsProcessor(ids)]",
    "min_length": "processors=[transformers.MinLengthLogitsProcessor(...)]",
    "min_new_tokens": "processors=[transformers.MinNewTokensLengthLogitsProcessor(...)]",
    "prefix_allowed_tokens_fn": "processors=[transformers.PrefixConstrainedLogitsProcessor(...)]",
    "typical_p": "processors=[transformers.TypicalLogitsWarper(p)]",
    "repeat_penalty": "repetition_penalty",
    "n": "num_return_sequences",
    "best_of": "num_beams",
    "beam_size": "num_beams",
    "seed": "generator=torch.Generator().manual_seed(seed)",
    "prefill_chunk_size": "prefill_chunk",
    "past_key_values": "model.enable_cache(), after which the model keeps its conversation",
    "generation_config": "its entries as keywords",
    "mask": "attention_mask (of an encoder-decoder: source_mask)",
    "attention_mask": "source_mask",
}
"""Name of an option in other libraries: the option of this library that replaces it."""


def generation_options(keywords: GenerationKeywords) -> GenerationOptions:
    """The options of one call. Raises ArgumentError for an unknown name and for an invalid value."""
    known = [option.name for option in fields(GenerationOptions)]
    for name in keywords:
        if name not in known:
            similar = get_close_matches(name, known, 1)
            instead = NAMES_ELSEWHERE.get(name) or (similar[0] if similar else f"one of {', '.join(known)}")
            raise ArgumentError(f"{name}: expected an option of generation, got an unknown name; give {instead}")
    return GenerationOptions(**keywords)
