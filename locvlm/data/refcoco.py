"""The RefCOCO family: expressions that each refer to one object of a COCO image (paper, section 4.3).

Two forms are read: the official `refs(<splitBy>).p` with its `instances.json` beside it (lichengunc/refer), and the
JSON list of one split, `[{img_id, sents, bbox, height, width}]`, that MiniGPT-4 distributes.
"""

import io
import math
import pickle
import struct
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from locvlm.data.coco import has_place, read_bytes, read_instances, refuse_if_most_skipped, whole
from locvlm.data.names import coco_image_id
from locvlm.data.rows import decode_row, split_rows
from locvlm.errors import DataError
from locvlm.records import BoxXYXY, ImageRecord, ObjectRecord

INSTANCES_NAME = "instances.json"

NO_BOX = "ref without a box: its annotation is not in instances.json, or its box cannot be used"

_BAD_REF = "ref without a whole-number ref_id, image_id or ann_id, without a split or without an expression"
_SAME_REF = "ref id that occurred before"
_BAD_ROW = "record that is not {img_id: a COCO image name, sents: text, bbox: [x, y, w, h], height, width}"

# The opcodes that make None, booleans, numbers, text, lists, tuples and dicts. Left out are all that look up a name,
# call something, make an object or set aside memory of a size that the file merely states.
_PLAIN_OPCODES = b"".join(
    (
        pickle.PROTO + pickle.FRAME + pickle.STOP + pickle.MARK + pickle.POP + pickle.POP_MARK,
        pickle.NONE + pickle.NEWTRUE + pickle.NEWFALSE,
        pickle.INT + pickle.BININT + pickle.BININT1 + pickle.BININT2 + pickle.LONG + pickle.LONG1 + pickle.LONG4,
        pickle.FLOAT + pickle.BINFLOAT,
        pickle.STRING + pickle.BINSTRING + pickle.SHORT_BINSTRING,
        pickle.UNICODE + pickle.BINUNICODE + pickle.SHORT_BINUNICODE + pickle.BINUNICODE8,
        pickle.EMPTY_LIST + pickle.LIST + pickle.APPEND + pickle.APPENDS,
        pickle.EMPTY_TUPLE + pickle.TUPLE + pickle.TUPLE1 + pickle.TUPLE2 + pickle.TUPLE3,
        pickle.EMPTY_DICT + pickle.DICT + pickle.SETITEM + pickle.SETITEMS,
        pickle.GET + pickle.BINGET + pickle.LONG_BINGET,
        pickle.PUT + pickle.BINPUT + pickle.LONG_BINPUT + pickle.MEMOIZE,
    )
)

# what the unpickler raises for a file that is cut short, damaged or no pickle
_UNPICKLING_FAULTS = (
    pickle.UnpicklingError,
    EOFError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    AssertionError,
    OverflowError,
    MemoryError,
    RecursionError,
    struct.error,
)


@dataclass(frozen=True, slots=True)
class Ref:
    """One object and the expressions that people used for it.

    `file_name`: of the COCO train2014 image. `box_xyxy`: in pixels of that image; None, as are width and height 0, when
    it is not known. `ann_id`, `split`, `category`: None or empty in MiniGPT-4's lists, whose `ref_id` counts objects.
    """

    ref_id: int
    image_id: int
    file_name: str
    sentences: tuple[str, ...]
    ann_id: int | None = None
    split: str = ""
    category: str = ""
    width: int = 0
    height: int = 0
    box_xyxy: BoxXYXY | None = None


@dataclass(slots=True)
class Refs:
    """`rows` in file order; `skipped`: reason -> records that cannot be used; `notes`: reason -> rows kept all the
    same, but not whole."""

    rows: list[Ref]
    skipped: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)


def read_refs(path: Path) -> Refs:
    """The refs of an official pickle, with boxes when `instances.json` lies beside it, or of a MiniGPT-4 list.

    Nothing in a pickle is executed: only plain values are decoded. Raises DataError for a file that is neither, holds
    anything but plain values, or of which most records cannot be used.
    """
    data = read_bytes(path)
    if data.lstrip()[:1] in (b"[", b"{"):
        return _read_list(path)
    refs = _unpickle(path, data)
    beside = path.parent / INSTANCES_NAME
    objects = _objects(beside) if beside.is_file() else None
    found = Refs([])
    seen: set[int] = set()
    for record in refs:
        ref = _ref(record)
        if ref is None:
            found.skipped[_BAD_REF] += 1
        elif ref.ref_id in seen:
            found.skipped[_SAME_REF] += 1
        else:
            seen.add(ref.ref_id)
            found.rows.append(ref if objects is None else _placed(ref, objects, found.notes))
    refuse_if_most_skipped(path, "refs", found.skipped, len(refs))
    return found


