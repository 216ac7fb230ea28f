"""Generation defaults of a checkpoint: the values of its generation_config.json as options of `generate`."""

from os import PathLike
from typing import Any

from ..errors import ArgumentError, ConfigurationError
from ..generation.options import GenerationOptions
from ..generation.processors import is_finite
from ..generation.row_options import UNLIMITED_TOKENS
from .documents import Keys, as_int, read_object
from .folder import CONFIG, GENERATION, Folder, find_folder

# Keys that change the result and are not read from here, each with its neutral values. Null is always neutral. Stop
# strings need a tokenizer.
_ALWAYS: dict[str, tuple[object, ...]] = {
    "begin_suppress_tokens": ([],),
    "constraints": (),
    "dola_layers": (),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1.0,),
    "exponential_decay_length_penalty": (),
    "force_words_ids": (),
    "guidance_scale": (1.0,),
    "stop_strings": ([],),
    "suppress_tokens": ([],),
    "token_healing": (False,),
    "watermarking_config": (),
}
_GREEDY: dict[str, tuple[object, ...]] = {"penalty_alpha": (0.0,)}
_SAMPLING: dict[str, tuple[object, ...]] = {
    "epsilon_cutoff": (0.0, 1.0),
    "eta_cutoff": (0.0, 1.0),
    "top_h": (),
}
_BEAMS: dict[str, tuple[object, ...]] = {
    "diversity_penalty": (0.0,),
    "num_beam_groups": (1,),
}


OF_TRANSFORMERS = "default of transformers"
"""The source of an option whose key is missing in the file."""

_KEYS = {
    "stop_tokens": ("eos_token_id",),
    "pad_token": ("pad_token_id",),
    "min_new_tokens": ("min_new_tokens", "min_length"),
    "forced_bos_token_id": ("forced_bos_token_id", "force_bos_token_to_be_generated"),
}
"""Options whose keys have other names."""

_COUNTS = ("max_new_tokens", "max_length", "num_beams", "num_return_sequences")


def generation_defaults(path_or_name: str | PathLike[str], *, revision: str | None = None) -> dict[str, Any]:
    """The options of `generate` that a checkpoint recommends: `model.generate(ids, **generation_defaults(folder))`.

    The values are those of generation_config.json, or of config.json if there is no such file, with the semantics of
    transformers: tokens are sampled only if `do_sample` is true; the default of `temperature` is then 1 and that of
    `top_k` is 50. Options with a neutral value are left out. `max_new_tokens` or `max_length` is included only if the
    file has it. `early_stopping` of a beam search is False by default, as in transformers. `revision` is a branch, tag
    or commit of the Hub.

    Raises FileNotFoundError if there is no such checkpoint, FileFormatError for a file that is not a JSON object, and
    ConfigurationError, with the key and the file, for an invalid value and for a key that changes the result but is not
    read.
    """
    return {name: value for name, (value, _) in defaults_and_sources(path_or_name, revision=revision).items()}


def defaults_and_sources(
    path_or_name: str | PathLike[str], *, revision: str | None = None
) -> dict[str, tuple[Any, str]]:
    """The options that `generation_defaults` gives, each with its source: the file's name, or OF_TRANSFORMERS.

    Raises as `generation_defaults` does.
    """
    folder = find_folder(path_or_name, [CONFIG, GENERATION], revision=revision)
    file = folder.find(GENERATION) or folder.get(CONFIG)
    content = _normal(read_object(file))
    keys = Keys(content, file)
    samples, beams = keys.flag("do_sample", False), keys.whole("num_beams", 1)
    refused = _ALWAYS | (_SAMPLING if samples else _GREEDY) | (_BEAMS if beams > 1 else {})
    has_targets = _has_targets(folder)
    # It counts the prompt: one start token where there are targets, and any number of tokens elsewhere.
    refused |= {} if has_targets else {"min_length": (0,)}
    for key, neutral in refused.items():
        if key in keys and content[key] not in neutral:
            shown = " or ".join(map(str, (*neutral, None)))
            raise keys.refusal(key, f"{shown}, since it is no recommendation for generate(); give options of your own")
    lengths = _lengths(keys)
    options = lengths | _tokens(keys) | (_sampling(keys) if samples else {"temperature": 0.0})
    options |= _unless("repetition_penalty", keys.number("repetition_penalty", 1.0), 1.0)
    options |= _unless("no_repeat_ngram_size", keys.whole("no_repeat_ngram_size", 0, least=0), 0)
    options |= {key: content[key] for key in ("bad_words_ids", "sequence_bias") if key in keys}
    options |= _unless("min_new_tokens", _min_new_tokens(keys, has_targets), 0)
    options |= {"max_time": keys.number("max_time")} if "max_time" in keys else {}
    options |= _unless("num_return_sequences", keys.whole("num_return_sequences", 1), 1)
    options |= _beams(keys, content, beams) if beams > 1 else {}
    try:
        GenerationOptions(**(lengths or {"max_new_tokens": UNLIMITED_TOKENS}) | options)
    except ArgumentError as error:
        raise ConfigurationError(f"{file}: {error}") from error
    return {
        name: (value, file.name if any(key in keys for key in _KEYS.get(name, (name,))) else OF_TRANSFORMERS)
        for name, value in options.items()
    }


