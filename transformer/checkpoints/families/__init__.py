"""The families of checkpoints that can be read, one small file each."""

from .llama import LLAMA

FAMILIES = (LLAMA,)
"""In the order in which a model to be saved is offered to them."""

__all__ = ["FAMILIES"]
