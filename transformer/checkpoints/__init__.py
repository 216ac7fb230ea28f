"""Checkpoints in the format of Hugging Face: read, run and written back."""

from .load import load_config, load_model
from .save import save_model

__all__ = ["load_config", "load_model", "save_model"]
