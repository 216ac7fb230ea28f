"""The place of a checkpoint: a folder of this machine, or a model of the Hugging Face Hub."""

import re
from collections.abc import Sequence
from os import PathLike
from pathlib import Path

from ..errors import ArgumentError, FileFormatError
from ..extras import install_hint
from .arguments import check_path

CONFIG, GENERATION = "config.json", "generation_config.json"

_PLAIN_NAME = re.compile(r"\w[\w.\-]*")
_HUB_NAME = re.compile(r"\w[\w.\-]*(/\w[\w.\-]*)?")

_HUB_SNAPSHOT = re.compile(r"models--[^/]+/snapshots/[0-9a-f]{40}")
"""End of a snapshot's path in the Hub's cache: its files are links to `blobs`, which all snapshots of a model share."""


class Folder:
    """The files of a checkpoint, none of them outside of its folder.

    `hint` is said where a file is missing.
    """

    def __init__(self, path: Path, hint: str = "") -> None:
        self.path = path
        self._hint = hint
        try:
            self._real = path.resolve()
        except (OSError, RuntimeError) as error:
            raise _unreadable(path, error) from error
        model = self._real.parent.parent
        in_cache = _HUB_SNAPSHOT.fullmatch(f"{model.name}/{self._real.parent.name}/{self._real.name}")
        self._blobs = model / "blobs" if in_cache else None

    def find(self, name: str) -> Path | None:
        """The file of that name, or None where there is nothing.

        Raises FileFormatError where it, or what it links to, lies elsewhere, or is no file.
        """
        if not _PLAIN_NAME.fullmatch(name):
            raise FileFormatError(f"{self.path}: expected names of files in this folder, got {name!r:.200}")
        return self._inside(self.path / name)

    def find_all(self, folder: str, suffix: str) -> list[Path]:
        """The files of a folder within this one whose names end so, in order. Raises as `find` does."""
        within = self.path / folder
        names = sorted(each.name for each in within.iterdir()) if within.is_dir() else []
        found = [self._inside(within / name) for name in names if name.endswith(suffix)]
        return [file for file in found if file is not None]

    def _inside(self, file: Path) -> Path | None:
        try:
            real = file.resolve()
            if not real.is_relative_to(self._real) and (self._blobs is None or real.parent != self._blobs):
                raise FileFormatError(f"{file}: expected a file in its own folder, got a link to {real}")
            if not real.exists():
                return None
            is_file = real.is_file()
        except (OSError, RuntimeError) as error:
            raise _unreadable(file, error) from error
        if not is_file:
            raise FileFormatError(f"{file}: expected a regular file, got another kind")
        return file

    def get(self, name: str) -> Path:
        """The file of that name. Raises FileFormatError where there is none."""
        file = self.find(name)
        if file is None:
            raise FileFormatError(f"{self.path}: expected a folder with {name}, got one without{self._hint}")
        return file


def find_folder(path_or_name: str | PathLike[str], patterns: Sequence[str], *, revision: str | None = None) -> Folder:
    """The folder at a path, or that of a model's name on the Hub, of which files like `patterns` are fetched.

    `revision` is a branch, tag or commit of the Hub. Raises FileNotFoundError where there is neither, and ArgumentError
    for what is no path or name, and for a `revision` of a folder, which has none.
    """
    check_path("path_or_name", path_or_name)
    name = str(path_or_name)
    if revision is not None and not (type(revision) is str and revision):
        raise ArgumentError(f"revision: expected None or the name of a branch, tag or commit, got {revision!r}")
    try:
        path = Path(path_or_name)
        is_folder, is_there = path.is_dir(), path.exists()
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{name!r:.200}: expected the folder of a checkpoint, or a name like owner/model on the Hub, got what the "
            f"system refuses: {error!s:.200}"
        ) from error
    is_hub_name = bool(_HUB_NAME.fullmatch(name))
    if is_folder:
        if revision is not None:
            raise ArgumentError(
                f"revision: expected None for the folder {path}, which has no revisions, got {revision!r}; leave it "
                "out, or call from elsewhere to ask the Hub"
            )
        hint = "; it is taken before the Hub's model of that name: remove it, or call from elsewhere, to ask the Hub"
        return Folder(path, hint if is_hub_name else "")
    if is_there or not is_hub_name:
        raise FileNotFoundError(f"{name}: expected the folder of a checkpoint, or a name like owner/model on the Hub")
    return Folder(_fetched(name, patterns, revision))


def _fetched(name: str, patterns: Sequence[str], revision: str | None) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ModuleNotFoundError as error:
        raise FileNotFoundError(
            f"{name}: expected the folder of a checkpoint, and there is none; to fetch a model of that name from the "
            f"Hub: {install_hint('hub')}"
        ) from error
    try:
        # Names without a folder mean files of the model's own folder alone.
        ignored = None if any("/" in pattern for pattern in patterns) else "*/*"
        found = snapshot_download(name, revision=revision, allow_patterns=list(patterns), ignore_patterns=ignored)
    except Exception as error:
        asked = name if revision is None else f"{name}, revision {revision}"
        raise FileNotFoundError(
            f"{asked}: expected the folder of a checkpoint or a model that the Hub can be asked for, and there is no "
            f"such folder, while the Hub answered: {error}"
        ) from error
    return Path(found)


def _unreadable(path: Path, error: Exception) -> FileFormatError:
    """For links that lead to themselves and names that no file can have."""
    return FileFormatError(f"{path!s:.500}: expected a file that can be found, got: {error!s:.200}")
