"""Classifiers in config.json: names of labels, kind of loss, and families of encoders with a classification head."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, get_args

from ..models import ClassifierConfig, EncoderClassifier
from ..models.classification import ProblemType
from .documents import Keys
from .entries import Entry, Options
from .family import Family
from .limits import MAX_LABELS
from .names import Names

LABELS, NUMBER, PROBLEM = "id2label", "num_labels", "problem_type"


class _Labels(Entry):
    """Names of the classes by their indices; default: two of them, as in transformers."""

    def read(self, keys: Keys) -> Options:
        if LABELS not in keys:
            number = keys.whole(NUMBER, 2, most=MAX_LABELS)
            return {"labels": tuple(f"LABEL_{index}" for index in range(number))}
        names = keys.inner(LABELS)
        number = len(names.given)
        if set(names.given) != {str(index) for index in range(number)}:
            raise keys.refusal(LABELS, f"a name for each index from 0 to {number - 1}")
        if NUMBER in keys and keys.whole(NUMBER) != number:
            raise keys.refusal(NUMBER, f"{number}, as {LABELS} has so many names")
        return {"labels": tuple(names.text(str(index)) for index in range(number))}

    def write(self, options: Mapping[str, Any]) -> dict[str, Any]:
        labels = options["labels"]
        return {
            LABELS: {str(index): label for index, label in enumerate(labels)},
            "label2id": {label: index for index, label in enumerate(labels)},
        }

    @property
    def keys(self) -> Mapping[str, str]:
        return {"labels": LABELS}


class _Problem(Entry):
    """The kind of loss, or null."""

    def read(self, keys: Keys) -> Options:
        words = {word: word for word in get_args(ProblemType)}
        return {PROBLEM: keys.word(PROBLEM, words) if PROBLEM in keys else None}

    def write(self, options: Mapping[str, Any]) -> dict[str, Any]:
        return {PROBLEM: options[PROBLEM]}


def classifier(encoder: Family, architecture: str, head: Names, *entries: Entry) -> Family:
    """The family of an architecture with a classification head, on the encoders of a family.

    `head`: the names of the head's modules. `entries`: those of its options.
    """
    return replace(
        encoder,
        architecture=architecture,
        config=ClassifierConfig,
        model=EncoderClassifier,
        entries=(*encoder.entries, _Labels(), _Problem(), *entries),
        names={**{f"encoder.{ours}": name for ours, name in encoder.names.items()}, **head},
        other_architectures=(),
        applies=lambda keys: keys.names("architectures") == [architecture],
    )
