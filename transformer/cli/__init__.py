"""The commands: chat with a model, let it write, look at it."""

from .commands import main

__all__ = ["main"]