def _normal(content: dict[str, Any]) -> dict[str, Any]:
    """The content with counts as ints, and `do_sample` as a bool, where transformers takes 2.0, 0 and 1."""
    counts = {key: as_int(content[key]) for key in _COUNTS if key in content}
    samples = content.get("do_sample")
    return content | counts | ({"do_sample": bool(samples)} if type(samples) is int and samples in (0, 1) else {})


def _lengths(keys: Keys) -> dict[str, Any]:
    name = "max_new_tokens" if "max_new_tokens" in keys else "max_length"
    return {name: keys.whole(name)} if name in keys else {}


def _tokens(keys: Keys) -> dict[str, Any]:
    stop, pad = keys.tokens("eos_token_id"), keys.tokens("pad_token_id")[:1]
    options: dict[str, Any] = {"stop_tokens": stop} if stop else {}
    options |= {"pad_token": pad[0]} if pad else {}
    # In a config.json of the first BARTs; transformers ignores it elsewhere.
    begins = keys.file.name == CONFIG and keys.flag("force_bos_token_to_be_generated", False)
    first = keys.tokens("bos_token_id" if begins else "forced_bos_token_id")[:1]
    last = keys.tokens("forced_eos_token_id")
    options |= {"forced_bos_token_id": first[0]} if first else {}
    return options | ({"forced_eos_token_id": last} if last else {})


def _has_targets(folder: Folder) -> bool:
    """True for an encoder-decoder, whose tokens begin with a start token."""
    file = folder.find(CONFIG)
    return file is not None and Keys(read_object(file), file).flag("is_encoder_decoder", False)


def _min_new_tokens(keys: Keys, has_targets: bool) -> int:
    whole = keys.whole("min_length", 0, least=0) if has_targets else 0
    return keys.whole("min_new_tokens", max(whole - 1, 0), least=0)


def _sampling(keys: Keys) -> dict[str, Any]:
    options: dict[str, Any] = {"temperature": keys.number("temperature", 1.0)}
    options |= _unless("top_k", keys.whole("top_k", 50, least=0), 0)
    options |= _unless("top_p", min(keys.number("top_p", 1.0), 1.0), 1.0)
    options |= _unless("typical_p", min(keys.number("typical_p", 1.0), 1.0), 1.0)
    off = keys.is_value("min_p", 0) or keys.is_value("min_p", 0.0)
    return options if off else options | {"min_p": keys.number("min_p")}


def _beams(keys: Keys, content: dict[str, Any], beams: int) -> dict[str, Any]:
    penalty = content["length_penalty"] if "length_penalty" in keys else 1.0
    if not is_finite(penalty):
        raise keys.refusal("length_penalty", "a finite number")
    early = content["early_stopping"] if "early_stopping" in keys else False
    options = {"num_beams": beams} | _unless("length_penalty", penalty, 1.0) | _unless("early_stopping", early, "never")
    return options | _unless("renormalize_logits", keys.flag("renormalize_logits", False), False)


def _unless(name: str, value: object, neutral: object) -> dict[str, Any]:
    """The option, or nothing if its value is neutral."""
    return {} if value == neutral else {name: value}
