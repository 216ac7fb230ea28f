"""Saved conversations: the caches and the transcript in one file, written atomically."""

import json
import reprlib
from pathlib import Path
from typing import Any

from ..cache import KVCache
from ..cache.files import read, write
from ..errors import FileFormatError
from .conversation import SavedConversation, Transcript

MAX_TOKEN_ID = 1 << 31
"""Upper limit of a token id in a file."""


def save(copy: SavedConversation, path: Path) -> None:
    """Writes the caches and the transcript of a conversation, with one digest.

    Raises as `KVCache.save` does. A file of another format is not replaced.
    """
    transcript, turns = copy.transcript, list(copy.transcript.turns)
    # A template can write earlier turns with fewer tokens than before. A turn then begins at most where the next turn
    # begins, so that /undo keeps no tokens that a later turn has replaced.
    end = len(transcript.tokens)
    for number in reversed(range(len(turns))):
        end = turns[number] = min(turns[number], end)
    text = json.dumps(
        {"messages": [dict(each) for each in transcript.messages], "tokens": transcript.tokens, "turns": turns}
    )
    write(path, copy.cache.saved()._replace(said=text))


def load(path: Path) -> SavedConversation:
    """The conversation in a file of `save`. Raises FileFormatError, with the file, for another file, and OSError if
    there is no file.

    `Conversation.restore` checks that it belongs to the model.
    """
    saved = read(path)
    if saved.said is None:
        raise FileFormatError(
            f"{path}: expected a conversation that /save wrote, got a cache without a transcript (from KVCache.save, "
            "or from a release that wrote the transcript into a second file); KVCache.load reads it"
        )
    cache = KVCache.of_saved(saved)
    try:
        transcript = _parse_transcript(json.loads(saved.said))
        _check_cache(cache, transcript)
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{path}: expected a conversation that /save wrote, {error}") from error
    return SavedConversation(transcript, cache)


def _parse_transcript(found: Any) -> Transcript:
    """The messages, tokens and turns in a file. Raises ValueError, with the invalid value."""
    if not isinstance(found, dict) or found.keys() != {"messages", "tokens", "turns"}:
        raise ValueError(f"with messages, tokens and turns, got {reprlib.repr(found)}")
    messages, tokens, turns = (found[name] for name in ("messages", "tokens", "turns"))
    if not _are_messages(messages):
        raise ValueError(f"with messages that have a role and a content, got {reprlib.repr(messages)}")
    if not _are_whole(tokens, MAX_TOKEN_ID):
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
    return Transcript(tuple(messages), tuple(tokens), tuple(turns))


def _check_cache(cache: KVCache, transcript: Transcript) -> None:
    """Raises ValueError if a cache does not fit one conversation with this transcript."""
    lengths = {part.row_lengths for part in cache.parts()}
    if cache.batch not in (None, 1) or len(lengths) > 1:
        raise ValueError(f"of one row in each layer, got {cache.batch} rows of lengths {sorted(lengths)}")
    if cache.length > len(transcript.tokens):
        raise ValueError(f"with the {cache.length} tokens of its caches, got {len(transcript.tokens)}")


def _are_messages(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(message, dict)
        and message.keys() == {"role", "content"}
        and all(isinstance(text, str) for text in message.values())
        for message in value
    )


def _are_whole(value: object, most: int) -> bool:
    """True for a list of whole numbers from 0 to `most`."""
    return isinstance(value, list) and all(type(number) is int and 0 <= number <= most for number in value)
