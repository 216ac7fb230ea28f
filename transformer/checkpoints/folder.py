"""Folders of checkpoints, on this machine or fetched from the Hugging Face Hub."""

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
"""End of the path of a snapshot in the Hub's cache. Its files are links to `blobs`, which all snapshots share."""


class Folder:
    """The files of a checkpoint. Files outside of its folder are refused.

    `hint` is added to the error for a missing file.
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
        """The file with this name; None if there is none.

        Raises FileFormatError if it, or the target of its link, is outside of the folder or is not a regular file.
        """
        if not _PLAIN_NAME.fullmatch(name):
            raise FileFormatError(f"{self.path}: expected names of files in this folder, got {name!r:.200}")
        return self._inside(self.path / name)

    def find_all(self, folder: str, suffix: str) -> list[Path]:
        """The files of a subfolder whose names end with `suffix`, sorted. Raises as `find` does."""
        within = self.path / folder
        names = sorted(each.name for each in within.iterdir()) if within.is_dir() else []
        found = [self._inside(within / name) for name in names if name.endswith(suffix)]
        return [file for file in found if file is not None]

    def subfolder(self, name: str) -> "Folder":
        """The subfolder with this name, or this folder for an empty name. Raises FileFormatError for other names."""
        if not name:
            return self
        if not _PLAIN_NAME.fullmatch(name):
            raise FileFormatError(f"{self.path}: expected names of subfolders, got {name!r:.200}")
        found = Folder(self.path / name)
        if not found._real.is_relative_to(self._real):
            raise FileFormatError(f"{found.path}: expected a subfolder, got a link to {found._real}")
        found._blobs = self._blobs
        return found

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
            raise FileFormatError(f"{file}: expected a regular file, got a folder, pipe, socket or device")
        return file

    def get(self, name: str) -> Path:
        """The file with this name. Raises FileFormatError if there is none."""
        file = self.find(name)
        if file is None:
            raise FileFormatError(f"{self.path}: expected a folder with {name}, got a folder without it{self._hint}")
        return file


def find_folder(path_or_name: str | PathLike[str], patterns: Sequence[str], *, revision: str | None = None) -> Folder:
    """The folder at a path, or a folder with the files of a Hub model that match `patterns`.

    `revision` is a branch, tag or commit of the Hub. Raises FileNotFoundError if there is neither a folder nor a model,
    and ArgumentError for an invalid path or name, and for a `revision` together with a folder.
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
            f"{name!r:.200}: expected the folder of a checkpoint, or a name like owner/model on the Hub; the system "
            f"refuses this path: {error!s:.200}"
        ) from error
    is_hub_name = bool(_HUB_NAME.fullmatch(name))
    if is_folder:
        if revision is not None:
            raise ArgumentError(
                f"revision: expected None for the folder {path}, which has no revisions, got {revision!r}; leave it "
                "out, or change the working directory to fetch from the Hub"
            )
        hint = (
            "; a folder has precedence over a model of the same name on the Hub: rename it, or change the working "
            "directory, to fetch from the Hub"
        )
        return Folder(path, hint if is_hub_name else "")
    if is_there or not is_hub_name:
        raise FileNotFoundError(f"{name}: expected the folder of a checkpoint, or a name like owner/model on the Hub")
    return Folder(_fetch(name, patterns, revision))


def _fetch(name: str, patterns: Sequence[str], revision: str | None) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ModuleNotFoundError as error:
        raise FileNotFoundError(
            f"{name}: expected the folder of a checkpoint, got no such folder; to fetch a model with this name from "
            f"the Hub: {install_hint('hub')}"
        ) from error
    try:
        # Patterns without a folder match files in the top folder only.
        ignored = None if any("/" in pattern for pattern in patterns) else "*/*"
        found = snapshot_download(name, revision=revision, allow_patterns=list(patterns), ignore_patterns=ignored)
    except Exception as error:
        model = name if revision is None else f"{name}, revision {revision}"
        raise FileNotFoundError(
            f"{model}: expected the folder of a checkpoint or a model on the Hub, got no such folder; fetching from "
            f"the Hub failed: {error}"
        ) from error
    return Path(found)


def _unreadable(path: Path, error: Exception) -> FileFormatError:
    """The error for a link to itself, or for a name that the system refuses."""
    return FileFormatError(f"{path!s:.500}: expected a file; its path could not be resolved: {error!s:.200}")
