"""The records of a JSON file, undecoded: of a list, of JSON lines, or the file itself when it is one object.

A reader decodes each record to the fields it needs, so that a large file never becomes Python objects as a whole and
one broken record does not cost the others.
"""

import json
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from locvlm.data.coco import decode_json, read_bytes
from locvlm.errors import DataError
from locvlm.records import encodable

_T = TypeVar("_T")


def split_rows(path: Path) -> list[msgspec.Raw]:
    """The records of a file, plain or gzip; list and lines are told apart by the content, not by the name.

    Raises DataError when the file cannot be read, is empty, or is neither JSON nor JSON lines.
    """
    data = read_bytes(path)
    start = data.lstrip()[:1]
    if start == b"[":
        return _split_list(path, data)
    if start:
        try:
            msgspec.json.decode(data, type=msgspec.Raw)
        except (msgspec.DecodeError, RecursionError):  # more than one value: JSON lines, if the first line is whole
            lines = [line for line in data.split(b"\n") if line.strip()]
            if len(lines) < 2 or not lines[0].rstrip().endswith(b"}"):
                return [_encode(decode_json(path, data))]
            return [msgspec.Raw(line) for line in lines]
        return [msgspec.Raw(data)]
    raise DataError(f"reading {path}: the file is empty; a JSON list, JSON lines or a JSON object was needed")


def decode_row(raw: msgspec.Raw | bytes, form: type[_T]) -> _T | None:
    """One record as `form`, or None when it is not JSON or does not have that form."""
    try:
        return msgspec.json.decode(raw, type=form)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        pass
    try:  # NaN, or half of a surrogate pair in a field that the form may not even name
        return msgspec.convert(json.loads(bytes(raw)), type=form)
    except (msgspec.ValidationError, ValueError, RecursionError):
        return None


def _split_list(path: Path, data: bytes) -> list[msgspec.Raw]:
    try:
        rows: list[msgspec.Raw] = msgspec.json.decode(data, type=list[msgspec.Raw])
    except (msgspec.DecodeError, RecursionError):  # cut short, or a record with NaN: the lenient decoder tells which
        rows = [_encode(record) for record in decode_json(path, data)]
    if not rows:
        raise DataError(f"reading {path}: the list is empty; at least one record was needed")
    return rows


def _encode(record: Any) -> msgspec.Raw:
    text = json.dumps(record, ensure_ascii=False)
    return msgspec.Raw(text.encode() if encodable(text) else b"null")
