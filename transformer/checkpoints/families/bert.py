"""BERT (arXiv 1810.04805), and sentence encoders with the same architecture.

The pretraining heads of published checkpoints are ignored, because the encoder does not need them. Other heads are
refused.
"""

from ...models import EncoderConfig, EncoderTransformer
from ..entries import UNALTERED, Fixed, Number, Only, Whole, Word
from ..family import PAD, Family
from ..limits import MAX_CHECKPOINT_LAYERS, MAX_HEADS

ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}

_LAYER, _OURS = "bert.encoder.layer.{}", "encoder.blocks.{}"
_NEXT_SENTENCE = ("cls.seq_relationship.weight", "cls.seq_relationship.bias")

BERT = Family(
    model_type="bert",
    architecture="BertModel",
    config=EncoderConfig,
    model=EncoderTransformer,
    entries=(
        Whole("vocab_size", "vocab_size"),
        Whole("d_model", "hidden_size"),
        Whole("d_ff", "intermediate_size"),
        Whole("num_layers", "num_hidden_layers", most=MAX_CHECKPOINT_LAYERS),
        Whole("num_heads", "num_attention_heads", most=MAX_HEADS),
        Whole("max_length", "max_position_embeddings", 512),
        Whole("num_token_types", "type_vocab_size", 2),
        Number("norm_eps", "layer_norm_eps", 1e-12),
        Word("activation", "hidden_act", ACTIVATIONS, "gelu"),
        Only("position_embedding_type", "absolute"),
        Only("is_decoder", False),
        Only("is_causal", False),
        *UNALTERED,
        Fixed(
            attention_bias=True,
            position="learned",
            norm="layer",
            norm_placement="after",
            feed_forward="plain",
            feed_forward_bias=True,
            embedding_norm=True,
        ),
    ),
    names={
        "embedding.tokens": "bert.embeddings.word_embeddings",
        "token_types.tokens": "bert.embeddings.token_type_embeddings",
        "positions.positions.embedding": "bert.embeddings.position_embeddings",
        "positions.norm": "bert.embeddings.LayerNorm",
        f"{_OURS}.attention.q_proj": f"{_LAYER}.attention.self.query",
        f"{_OURS}.attention.k_proj": f"{_LAYER}.attention.self.key",
        f"{_OURS}.attention.v_proj": f"{_LAYER}.attention.self.value",
        f"{_OURS}.attention.out_proj": f"{_LAYER}.attention.output.dense",
        f"{_OURS}.attention_residual.norm_after": f"{_LAYER}.attention.output.LayerNorm",
        f"{_OURS}.feed_forward.up_proj": f"{_LAYER}.intermediate.dense",
        f"{_OURS}.feed_forward.down_proj": f"{_LAYER}.output.dense",
        f"{_OURS}.feed_forward_residual.norm_after": f"{_LAYER}.output.LayerNorm",
    },
    base="bert.",
    tokens={PAD: 0},
    old_suffixes={"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"},
    other_architectures=("BertForPreTraining", "BertForMaskedLM", "BertLMHeadModel"),
    needed_by={"BertForNextSentencePrediction": _NEXT_SENTENCE},
    # A table of position ids in old files, and the pretraining heads.
    ignored=(
        "bert.embeddings.position_ids",
        "bert.pooler.dense.weight",
        "bert.pooler.dense.bias",
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
