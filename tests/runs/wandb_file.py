"""A reader of W&B's offline files: 32 KiB blocks of records (LevelDB's log format), each a protobuf message."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path
from typing import Any

from tests.polling import wait_until
from wandb.proto.wandb_internal_pb2 import Record

BLOCK, FULL, FIRST, LAST = 32 * 1024, 1, 2, 4


def records(path: Path) -> list[Record]:
    """Return every record of a finished run's .wandb file, once W&B's own process has written the last one."""
    wait_until(lambda: any(record.WhichOneof("record_type") == "exit" for record in read(path)))
    return read(path)


def read(path: Path) -> list[Record]:
    """Return the records that are complete so far, checksums verified."""
    content = path.read_bytes()
    assert content[:4] == b":W&B"
    position, parts, found = 7, b"", []
    while position + 7 <= len(content):
        if (left := BLOCK - position % BLOCK) < 7:
            position += left  # no header fits into what is left of a block
            continue
        checksum, length, kind = struct.unpack_from("<IHB", content, position)
        data = content[position + 7 : position + 7 + length]
        if len(data) < length:
            break  # its process has not written all of it yet
        assert zlib.crc32(data, zlib.crc32(bytes([kind]))) == checksum
        position += 7 + length
        parts = data if kind in (FULL, FIRST) else parts + data
        if kind in (FULL, LAST):
            found.append(Record.FromString(parts))
    return found


def history(path: Path) -> list[dict[str, Any]]:
    """The logged rows, W&B's own columns left out."""
    return rows_of(records(path))


def rows_of(found: list[Record]) -> list[dict[str, Any]]:
    """Return the logged rows among some records, without W&B's own columns."""
    rows = []
    for record in found:
        if record.WhichOneof("record_type") == "history":
            items = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
            rows.append({key: value for key, value in items.items() if not key.startswith("_")})
    return rows


def config(path: Path) -> dict[str, Any]:
    """The run's config, as it was last updated."""
    values: dict[str, Any] = {}
    for record in records(path):
        for update in [*record.config.update, *record.run.config.update]:
            values["/".join(update.nested_key) or update.key] = json.loads(update.value_json)
    return values


def exit_code(path: Path) -> int:
    """Return the exit code with which the run was closed."""
    return [record.exit.exit_code for record in records(path) if record.WhichOneof("record_type") == "exit"][-1]
