"""What the offline file of a run in Weights & Biases holds. A killed process leaves as much of it as was flushed.

The format is that of LevelDB's log: blocks of 32 KiB, records cut where a block ends, each part after 7 bytes of head
(crc32, length, and whether it is a whole record, or its first, middle or last part); a record is a protobuf message.
"""

import json
import shlex
import struct
from collections.abc import Iterator
from pathlib import Path

_BLOCK, _HEAD = 32768, 7
_WHOLE, _LAST = 1, 4


def logged_steps(path: Path) -> dict[str, int]:
    """By kind of line (train, eval), the last step that a file holds."""
    from wandb.proto import wandb_internal_pb2

    steps: dict[str, int] = {}
    for content in _records(path.read_bytes()):
        record = wandb_internal_pb2.Record.FromString(content)  # type: ignore[attr-defined] # made when it is imported
        history = record.history
        values = {item.key or "/".join(item.nested_key): item.value_json for item in history.item}
        if "_step" in values:
            steps |= {name.split("/")[0]: json.loads(values["_step"]) for name in values if "/" in name}
    return steps


def unsynced(folder: Path) -> list[Path]:
    """The pieces of a run, each a folder below its own, that `wandb sync` has not sent."""
    pieces = sorted((folder / "wandb").glob("offline-run-*/run-*.wandb"))
    return [path.parent for path in pieces if not path.with_name(f"{path.name}.synced").exists()]


def sync_note(folder: Path) -> str:
    """How to send what a run has left in offline files; empty if it has sent all."""
    pieces = unsynced(folder)
    if not pieces:
        return ""
    quoted = shlex.quote(str(folder / "wandb"))
    which = shlex.quote(str(pieces[0])) if len(pieces) == 1 else f"{quoted}/offline-run-*"
    return f"not in Weights & Biases yet; where there is a network: wandb sync {which}"


def _records(data: bytes) -> Iterator[bytes]:
    place, parts = _HEAD, b""  # the file itself begins with a head
    while place + _HEAD <= len(data):
        if _BLOCK - place % _BLOCK < _HEAD:  # what is left of a block is too short for a head
            place += _BLOCK - place % _BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        place += _HEAD + length
        if place > len(data):  # cut by a kill
            return
        parts += data[place - length : place]
        if kind in (_WHOLE, _LAST):
            yield parts
            parts = b""
