"""Where a checkpoint lies: a folder of this machine, or a model of the Hugging Face Hub."""

import re
from collections.abc import Sequence
from os import PathLike
from pathlib import Path

from ..errors import FileFormatError
from ..extras import install_hint

CONFIG, GENERATION = "config.json", "generation_config.json"

_PLAIN_NAME = re.compile(r"\w[\w.\-]*")
_HUB_NAME = re.compile(r"\w[\w.\-]*(/\w[\w.\-]*)?")


class Folder:
    """The files of a checkpoint, none of them outside of its folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        # The Hub's cache keeps the files of all snapshots of a model in one place beside them, and links there.
        real = path.resolve()
        self._root = real.parent.parent if real.parent.name == "snapshots" else real

    def find(self, name: str) -> Path | None:
        """The file of that name, or None. Raises FileFormatError where it, or what it links to, lies elsewhere."""
        if not _PLAIN_NAME.fullmatch(name):
            raise FileFormatError(f"{self.path}: expected names of files in this folder, got {name!r}")
        return self._inside(self.path / name)

    def find_all(self, folder: str, suffix: str) -> list[Path]:
        """The files of a folder within this one whose names end so, in order. Raises as `find` does."""
        within = self.path / folder
        names = sorted(each.name for each in within.iterdir()) if within.is_dir() else []
        found = [self._inside(within / name) for name in names if name.endswith(suffix)]
        return [file for file in found if file is not None]

    def _inside(self, file: Path) -> Path | None:
        if not file.resolve().is_relative_to(self._root):
            raise FileFormatError(f"{file}: expected a file in its own folder, got a link to {file.resolve()}")
        return file if file.is_file() else None

    def get(self, name: str) -> Path:
        """The file of that name. Raises FileFormatError where there is none."""
        file = self.find(name)
        if file is None:
            raise FileFormatError(f"{self.path}: expected a folder with {name}, got one without")
        return file


def find_folder(path_or_name: str | PathLike[str], patterns: Sequence[str]) -> Folder:
    """The folder at a path, or that of a model's name on the Hub, of which files like `patterns` are fetched.

    Raises FileNotFoundError where there is neither.
    """
    path = Path(path_or_name)
    if path.is_dir():
        return Folder(path)
    name = str(path_or_name)
    if path.exists() or not _HUB_NAME.fullmatch(name):
        raise FileNotFoundError(f"{name}: expected the folder of a checkpoint, or a name like owner/model on the Hub")
    return Folder(_fetched(name, patterns))


def _fetched(name: str, patterns: Sequence[str]) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ModuleNotFoundError as error:
        raise FileNotFoundError(
            f"{name}: expected the folder of a checkpoint, and there is none; to fetch a model of that name from the "
            f"Hub: {install_hint('hub')}"
        ) from error
    try:
        # Names without a folder mean files of the model's own folder alone.
        deep = [pattern for pattern in patterns if "/" in pattern]
        return Path(snapshot_download(name, allow_patterns=list(patterns), ignore_patterns=None if deep else "*/*"))
    except Exception as error:
        raise FileNotFoundError(
            f"{name}: expected the folder of a checkpoint or a model that the Hub can be asked for, and there is no "
            f"such folder, while the Hub says: {error}"
        ) from error
