"""Conversations in files: what the model remembers and what was said, in one file, whole or not at all."""

import json
import reprlib
from pathlib import Path
from typing import Any

from ..cache import KVCache
from ..cache.files import read, write
from ..errors import FileFormatError
from .conversation import Copy, Said

LARGEST_TOKEN = 1 << 31


def save(copy: Copy, path: Path) -> None:
    """Writes a conversation: what the model remembers, with what was said beside it, under one digest.

    Raises as `KVCache.save` does; a file that no conversation is in is not replaced.
    """
    said, turns = copy.said, list(copy.said.turns)
    # A template may have written later turns with fewer tokens than stood there before: of a turn that is taken back
    # then, those stay that no later turn has replaced.
    end = len(said.tokens)
    for number in reversed(range(len(turns))):
        end = turns[number] = min(turns[number], end)
    text = json.dumps({"messages": [dict(each) for each in said.messages], "tokens": said.tokens, "turns": turns})
    write(path, copy.cache.saved()._replace(said=text))


def load(path: Path) -> Copy:
    """What `save` wrote. Raises FileFormatError, naming the file, for anything else, and OSError where there is none.

    Whether it is of the model that it goes on in, `Conversation.go_on_with` tells.
    """
    saved = read(path)
    if saved.said is None:
        raise FileFormatError(
            f"{path}: expected a conversation that /save wrote, got a kv_cache without what was said (of KVCache.save, "
            "or of a release that wrote the words into a second file; KVCache.load reads it)"
        )
    cache = KVCache.of_saved(saved)
    try:
        said = _said(json.loads(saved.said))
        _check_goes_with(cache, said)
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{path}: expected a conversation that /save wrote, {error}") from error
    return Copy(said, cache)


def _said(found: Any) -> Said:
    """What a file tells of messages, tokens and turns. Raises ValueError, saying what came, where it cannot be so."""
    if not isinstance(found, dict) or found.keys() != {"messages", "tokens", "turns"}:
        raise ValueError(f"with messages, tokens and turns, got {reprlib.repr(found)}")
    messages, tokens, turns = (found[name] for name in ("messages", "tokens", "turns"))
    if not _are_messages(messages):
        raise ValueError(f"with messages that have a role and a content, got {reprlib.repr(messages)}")
    if not _are_whole(tokens, LARGEST_TOKEN):
        raise ValueError(f"with tokens, got {reprlib.repr(tokens)}")
    if not _are_whole(turns, len(tokens)) or turns != sorted(turns):
        raise ValueError(f"with turns that begin within its {len(tokens)} tokens, got {reprlib.repr(turns)}")
    roles = [message["role"] for message in messages]
    if roles[:1] == ["system"]:
        del roles[0]
    if roles != ["user", "assistant"] * len(turns):
        raise ValueError(
            f"with a user's message and an answer in each of {len(turns)} turns, got {reprlib.repr(roles)}"
        )
    return Said(tuple(messages), tuple(tokens), tuple(turns))


def _check_goes_with(cache: KVCache, said: Said) -> None:
    """Raises ValueError where a cache cannot be of one conversation of so many tokens."""
    lengths = {part.row_lengths for part in cache.parts()}
    if cache.batch not in (None, 1) or len(lengths) > 1:
        raise ValueError(f"of one row in each layer, got {cache.batch} rows of lengths {sorted(lengths)}")
    if cache.length > len(said.tokens):
        raise ValueError(f"with the {cache.length} tokens that were read, got {len(said.tokens)}")


def _are_messages(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(message, dict)
        and message.keys() == {"role", "content"}
        and all(isinstance(text, str) for text in message.values())
        for message in value
    )


def _are_whole(value: object, most: int) -> bool:
    """Whether a value is a list of whole numbers from 0 to `most`."""
    return isinstance(value, list) and all(type(number) is int and 0 <= number <= most for number in value)
