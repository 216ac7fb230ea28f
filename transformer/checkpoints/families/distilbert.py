"""DistilBERT (arXiv 1910.01108): BERT with half of the layers, and without types of tokens."""

from ...models import EncoderConfig, EncoderTransformer
from ..classifiers import classifier
from ..entries import Alias, Fixed, Whole, Word
from ..family import PAD, Family
from ..limits import MAX_CHECKPOINT_LAYERS, MAX_HEADS
from .bert import ACTIVATIONS, AFTER, BIDIRECTIONAL

_OURS, _LAYER = "encoder.blocks.{}", "distilbert.transformer.layer.{}"

DISTILBERT = Family(
    model_type="distilbert",
    architecture="DistilBertModel",
    config=EncoderConfig,
    model=EncoderTransformer,
    entries=(
        Whole("vocab_size", "vocab_size"),
        Whole("d_model", "dim"),
        Whole("d_ff", "hidden_dim"),
        Whole("num_layers", "n_layers", most=MAX_CHECKPOINT_LAYERS),
        Whole("num_heads", "n_heads", most=MAX_HEADS),
        Whole("max_length", "max_position_embeddings", 512),
        Word("activation", "activation", ACTIVATIONS, "gelu"),
        Alias("hidden_size", "dim"),
        Alias("num_attention_heads", "n_heads"),
        Alias("num_hidden_layers", "n_layers"),
        *BIDIRECTIONAL,
        AFTER,
        Fixed(norm_eps=1e-12, num_token_types=0),
    ),
    names={
        "embedding.tokens": "distilbert.embeddings.word_embeddings",
        "positions.positions.embedding": "distilbert.embeddings.position_embeddings",
        "positions.norm": "distilbert.embeddings.LayerNorm",
        f"{_OURS}.attention.q_proj": f"{_LAYER}.attention.q_lin",
        f"{_OURS}.attention.k_proj": f"{_LAYER}.attention.k_lin",
        f"{_OURS}.attention.v_proj": f"{_LAYER}.attention.v_lin",
        f"{_OURS}.attention.out_proj": f"{_LAYER}.attention.out_lin",
        f"{_OURS}.attention_residual.norm_after": f"{_LAYER}.sa_layer_norm",
        f"{_OURS}.feed_forward.up_proj": f"{_LAYER}.ffn.lin1",
        f"{_OURS}.feed_forward.down_proj": f"{_LAYER}.ffn.lin2",
        f"{_OURS}.feed_forward_residual.norm_after": f"{_LAYER}.output_layer_norm",
    },
    base="distilbert.",
    tokens={PAD: 0},
    other_architectures=("DistilBertForMaskedLM",),
    ignored=(
        "distilbert.embeddings.position_ids",
        "vocab_transform.weight",
        "vocab_transform.bias",
        "vocab_layer_norm.weight",
        "vocab_layer_norm.bias",
        "vocab_projector.weight",
        "vocab_projector.bias",
    ),
)

DISTILBERT_ROWS = classifier(
    DISTILBERT,
    "DistilBertForSequenceClassification",
    {"head.dense": "pre_classifier", "head.proj": "classifier"},
    Fixed(pooling="cls", head_activation="relu"),
)
DISTILBERT_TOKENS = classifier(
    DISTILBERT, "DistilBertForTokenClassification", {"head.proj": "classifier"}, Fixed(pooling=None)
)
