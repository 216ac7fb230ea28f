"""Names of generation options, and the option to use instead of a name from another library."""

from collections.abc import Mapping
from dataclasses import fields
from difflib import get_close_matches

from ..errors import ArgumentError
from .option_types import GenerationKeywords
from .options import GenerationOptions

NAMES_ELSEWHERE: Mapping[str, str] = {
    "do_sample": "temperature (0 takes the most probable token, a greater value samples)",
    "temp": "temperature",
    "eos_token_id": "stop_tokens, a list of ids",
    "stop_token_ids": "stop_tokens, a list of ids",
    "stop": "stop_strings, or stop_tokens, a list of ids",
    "pad_token_id": "pad_token",
    "bos_token_id": "input_ids that begin with this token",
    "decoder_start_token_id": "start_token to the configuration of the model",
    "max_tokens": "max_new_tokens",
    "n_predict": "max_new_tokens",
    "streamer": "stream() instead of generate(), which gives tokens one at a time",
    "stream": "stream() instead of generate(), which gives tokens one at a time",
    "logits_processor": "processors, a list",
    "logits_processors": "processors, a list",
    "encoder_no_repeat_ngram_size": "processors=[transformers.EncoderNoRepeatNGramLogitsProcessor(n, source_ids)]",
    "encoder_repetition_penalty": "processors=[transformers.EncoderRepetitionPenaltyLogitsProcessor(p, source_ids)]",
    "suppress_tokens": "processors=[transformers.SuppressTokensLogitsProcessor(ids)]",
    "begin_suppress_tokens": "processors=[transformers.SuppressTokensAtBeginLogitsProcessor(ids, length)]",
    "min_length": "processors=[transformers.MinLengthLogitsProcessor(...)]",
    "exponential_decay_length_penalty": "processors=[transformers.ExponentialDecayLengthPenalty(...)]",
    "top_h": "processors=[transformers.TopHLogitsWarper(h)]",
    "epsilon_cutoff": "processors=[transformers.EpsilonLogitsWarper(epsilon)]",
    "eta_cutoff": "processors=[transformers.EtaLogitsWarper(epsilon)]",
    "watermarking_config": "processors=[transformers.WatermarkLogitsProcessor(...)]",
    "return_scores": "it to generate(), whose tokens are all there at the end",
    "return_dict_in_generate": "return_scores=True to generate()",
    "output_scores": "return_scores=True to generate(), or a processor that keeps the scores it is called with",
    "output_logits": "a processor that keeps the scores it is called with",
    "output_attentions": "it to the model's forward",
    "output_hidden_states": "it to the model's forward",
    "repeat_penalty": "repetition_penalty",
    "logit_bias": "sequence_bias",
    "bad_words": "bad_words_ids, lists of ids",
    "typical": "typical_p",
    "xtc_probability": "processors=[XTC(probability, threshold)]",
    "xtc_threshold": "processors=[XTC(probability, threshold)]",
    "dry_multiplier": "processors=[DRY(multiplier, base, allowed_length)]",
    "dry_base": "processors=[DRY(multiplier, base, allowed_length)]",
    "dry_allowed_length": "processors=[DRY(multiplier, base, allowed_length)]",
    "dry_sequence_breakers": "processors=[DRY(multiplier, sequence_breakers=ids)]",
    "n": "num_return_sequences",
    "best_of": "num_beams",
    "draft_model": "assistant_model",
    "num_draft_tokens": "num_assistant_tokens",
    "num_speculative_tokens": "num_assistant_tokens",
    "beam_size": "num_beams",
    "past_key_values": "model.enable_cache(), after which the model keeps its conversation",
    "decoder_input_ids": "target_ids, which generate() of an encoder-decoder takes",
    "decoder_attention_mask": "target_mask, which generate() of an encoder-decoder takes",
    "target_ids": "input_ids, since only an encoder-decoder has a target beside its source",
    "max_cache_len": "it as max_length to model.enable_cache()",
    "cache_dtype": "it to model.enable_cache(), of which it is an option",
    "cache_budget": "it to model.enable_cache(), of which it is an option",
    "generation_config": "its entries as keywords",
    "inputs": "input_ids, the first argument",
    "mask": "attention_mask (of an encoder-decoder: source_mask)",
    "attention_mask": "source_mask",
}
"""Name of an option in other libraries: the option of this library that replaces it."""

NOWHERE_HERE = frozenset(
    {
        "assistant_confidence_threshold",
        "assistant_early_exit",
        "assistant_ensemble_weight",
        "assistant_lookbehind",
        "cache_config",
        "cache_implementation",
        "compile_config",
        "constraints",
        "continuous_batching_config",
        "custom_generate",
        "disable_compile",
        "diversity_penalty",
        "dola_layers",
        "force_words_ids",
        "guidance_scale",
        "is_assistant",
        "low_memory",
        "negative_prompt_attention_mask",
        "negative_prompt_ids",
        "num_assistant_tokens_schedule",
        "num_beam_groups",
        "penalty_alpha",
        "remove_invalid_values",
        "speculation_type",
        "synced_gpus",
        "target_lookbehind",
        "token_healing",
        "transformers_version",
        "use_model_defaults",
        "use_mtp",
    }
)
"""Options of transformers that have no counterpart here; an option with a similar name would do something else."""


OLD_NAME = "prefill_chunk"
"""A deprecated option, which `GenerationOptions` accepts and has no field of."""


def generation_options(keywords: GenerationKeywords) -> GenerationOptions:
    """The options of one call. Raises ArgumentError for an unknown name and for an invalid value."""
    known = [option.name for option in fields(GenerationOptions)]
    for name in keywords:
        if name in NOWHERE_HERE:
            raise ArgumentError(f"{name}: expected an option of generation, got one of transformers; leave it out")
        if name not in known and name != OLD_NAME:
            similar = [each for each in known if name in each] or get_close_matches(name, known, 1)
            instead = NAMES_ELSEWHERE.get(name) or " or ".join(similar) or f"one of {', '.join(known)}"
            raise ArgumentError(f"{name}: expected an option of generation, got an unknown name; give {instead}")
    return GenerationOptions(**keywords)
