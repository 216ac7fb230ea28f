"""Sentence encoders: texts to vectors that can be compared, and folders of sentence-transformers."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from os import PathLike
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention import Attention
from ..errors import ArgumentError, CacheStateError, shown
from ..models import DecoderOnlyTransformer, EncoderTransformer, ModelOutput, pooled
from ..models.pooling import PoolingKind
from .folder import find_folder
from .load import FILES, load_model
from .sentence_files import SENTENCE_FILES, read_sentence_options
from .text_batch import checked_texts, encoded, padded
from .tokenizer import TOKENIZER_FILES, Tokenizer, load_tokenizer


class SentenceEncoder(nn.Module):
    """Sentence encoder: one vector per text, pooled from a model's states (Sentence-BERT, arXiv 1908.10084).

    Args:
        model: an `EncoderTransformer`, or a `DecoderOnlyTransformer`, best without a head (`has_head=False`), which is
            not used.
        tokenizer: the tokenizer of `encode`.
        pooling: "cls", "mean" or "last": the first token's state, the mean of all, or the last token's.
        normalize: whether vectors have length 1, so that their dot product is the cosine.
        max_length: most tokens of a text in `encode`, which cuts longer ones; None: as many as the model has positions.
        lowercase: whether `encode` reads texts in lower case.
        prompts: texts that are put before a text, by name; `default_prompt` is the name of the one that is put there
            where a call names none.

    Raises ArgumentError, naming the argument, for what does not fit.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        *,
        pooling: PoolingKind = "mean",
        normalize: bool = False,
        max_length: int | None = None,
        lowercase: bool = False,
        prompts: Mapping[str, str] | None = None,
        default_prompt: str | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(model, EncoderTransformer | DecoderOnlyTransformer):
            raise ArgumentError(
                f"model: expected an EncoderTransformer or a DecoderOnlyTransformer, got {type(model).__name__}"
            )
        if not isinstance(tokenizer, Tokenizer):
            raise ArgumentError(f"tokenizer: expected one of load_tokenizer, got {type(tokenizer).__name__}")
        if pooling not in get_args(PoolingKind):
            raise ArgumentError(f"pooling: expected one of {get_args(PoolingKind)}, got {shown(pooling)}")
        if max_length is not None and (type(max_length) is not int or max_length < 1):
            raise ArgumentError(f"max_length: expected None or a whole number of at least 1, got {shown(max_length)}")
        self.model = model
        self.tokenizer = tokenizer
        self.pooling = pooling
        self.normalize = normalize
        limits = [each for each in (max_length, model.positions.positions_limit) if each is not None]
        self.max_length = min(limits, default=None)
        self.lowercase = lowercase
        self.prompts = dict(prompts or {})
        self.default_prompt = default_prompt
        self._prompt(default_prompt)
        # With a head the forward gives logits, and states only beside them.
        headed = isinstance(model, DecoderOnlyTransformer) and model.head is not None
        self._asked: dict[str, Any] = {"output_hidden_states": True, "logits_to_keep": 1} if headed else {}

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Vectors [B, E] of `input_ids` int64 [B, L]; `attention_mask` [B, L] is true for real tokens.

        Gradients flow, for training. Raises what the model's forward raises, and CacheStateError with caches on.
        """
        if any(isinstance(each, Attention) and each.use_kv_cache for each in self.model.modules()):
            raise CacheStateError(
                "model: expected caches off, as each text is read alone, got caches on; call model.disable_cache()"
            )
        read = self.model(input_ids, attention_mask, **self._asked)
        states = read.last_hidden_state if isinstance(read, ModelOutput) else read
        vectors = pooled(states, attention_mask, self.pooling)
        return F.normalize(vectors, dim=-1) if self.normalize else vectors

    @torch.no_grad()
    def encode(self, texts: str | Sequence[str], *, prompt: str | None = None, batch_size: int = 32) -> Tensor:
        """A vector [E] of one text, or vectors [N, E] of several, without gradients.

        Texts of similar length are read together, `batch_size` at a time. `prompt` is a name in `prompts`.

        Raises ArgumentError for anything else than texts, an unknown prompt, and a `batch_size` below 1.
        """
        if isinstance(texts, str):
            return self.encode([texts], prompt=prompt, batch_size=batch_size)[0]
        if type(batch_size) is not int or batch_size < 1:
            raise ArgumentError(f"batch_size: expected a whole number of at least 1, got {shown(batch_size)}")
        before = self._prompt(self.default_prompt if prompt is None else prompt)
        rows = [self._tokens(before + text) for text in checked_texts(texts)]
        order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
        weight = next(self.model.parameters())
        vectors = weight.new_empty(len(rows), self.model.config.d_model)
        for first in range(0, len(order), batch_size):
            chosen = order[first : first + batch_size]
            ids, mask = (each.to(weight.device) for each in padded([rows[index] for index in chosen]))
            vectors[chosen] = self(ids, None if bool(mask.all()) else mask)
        return vectors

    def _tokens(self, text: str) -> list[int]:
        return encoded(self.tokenizer.encode, text.lower() if self.lowercase else text, self.max_length)

    def _prompt(self, name: str | None) -> str:
        if name is not None and name not in self.prompts:
            known = f"None or one of {sorted(self.prompts)}" if self.prompts else "None, as this encoder has no prompts"
            raise ArgumentError(f"prompt: expected {known}, got {shown(name)}")
        return "" if name is None else self.prompts[name]


def load_sentence_encoder(
    path_or_name: str | PathLike[str],
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    *,
    revision: str | None = None,
) -> SentenceEncoder:
    """The sentence encoder in a folder of sentence-transformers, or of a name on the Hub, in `eval()` mode.

    `encode` gives the vectors of its `SentenceTransformer.encode`: a model, pooling by CLS, mean or last token, and
    normalisation; also its prompts and its longest text. A decoder has no head then. The arguments are those of
    `load_model`.

    Raises what `load_model` and `load_tokenizer` raise, and ConfigurationError, with the key and the file, for other
    modules and for options that would give other vectors.
    """
    folder = find_folder(path_or_name, (*SENTENCE_FILES, *FILES, *TOKENIZER_FILES), revision=revision)
    options = read_sentence_options(folder)
    model = load_model(options.folder, dtype, device)
    options.check_width(model.config.d_model)
    if isinstance(model, DecoderOnlyTransformer) and model.head is not None:
        model.head, model.config = None, replace(model.config, has_head=False)
    keywords: dict[str, Any] = options.keywords
    return SentenceEncoder(model, load_tokenizer(options.folder), **keywords).eval()
