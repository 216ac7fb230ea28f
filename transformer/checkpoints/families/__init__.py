"""The families of checkpoints that can be read, one small file each."""

from .gemma import GEMMA, GEMMA2
from .gpt2 import GPT2
from .llama import LLAMA
from .mistral import MISTRAL
from .qwen import QWEN2, QWEN3

FAMILIES = (LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA, GEMMA2, GPT2)
"""In the order in which a model to be saved is offered to them."""

__all__ = ["FAMILIES"]
