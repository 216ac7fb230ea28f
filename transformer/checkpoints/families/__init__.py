"""Families of checkpoints that can be loaded and saved, one file each."""

from .bart import BART, MBART
from .bert import BERT, BERT_ROWS, BERT_TOKENS
from .bloom import BLOOM
from .distilbert import DISTILBERT, DISTILBERT_ROWS, DISTILBERT_TOKENS
from .falcon import FALCON
from .gemma import GEMMA, GEMMA2
from .gemma3 import GEMMA3
from .gpt2 import GPT2
from .gpt_neox import GPT_NEOX
from .granite import GRANITE
from .llama import LLAMA
from .marian import MARIAN, MARIAN_SEPARATE
from .mistral import MISTRAL
from .mixtral import MIXTRAL
from .modernbert import MODERNBERT, MODERNBERT_ROWS, MODERNBERT_TOKENS
from .modular import MODULAR
from .native import NATIVE
from .olmo2 import OLMO2
from .opt import OPT
from .phi import PHI
from .phi3 import PHI3
from .qwen import QWEN2, QWEN3
from .qwen_moe import QWEN3_MOE
from .roberta import ROBERTA, ROBERTA_CLASSIFIERS, XLM_ROBERTA
from .smollm3 import SMOLLM3
from .stablelm import STABLELM
from .starcoder2 import STARCODER2
from .t5 import MT5, MT5_ENCODER, T5, T5_ENCODER, T5_GATED, T5_GATED_ENCODER, UMT5, UMT5_ENCODER

FAMILIES = (
    LLAMA,
    MISTRAL,
    MIXTRAL,
    QWEN2,
    QWEN3,
    QWEN3_MOE,
    GEMMA,
    GEMMA2,
    GEMMA3,
    GRANITE,
    PHI,
    PHI3,
    OLMO2,
    SMOLLM3,
    GPT2,
    OPT,
    STABLELM,
    GPT_NEOX,
    FALCON,
    STARCODER2,
    BLOOM,
    T5_GATED_ENCODER,
    T5_ENCODER,
    T5_GATED,
    T5,
    MT5_ENCODER,
    MT5,
    UMT5_ENCODER,
    UMT5,
    BART,
    MBART,
    MARIAN_SEPARATE,
    MARIAN,
    BERT_ROWS,
    BERT_TOKENS,
    BERT,
    *ROBERTA_CLASSIFIERS,
    ROBERTA,
    XLM_ROBERTA,
    DISTILBERT_ROWS,
    DISTILBERT_TOKENS,
    DISTILBERT,
    MODERNBERT_ROWS,
    MODERNBERT_TOKENS,
    MODERNBERT,
    MODULAR,
    *NATIVE,
)
"""All families, in the order in which they are tried for loading and for saving: those of published models, then those
of this library."""

REFUSED = {
    "gemma3": "gemma3_text, as models that read images are not supported; its text model alone can be saved as such",
}
"""Types of models that people take for one of these families, each with what is expected instead."""

__all__ = ["FAMILIES", "REFUSED"]
