"""Classification with an encoder: its configuration, the head, and the loss of its logits."""

from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..blocks import ACTIVATIONS
from ..errors import ArgumentError, ConfigurationError, DtypeError, ShapeError, shown
from ..initialization import reset_children
from ..kernels import project
from .config import EncoderConfig
from .layers import norm_maker
from .loss import IGNORED
from .pooling import PoolingKind

ProblemType = Literal["regression", "single_label_classification", "multi_label_classification"]

SINGLE_LABEL: ProblemType = "single_label_classification"

HEAD_ACTIVATIONS = {**ACTIVATIONS, "tanh": torch.tanh}


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig(EncoderConfig):
    """An encoder with a classification head: the options of `EncoderConfig`, and those of the head.

    `labels`: the names of the classes, in the order of the logits. `pooling`: how a row becomes one vector ("cls",
    "mean", "last"); None: every token is classified. `head_activation`: of a layer of width `d_model` before the
    logits, with a bias if `dense_bias` and a norm after it if `head_norm`; None: no such layer. `problem_type`: the
    loss of `labels=`; None: by the number of classes and the dtype of the labels, as in transformers.

    Raises ConfigurationError, naming the field, for anything that cannot work.
    """

    labels: tuple[str, ...] = ("LABEL_0", "LABEL_1")
    pooling: PoolingKind | None = "cls"
    head_activation: str | None = None
    dense_bias: bool = True
    head_norm: bool = False
    problem_type: ProblemType | None = None

    def check(self) -> None:
        super().check()
        labels: object = self.labels
        if not (isinstance(labels, tuple) and labels and all(isinstance(label, str) for label in labels)):
            raise ConfigurationError(f"labels: expected a tuple of names, at least one, got {shown(labels)}")
        for name, words in (
            ("pooling", get_args(PoolingKind)),
            ("head_activation", tuple(HEAD_ACTIVATIONS)),
            ("problem_type", get_args(ProblemType)),
        ):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, str) and value in words):
                raise ConfigurationError(f"{name}: expected None or one of {words}, got {shown(value)}")
        if self.head_norm and self.head_activation is None:
            raise ConfigurationError("head_norm: expected False without a head_activation, got True")

    @property
    def id2label(self) -> dict[int, str]:
        """The name of each class by its index in the logits."""
        return dict(enumerate(self.labels))

    def encoder_config(self) -> EncoderConfig:
        """The configuration of the encoder alone."""
        return EncoderConfig(**{each.name: getattr(self, each.name) for each in fields(EncoderConfig)})


class ClassificationHead(nn.Module):
    """Classification head: vectors [..., E] to logits [..., N], by `proj(norm(activation(dense(x))))`, or `proj(x)`.

    In training, dropout acts on the input of `proj`.
    """

    token_wise = True

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        width, inner = config.d_model, config.head_activation
        self.dense = None if inner is None else nn.Linear(width, width, config.dense_bias)
        self.norm = norm_maker(config)(width) if config.head_norm else None
        self.proj = nn.Linear(width, len(config.labels))
        self.activation = None if inner is None else HEAD_ACTIVATIONS[inner]
        self.dropout = config.dropout

    def forward(self, x: Tensor) -> Tensor:
        """`x` [..., E] to [..., N]."""
        if self.dense is not None and self.activation is not None:
            x = self.activation(project(self.dense, x))
        if self.norm is not None:
            x = self.norm(x)
        if self.dropout and self.training:
            x = F.dropout(x, self.dropout)
        return project(self.proj, x)

    def reset_parameters(self) -> None:
        """Initialises the layers and the norm."""
        reset_children(self)


def classification_loss(logits: Tensor, labels: Tensor, problem_type: ProblemType | None = None) -> Tensor:
    """Mean loss of logits [..., N], a number, computed in at least float32.

    "single_label_classification": cross-entropy of `labels` int64 [...], of which -100 does not count.
    "multi_label_classification": binary cross-entropy of `labels` [..., N], floats. "regression": squared error of
    `labels` [..., N], or [...] where N is 1. None: regression where N is 1, else by the dtype of the labels.

    Raises ArgumentError, ShapeError or DtypeError for labels that do not fit.
    """
    number, labels = logits.shape[-1], checked_tensor(labels)
    if problem_type is None:
        several: ProblemType = "multi_label_classification" if labels.is_floating_point() else SINGLE_LABEL
        problem_type = "regression" if number == 1 else several
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if problem_type != SINGLE_LABEL:
        wanted = [list(logits.shape)] + ([list(logits.shape[:-1])] if number == 1 else [])
        if list(labels.shape) not in wanted:
            raise ShapeError(f"labels: expected {' or '.join(map(str, wanted))}, got {list(labels.shape)}")
        loss: Any = F.mse_loss if problem_type == "regression" else F.binary_cross_entropy_with_logits
        result: Tensor = loss(logits, labels.to(logits.dtype).view_as(logits))
        return result
    if labels.shape != logits.shape[:-1]:
        raise ShapeError(f"labels: expected {list(logits.shape[:-1])}, got {list(labels.shape)}")
    if labels.dtype not in (torch.int64, torch.int32):
        raise DtypeError(f"labels: expected int64, the index of a class, got {labels.dtype}")
    try:
        return F.cross_entropy(logits.reshape(-1, number), labels.long().flatten(), ignore_index=IGNORED)
    except IndexError as error:
        raise ArgumentError(
            f"labels: expected indices from 0 to {number - 1}, or {IGNORED} where none counts, got {labels.min()} to "
            f"{labels.max()}"
        ) from error


def checked_tensor(labels: Tensor) -> Tensor:
    """The labels. Raises ArgumentError unless they are a tensor."""
    given: object = labels
    if not isinstance(given, Tensor):
        raise ArgumentError(f"labels: expected a tensor, got {type(given).__name__}")
    return labels
