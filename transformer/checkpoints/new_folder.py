"""Folder that is complete or does not exist: written under a temporary name, synced, and renamed."""

import json
import os
import secrets
import shutil
import stat
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor

from ..files import sync
from .weights import import_safetensors


class NewFolder:
    """A folder at `path`, which does not exist yet or is empty. Nothing is on disk before `make`, or after `remove`.

    A link to an empty folder stays, and its folder is replaced.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        self._target = Path(os.path.realpath(path))
        self._temporary = self._target.parent / f".{secrets.token_hex(16)}.tmp"

    def make(self) -> None:
        """Makes the folder under its temporary name. Raises FileExistsError if there is one with files at its path."""
        if self._target.exists() and not (self._target.is_dir() and not any(self._target.iterdir())):
            raise FileExistsError(f"{self._target}: expected a folder that is new or empty, got a folder with files")
        self._target.parent.mkdir(parents=True, exist_ok=True)
        self._temporary.mkdir()

    def add_object(self, name: str, content: dict[str, Any]) -> None:
        """Writes a JSON file."""
        file = self._temporary / name
        file.write_text(json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")
        sync(file)

    def add_tensors(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Writes a file of safetensors, with the mode of other new files."""
        file = self._temporary / name
        import_safetensors().torch.save_file(tensors, file, {"format": "pt"})
        # safetensors writes with a mode for the owner only.
        os.chmod(file, stat.S_IMODE(self._temporary.stat().st_mode) & 0o666)
        sync(file)

    def publish(self) -> None:
        """Gives the folder its name."""
        sync(self._temporary)
        os.replace(self._temporary, self._target)
        sync(self._target.parent)

    def remove(self) -> None:
        """Removes what was written; a published folder stays."""
        shutil.rmtree(self._temporary, ignore_errors=True)
