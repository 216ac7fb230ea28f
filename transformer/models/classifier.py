"""Encoder with a classification head: a class for each row, or for each token."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor
from typing_extensions import Self

from ..errors import ArgumentError
from ..initialization import reset_children
from ..signatures import configured_by, typed_as
from .classification import (
    SINGLE_LABEL,
    ClassificationHead,
    ClassifierConfig,
    checked_tensor,
    classification_loss,
)
from .encoder import EncoderTransformer
from .loss import real_labels
from .outputs import ModelOutput
from .pooling import pooled
from .signatures import classifier_call
from .tied import TiedModel
from .wrappers import check_unused


class EncoderClassifier(TiedModel):
    """Encoder with a classification head: token ids to logits of classes, of each row or of each token.

    `encoder` is an `EncoderTransformer`, `head` a `ClassificationHead`; `config.labels` names the classes.

    Args:
        vocab_size, d_model, num_heads, d_ff, num_layers: as of `EncoderTransformer`.
        options: those of `ClassifierConfig`, such as `labels=("negative", "positive")`.

    `from_encoder` puts a new head on an encoder that exists. Raises ConfigurationError, naming the option, for what
    cannot work.
    """

    @configured_by(ClassifierConfig)
    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = EncoderTransformer.from_config(config.encoder_config())
        self.head = ClassificationHead(config)

    @classmethod
    def from_config(cls, config: ClassifierConfig) -> "EncoderClassifier":
        """A new model of that configuration."""
        return cls(**config.to_dict())

    @classmethod
    def from_encoder(cls, encoder: EncoderTransformer, **options: Any) -> "EncoderClassifier":
        """A classifier that is to be trained: a new head on `encoder`, which becomes its part; nothing is copied.

        `options` are those of `ClassifierConfig` for the head: `labels`, `pooling`, `head_activation`, ... The head has
        the dtype and device of the encoder. Raises ArgumentError for anything else than an `EncoderTransformer`.
        """
        if not isinstance(encoder, EncoderTransformer):
            raise ArgumentError(f"encoder: expected an EncoderTransformer, got {type(encoder).__name__}")
        model = cls.__new__(cls)
        TiedModel.__init__(model)
        model.config = ClassifierConfig(**encoder.config.to_dict() | options)
        model.encoder = encoder
        weight = next(encoder.parameters())
        model.head = ClassificationHead(model.config).to(weight.device, weight.dtype)
        return model

    @typed_as(classifier_call)
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **unused: None,
    ) -> Tensor | ModelOutput:
        """Logits [B, N] of `input_ids` int64 [B, L]; [B, L, N] with `pooling=None`, undefined at padding.

        Args:
            attention_mask, token_type_ids, output_attentions, output_hidden_states: as in the encoder's forward.
            labels: int64 [B], or [B, L] with `pooling=None`, where -100 and padding do not count; of rows also floats,
                as `classification_loss` says. The result is a `ModelOutput` with `loss`.
            unused: names that transformers' models take and this one does not: None each.

        Raises what the encoder's forward raises, and ArgumentError, ShapeError or DtypeError for wrong labels.
        """
        check_unused(unused)
        asked: dict[str, Any] = {"output_attentions": output_attentions, "output_hidden_states": output_hidden_states}
        read: Any = self.encoder(input_ids, attention_mask, token_type_ids, **asked)
        kept: ModelOutput = read if isinstance(read, ModelOutput) else ModelOutput(None, read)
        states, kind = kept.last_hidden_state, self.config.pooling
        logits: Tensor = self.head(states if kind is None else pooled(states, attention_mask, kind))
        if labels is None:
            return logits if kept is not read else kept._replace(logits=logits)
        problem = self.config.problem_type
        if kind is None:
            labels, problem = (
                real_labels(checked_tensor(labels), states, "attention_mask", attention_mask),
                SINGLE_LABEL,
            )
        return kept._replace(logits=logits, loss=classification_loss(logits, labels, problem))

    def resize_token_embeddings(self, vocab_size: int) -> Self:
        """Changes the number of tokens, of the embedding and of `config.vocab_size`, as in an encoder."""
        self.encoder.resize_token_embeddings(vocab_size)
        self.config = replace(self.config, vocab_size=vocab_size)
        return self

    def reset_parameters(self) -> None:
        """Initialises all parameters again, as in a new model; for use after `to_empty()`."""
        reset_children(self)

    if TYPE_CHECKING:

        @typed_as(forward)
        def __call__(self, *arguments: Any, **keywords: Any) -> Any: ...
