"""BERT (arXiv 1810.04805), and sentence encoders with the same architecture.

The pooler and the pretraining heads of published checkpoints are ignored, because the encoder does not need them. Other
heads are refused, unless a family of classifiers reads them.
"""

from ...models import EncoderConfig, EncoderTransformer
from ..classifiers import classifier
from ..entries import UNALTERED, Entry, Fixed, Number, Only, Whole, Word
from ..family import PAD, Family
from ..limits import MAX_CHECKPOINT_LAYERS, MAX_HEADS
from ..names import Names

ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}

_NEXT_SENTENCE = ("cls.seq_relationship.weight", "cls.seq_relationship.bias")

AFTER = Fixed(
    attention_bias=True,
    position="learned",
    norm="layer",
    norm_placement="after",
    feed_forward="plain",
    feed_forward_bias=True,
    embedding_norm=True,
)
"""What all encoders of this kind have: learned positions, and norms after each sum."""

BIDIRECTIONAL: tuple[Entry, ...] = (Only("is_decoder", False), Only("is_causal", False), *UNALTERED)

ENTRIES: tuple[Entry, ...] = (
    Whole("vocab_size", "vocab_size"),
    Whole("d_model", "hidden_size"),
    Whole("d_ff", "intermediate_size"),
    Whole("num_layers", "num_hidden_layers", most=MAX_CHECKPOINT_LAYERS),
    Whole("num_heads", "num_attention_heads", most=MAX_HEADS),
    Whole("num_token_types", "type_vocab_size", 2),
    Number("norm_eps", "layer_norm_eps", 1e-12),
    Word("activation", "hidden_act", ACTIVATIONS, "gelu"),
    Only("position_embedding_type", "absolute"),
    *BIDIRECTIONAL,
    AFTER,
)
"""Entries of families with the keys of BERT, without that of positions."""


def bert_names(base: str) -> Names:
    """The names of families with the modules of BERT, whose names begin with `base`."""
    ours, layer = "encoder.blocks.{}", f"{base}.encoder.layer.{{}}"
    return {
        "embedding.tokens": f"{base}.embeddings.word_embeddings",
        "token_types.tokens": f"{base}.embeddings.token_type_embeddings",
        "positions.positions.embedding": f"{base}.embeddings.position_embeddings",
        "positions.norm": f"{base}.embeddings.LayerNorm",
        f"{ours}.attention.q_proj": f"{layer}.attention.self.query",
        f"{ours}.attention.k_proj": f"{layer}.attention.self.key",
        f"{ours}.attention.v_proj": f"{layer}.attention.self.value",
        f"{ours}.attention.out_proj": f"{layer}.attention.output.dense",
        f"{ours}.attention_residual.norm_after": f"{layer}.attention.output.LayerNorm",
        f"{ours}.feed_forward.up_proj": f"{layer}.intermediate.dense",
        f"{ours}.feed_forward.down_proj": f"{layer}.output.dense",
        f"{ours}.feed_forward_residual.norm_after": f"{layer}.output.LayerNorm",
    }


def not_needed(base: str) -> tuple[str, ...]:
    """Tensors of families with the modules of BERT that the encoder does not need: a table of position ids in old
    files, and the pooler."""
    return (f"{base}.embeddings.position_ids", f"{base}.pooler.dense.weight", f"{base}.pooler.dense.bias")


BERT = Family(
    model_type="bert",
    architecture="BertModel",
    config=EncoderConfig,
    model=EncoderTransformer,
    entries=(Whole("max_length", "max_position_embeddings", 512), *ENTRIES),
    names=bert_names("bert"),
    base="bert.",
    tokens={PAD: 0},
    old_suffixes={"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"},
    other_architectures=("BertForPreTraining", "BertForMaskedLM", "BertLMHeadModel"),
    needed_by={"BertForNextSentencePrediction": _NEXT_SENTENCE},
    ignored=(
        *not_needed("bert"),
        "cls.predictions.bias",
        "cls.predictions.decoder.weight",
        "cls.predictions.decoder.bias",
        "cls.predictions.transform.dense.weight",
        "cls.predictions.transform.dense.bias",
        "cls.predictions.transform.LayerNorm.weight",
        "cls.predictions.transform.LayerNorm.bias",
        *_NEXT_SENTENCE,
    ),
)

BERT_ROWS = classifier(
    BERT,
    "BertForSequenceClassification",
    {"head.dense": "bert.pooler.dense", "head.proj": "classifier"},
    Fixed(pooling="cls", head_activation="tanh"),
)
BERT_TOKENS = classifier(BERT, "BertForTokenClassification", {"head.proj": "classifier"}, Fixed(pooling=None))
