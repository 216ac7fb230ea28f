"""Commands of the package: chat with a model, generate text, and inspect a model."""

from .commands import main

__all__ = ["main"]
