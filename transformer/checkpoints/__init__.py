"""Checkpoints in the format of Hugging Face: loading and saving of models, tokenizers and chat templates."""

from .chat_template import ChatTemplate, Message
from .config_file import load_config
from .generation_config import generation_defaults
from .load import empty_model, load_model
from .save import save_model
from .sentences import SentenceEncoder, load_sentence_encoder
from .text_stream import TextStream
from .tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "ChatTemplate",
    "Message",
    "SentenceEncoder",
    "TextStream",
    "Tokenizer",
    "empty_model",
    "generation_defaults",
    "load_config",
    "load_model",
    "load_sentence_encoder",
    "load_tokenizer",
    "save_model",
]
