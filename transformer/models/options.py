"""Options that all kinds of models share: the four parts of a configuration, and what belongs to none of them."""

from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, TypeVar

from typing_extensions import Self

from ..blocks.residual import ResidualKind, check_residual
from ..errors import ConfigurationError, require_count, require_number, shown
from ..generation import GenerationKeywords
from .parts import AttentionConfig, ConfigPart, ContextConfig, FeedForwardConfig, NormConfig, PositionConfig

PARTS = AttentionConfig, PositionConfig, NormConfig, FeedForwardConfig

PartT = TypeVar("PartT", bound=ConfigPart)


@dataclass(frozen=True, kw_only=True)
class ModelOptions(ContextConfig):
    """Options of every model, whatever its layers are.

    `tied_embeddings`: the head's weight is the embedding's table. Generation ends rows with `stop_tokens` and fills
    them with `pad_token` where a call gives no others.
    """

    tied_embeddings: bool = True
    stop_tokens: tuple[int, ...] = ()
    pad_token: int | None = None

    model_type: ClassVar[str] = "modular_attention"
    """Read by wrappers of transformers' models; no field."""

    def check(self) -> None:
        super().check()
        ids = self.stop_tokens if type(self.stop_tokens) is tuple else (None,)
        ids = ids if self.pad_token is None else (*ids, self.pad_token)
        if not all(type(token) is int and token >= 0 for token in ids):
            raise ConfigurationError(
                "stop_tokens, pad_token: expected a tuple of ids from 0 on and an id or None, got "
                f"{shown(self.stop_tokens)} and {shown(self.pad_token)}"
            )

    def generating(self, options: GenerationKeywords) -> GenerationKeywords:
        """The options of a generation, with the model's own stop and pad tokens where they give no others."""
        return {"stop_tokens": self.stop_tokens, "pad_token": self.pad_token, **options}


# Dataclasses take the fields of their bases from the last base to the first: attention comes first.
@dataclass(frozen=True, kw_only=True)
class LayerOptions(ModelOptions, FeedForwardConfig, NormConfig, PositionConfig, AttentionConfig):
    """Options that all kinds of models share, each with a default: those of the four parts, and some more.

    `dropout` is that of attention weights, of branches and of embeddings. What a branch adds to the stream is
    multiplied by `residual_scale`, and rows of the embedding's table by `embedding_scale`; `embedding_norm` is a norm
    of the input of the first block, after added positions. Logits are multiplied by `logit_scale`, get the head's bias
    where there is a `head_bias`, and are then capped by `logit_softcap`. `residual`: whether the feed-forward network
    reads the sum after the attention ("sequential"), or both read the same stream, through two norms ("parallel") or
    through one ("parallel_one_norm"). The others are those of `ModelOptions`.
    """

    residual: ResidualKind = "sequential"
    dropout: float = 0.0
    residual_scale: float = 1.0
    embedding_scale: float = 1.0
    embedding_norm: bool = False
    head_bias: bool = False
    logit_scale: float = 1.0
    logit_softcap: float | None = None

    def check(self) -> None:
        super().check()
        check_residual(self.residual, self.norm_placement)
        require_number("dropout", self.dropout, least=0.0, below=1.0)
        self._check_positive("residual_scale", "embedding_scale", "logit_scale")
        self._check_positive("logit_softcap", or_none=True)

    def part(self, kind: type[PartT]) -> PartT:
        """One of the parts by itself: `config.part(NormConfig)`."""
        return kind(**{each.name: getattr(self, each.name) for each in fields(kind)})

    def with_parts(self, *parts: ConfigPart) -> Self:
        """A copy with all options of these parts. Raises ConfigurationError for anything else than a part."""
        options: dict[str, Any] = {}
        for part in parts:
            if type(part) not in PARTS:
                expected = ", ".join(kind.__name__ for kind in PARTS)
                raise ConfigurationError(f"parts: expected values of {expected}, got {type(part).__name__}")
            options |= part.to_dict()
        return replace(self, **options)


@dataclass(frozen=True)
class OneVocabulary(ModelOptions):
    """A model whose tokens are all of one vocabulary."""

    vocab_size: int

    def check(self) -> None:
        super().check()
        require_count("vocab_size", self.vocab_size)


@dataclass(frozen=True)
class TwoVocabularies(LayerOptions):
    """A model with a vocabulary of sources and one of targets. `src_vocab_size=None`: sources come as vectors."""

    src_vocab_size: int | None
    tgt_vocab_size: int

    def check(self) -> None:
        super().check()
        self._check_given("src_vocab_size")
        require_count("tgt_vocab_size", self.tgt_vocab_size)