class _PlainUnpickler(pickle._Unpickler):
    """The pure-Python unpickler without the opcodes that could do anything but hold data. (The one in C keeps its memo
    in an array whose size the file decides, so that ten bytes can claim gigabytes.)"""

    dispatch = {code: pickle._Unpickler.dispatch[code] for code in _PLAIN_OPCODES}

    def find_class(self, module: str, name: str) -> Any:
        """No opcode that is left gets here."""
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def _unpickle(path: Path, data: bytes) -> list[Any]:
    needed = "needed is the official refs file: a pickled list of refs made of plain values"
    try:
        value = _PlainUnpickler(io.BytesIO(data), encoding="latin1").load()
    except KeyError as fault:
        key = fault.args[0]
        what = f"it holds the pickle opcode {chr(key)!r}" if isinstance(key, int) and key < 256 else str(fault)
        raise DataError(
            f"reading the refs {path}: {what}, which is more than plain lists, dicts, text and numbers, or it is "
            f"damaged; nothing of it was run. {needed}"
        ) from None
    except _UNPICKLING_FAULTS as fault:
        raise DataError(
            f"reading the refs {path}: not a pickle, cut short, or damaged ({fault or type(fault).__name__}); {needed}"
        ) from None
    if not isinstance(value, list) or not value:
        raise DataError(f"reading the refs {path}: it holds {_described(value)}; {needed}")
    return value


def _described(value: Any) -> str:
    return "an empty list" if value == [] else f"a {type(value).__name__}"


def _ref(record: Any) -> Ref | None:
    if not isinstance(record, dict):
        return None
    ref_id, image_id, ann_id = (whole(record.get(name)) for name in ("ref_id", "image_id", "ann_id"))
    sentences, split = record.get("sentences"), record.get("split")
    if ref_id is None or image_id is None or ann_id is None:
        return None
    if image_id < 0 or not isinstance(sentences, list) or not isinstance(split, str):
        return None
    texts = tuple(filter(None, map(_expression, sentences)))
    if not texts:
        return None
    return Ref(ref_id, image_id, f"COCO_train2014_{image_id:012d}.jpg", texts, ann_id, split)


def _expression(sentence: Any) -> str:
    """The expression as it is scored: `sent`, which is `raw` in lower case without signs."""
    text = sentence.get("sent", sentence.get("raw")) if isinstance(sentence, dict) else None
    return " ".join(text.split()) if isinstance(text, str) else ""


def _objects(path: Path) -> dict[int, tuple[ImageRecord, ObjectRecord]]:
    return {thing.id: (image, thing) for image in read_instances(path).images for thing in image.objects}


def _placed(ref: Ref, objects: dict[int, tuple[ImageRecord, ObjectRecord]], notes: Counter[str]) -> Ref:
    image, thing = objects.get(ref.ann_id or 0, (None, None))
    if image is None or thing is None or image.id != ref.image_id or not has_place(thing):
        notes[NO_BOX] += 1
        return ref
    return replace(
        ref,
        file_name=image.file_name,
        category=thing.category,
        width=image.width,
        height=image.height,
        box_xyxy=thing.box_xyxy,
    )


def _read_list(path: Path) -> Refs:
    raws = split_rows(path)
    found = Refs([])
    rows = found.rows
    for raw in raws:
        ref = _list_row(decode_row(raw, dict[str, Any]) or {}, len(rows))
        if ref is None:
            found.skipped[_BAD_ROW] += 1
        elif rows and (rows[-1].file_name, rows[-1].box_xyxy) == (ref.file_name, ref.box_xyxy):
            rows[-1] = replace(rows[-1], sentences=rows[-1].sentences + ref.sentences)  # the same object again
        else:
            rows.append(ref)
    refuse_if_most_skipped(path, "records", found.skipped, len(raws))
    return found


def _list_row(record: dict[str, Any], number: int) -> Ref | None:
    name, text = record.get("img_id"), record.get("sents")
    width, height = whole(record.get("width")), whole(record.get("height"))
    image_id = coco_image_id(name) if isinstance(name, str) else None
    if image_id is None or width is None or height is None or not isinstance(text, str) or not text.strip():
        return None
    try:
        x, y, w, h = map(float, record["bbox"])
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
    box = max(x, 0.0), max(y, 0.0), min(x + w, float(width)), min(y + h, float(height))
    if not all(map(math.isfinite, (x, y, w, h))) or box[0] >= box[2] or box[1] >= box[3]:
        return None
    file_name = f"COCO_train2014_{image_id:012d}.jpg"
    return Ref(number, image_id, file_name, (" ".join(text.split()),), width=width, height=height, box_xyxy=box)
