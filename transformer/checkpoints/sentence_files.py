"""Files of sentence-transformers beside a model: its modules, pooling, longest text and prompts."""

from pathlib import Path
from typing import Any, NamedTuple

from ..errors import ConfigurationError, FileFormatError
from .documents import Keys, read_object, read_objects
from .folder import CONFIG, Folder
from .limits import MAX_COUNT
from .special_tokens import TOKENIZER_CONFIG

MODULES, PROMPTS = "modules.json", "config_sentence_transformers.json"
OPTIONS = tuple(
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
"""Names of the file of the first module, of which old folders have one by their kind of model."""

SENTENCE_FILES = (MODULES, PROMPTS, *OPTIONS, "*_Pooling/config.json", "*_Normalize/config.json")
"""Patterns of files that are fetched from the Hub."""

POOLINGS = {"cls": "cls", "mean": "mean", "lasttoken": "last"}
"""Words of pooling, each with that of this library."""
_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "lasttoken",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
}
"""Flags of older files, each with the word."""

_STATES = {"transformer_task": "feature-extraction", "module_output_name": "token_embeddings"}
_OF_NORM = ("module_input_name", "module_output_name")
_UNALTERED = ("query_length", "document_length", "query_expansion", "processing_kwargs")


class SentenceOptions(NamedTuple):
    """The folder of the model, the keyword arguments of a `SentenceEncoder`, and the file and width of its pooling."""

    folder: Path
    keywords: dict[str, Any]
    pooling: Keys

    def check_width(self, width: int) -> None:
        """Raises ConfigurationError, with the key and the file, unless the pooled states have the model's width."""
        for key in ("embedding_dimension", "word_embedding_dimension"):
            if key in self.pooling and self.pooling.whole(key) != width:
                raise self.pooling.refusal(key, f"{width}, the width of the model")


def read_sentence_options(folder: Folder) -> SentenceOptions:
    """What the files say about sentences.

    Raises FileFormatError for a folder that is not of sentence-transformers, and ConfigurationError, with the key and
    the file, for other modules and for options that would give other vectors.
    """
    file = folder.find(MODULES)
    if file is None:
        raise FileFormatError(
            f"{folder.path}: expected a folder with {MODULES}, as sentence-transformers writes it, got none; "
            "for another model: SentenceEncoder(load_model(folder), load_tokenizer(folder), pooling=...)"
        )
    modules = [Keys(each, file, f"[{index}].") for index, each in enumerate(read_objects(file))]
    kinds = [module.text("type").rpartition(".")[2] for module in modules]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise ConfigurationError(
            f"{file}, type: expected Transformer and Pooling, then Normalize or nothing, got {', '.join(kinds)}"
        )
    inner = [folder.subfolder(module.text("path")) for module in modules]
    options = _first(inner[0], *OPTIONS)
    pooling = _first(inner[1], CONFIG)
    if len(inner) == 3:
        _check_values(_first(inner[2], CONFIG), dict.fromkeys(_OF_NORM, "sentence_embedding"))
    prompts = _first(folder, PROMPTS)
    _check_values(prompts, {"model_type": "SentenceTransformer"})
    _check_values(options, _STATES)
    _check_values(
        options.inner("modality_config").inner("text"),
        {"method": "forward", "method_output_name": "last_hidden_state"},
    )
    for key in _UNALTERED:
        if not options.is_empty(key):
            raise options.refusal(key, "no such key, as texts are read as they are")
    texts = prompts.inner("prompts")
    keywords = {
        "pooling": _pooling(pooling),
        "normalize": len(inner) == 3,
        "max_length": _max_length(options, _first(inner[0], TOKENIZER_CONFIG)),
        "lowercase": options.flag("do_lower_case", False),
        "prompts": {name: texts.text(name) for name in texts.given if name in texts},
        "default_prompt": prompts.text("default_prompt_name") if "default_prompt_name" in prompts else None,
    }
    return SentenceOptions(inner[0].path, keywords, pooling)


def _first(folder: Folder, *names: str) -> Keys:
    """The first of these files that there is; no keys if there is none."""
    for name in names:
        file = folder.find(name)
        if file is not None:
            return Keys(read_object(file), file)
    return Keys({}, folder.path / names[0])


def _check_values(keys: Keys, values: dict[str, str]) -> None:
    for key, value in values.items():
        if not keys.is_value(key, value):
            raise keys.refusal(key, f"{value!r}, as other modules of sentence-transformers are not supported")


def _pooling(keys: Keys) -> str:
    if not keys.is_value("include_prompt", True):
        raise keys.refusal("include_prompt", "true, as a prompt is a part of the text here")
    if "pooling_mode" in keys:
        return keys.word("pooling_mode", POOLINGS)
    words = [word for key, word in _FLAGS.items() if keys.flag(key, False)] or ["mean"]
    if len(words) > 1 or words[0] not in POOLINGS:
        key = next(key for key, word in _FLAGS.items() if word == words[-1])
        raise keys.refusal(key, f"false, as pooling is one of {sorted(POOLINGS)} here")
    return POOLINGS[words[0]]


def _max_length(options: Keys, tokenizer: Keys) -> int | None:
    """Most tokens of a text: of the module's options, else of its tokenizer, which has 1e30 for no limit."""
    if "max_seq_length" in options:
        return options.whole("max_seq_length")
    length = tokenizer.number("model_max_length") if "model_max_length" in tokenizer else MAX_COUNT
    return int(length) if 1 <= length < MAX_COUNT else None
