"""Reads W&B's run file: LevelDB's log format (blocks of 32 KiB, records in parts) around protocol buffers."""

import json
import struct
import time
from pathlib import Path

from wandb.proto.wandb_internal_pb2 import Record

BLOCK, HEADER = 32768, 7  # bytes; the file itself begins with 7, too


def records(path: Path) -> list[Record]:
    """Every record of a .wandb file, in order."""
    content, place, parts, found = path.read_bytes(), HEADER, [], []
    while place + HEADER <= len(content):
        if BLOCK - place % BLOCK < HEADER:  # padding at a block's end
            place += BLOCK - place % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", content, place)  # checksum, bytes, 1 whole, 2 first, 3, 4 last
        if place + HEADER + length > len(content):
            break  # the process that wrote it was killed
        parts.append(content[place + HEADER : place + HEADER + length])
        place += HEADER + length
        if kind in (1, 4):
            found.append(Record.FromString(b"".join(parts)))
            parts = []
    return found


def history(path: Path) -> list[dict]:
    """What each call of `log` left, with names as they were given; a picture or table is a dict of its own."""
    rows = []
    for record in (record.history for record in records(path) if record.HasField("history")):
        row: dict = {}
        for item in record.item:
            name, *inner = item.nested_key or [item.key]
            if inner:
                row.setdefault(name, {})[".".join(inner)] = json.loads(item.value_json)
            else:
                row[name] = json.loads(item.value_json)
        rows.append(row)
    return rows


def last(path: Path, kind: str) -> object:
    """The last record of a kind, such as "run"; W&B's service may write it a moment after `finish` has returned."""
    deadline = time.monotonic() + 20
    while not (found := [getattr(record, kind) for record in records(path) if record.HasField(kind)]):
        assert time.monotonic() < deadline, f"{path}: no record {kind}"
        time.sleep(0.1)
    return found[-1]
