"""RoBERTa (arXiv 1907.11692) and XLM-RoBERTa (arXiv 1911.02116): BERT with another table of positions.

Positions are counted over the real tokens of a row, as everywhere in this library, and padding is what `attention_mask`
says. Transformers takes each `pad_token_id` for padding here, with or without a mask.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ...models import EncoderConfig, EncoderTransformer
from ..classifiers import classifier
from ..documents import Keys
from ..entries import Entry, Fixed, Options
from ..family import PAD, STOP, Family
from .bert import ENTRIES, bert_names, not_needed

_LENGTH = "max_position_embeddings"


class _Positions(Entry):
    """Rows of the table of positions: the first real token has the row after that of the padding token."""

    def read(self, keys: Keys) -> Options:
        rows, first = keys.whole(_LENGTH, 512), keys.whole(PAD, keys.missing(PAD, 1), least=0) + 1
        if rows <= first:
            raise keys.refusal(_LENGTH, f"more rows than {PAD} + 1 = {first}, which no token takes")
        return {"max_length": rows - first, "position_offset": first}

    def write(self, options: Mapping[str, Any]) -> dict[str, Any]:
        return {_LENGTH: (options["max_length"] or 0) + options["position_offset"]}

    @property
    def keys(self) -> Mapping[str, str]:
        return {"max_length": _LENGTH, "position_offset": PAD}


ROBERTA = Family(
    model_type="roberta",
    architecture="RobertaModel",
    config=EncoderConfig,
    model=EncoderTransformer,
    entries=(_Positions(), *ENTRIES),
    names=bert_names("roberta"),
    base="roberta.",
    tokens={STOP: 2, PAD: 1},
    other_architectures=("RobertaForMaskedLM",),
    ignored=(
        *not_needed("roberta"),
        "lm_head.bias",
        "lm_head.dense.weight",
        "lm_head.dense.bias",
        "lm_head.layer_norm.weight",
        "lm_head.layer_norm.bias",
        "lm_head.decoder.weight",
        "lm_head.decoder.bias",
    ),
)
XLM_ROBERTA = replace(
    ROBERTA,
    model_type="xlm-roberta",
    architecture="XLMRobertaModel",
    other_architectures=("XLMRobertaForMaskedLM",),
)


def _classifiers(encoder: Family) -> tuple[Family, Family]:
    """The families of classifiers of rows and of tokens."""
    name = encoder.architecture.removesuffix("Model")
    rows = {"head.dense": "classifier.dense", "head.proj": "classifier.out_proj"}
    return (
        classifier(encoder, f"{name}ForSequenceClassification", rows, Fixed(pooling="cls", head_activation="tanh")),
        classifier(encoder, f"{name}ForTokenClassification", {"head.proj": "classifier"}, Fixed(pooling=None)),
    )


ROBERTA_CLASSIFIERS = (*_classifiers(ROBERTA), *_classifiers(XLM_ROBERTA))
