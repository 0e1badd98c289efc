"""Conversations on disk: an Arrow IPC file that a rank maps into memory, and LLaVA's JSON list.

A dataset folder holds `conversations.arrow` and `manifest.json`. One Arrow row is one conversation; its turns are a
list of structs, so that any Arrow reader (pandas, polars, Ray Data) can open the file. Boxes are doubles in pixels.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.compute as pc

from locvlm.data.coco import decode_json, leads_out, read_bytes, refuse_if_most_skipped, whole
from locvlm.errors import DataError
from locvlm.prompts import IMAGE, STOP
from locvlm.records import BoxXYXY, Conversation, Turn, atomic_write, read_manifest

ARROW_NAME = "conversations.arrow"
LLAVA_NAME = "conversations.json"
STRUCTURED = ("loc_pred", "neg_pred", "rev_loc")

_ROWS_A_BATCH = 8192

_BOX = pa.list_(pa.float64(), 4)
_TURN = pa.struct(
    [
        pa.field("objective", pa.string(), nullable=False),
        pa.field("category", pa.string(), nullable=False),
        pa.field("description", pa.string(), nullable=False),
        pa.field("box_xyxy", _BOX),
        pa.field("question", pa.string(), nullable=False),
        pa.field("answer", pa.string(), nullable=False),
    ]
)
_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("image", pa.string(), nullable=False),
        pa.field("width", pa.int64(), nullable=False),
        pa.field("height", pa.int64(), nullable=False),
        pa.field("objective", pa.string(), nullable=False),
        pa.field("turns", pa.list_(pa.field("item", _TURN, nullable=False)), nullable=False),
    ]
)


class _Message(msgspec.Struct, gc=False):
    sender: str = msgspec.field(name="from")
    value: str


class _LlavaRecord(msgspec.Struct, gc=False):
    id: str | int | None = None
    image: str | None = None
    conversations: list[_Message] | None = None
    objective: str | None = None
    width: int | float | None = None
    height: int | float | None = None


class ConversationFile(Sequence[Conversation]):
    """Conversations by row number; a row becomes an object when it is asked for.

    `manifest`: the manifest beside the file, or None. `skipped`: reason -> records of a LLaVA list that cannot be used.
    """

    def __init__(
        self, table: pa.Table, path: Path, manifest: dict[str, Any] | None = None, skipped: Counter[str] | None = None
    ) -> None:
        self.path = path
        self.manifest = manifest
        self.skipped: Counter[str] = skipped or Counter()
        self._table = table
        self._batches: list[pa.RecordBatch] = table.to_batches()
        self._starts: list[int] = []
        start = 0
        for batch in self._batches:
            self._starts.append(start)
            start += batch.num_rows

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __getitem__(self, index: Any) -> Any:
        """The conversation of one row, or a list for a slice. Raises IndexError beyond the last row."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row = int(index)
        if row < 0:
            row += len(self)
        if not 0 <= row < len(self):
            raise IndexError(f"conversation {index} of {self.path}: it holds {len(self)}")
        number = bisect_right(self._starts, row) - 1
        return _conversation(self._batches[number], row - self._starts[number])

    def __iter__(self) -> Iterator[Conversation]:
        for batch in self._batches:
            for row in range(batch.num_rows):
                yield _conversation(batch, row)

    @property
    def images(self) -> list[str]:
        """The image name of every row; equal names are one string object."""
        return _shared_strings(self._table.column("image"))

    @property
    def objectives(self) -> list[str]:
        """The objective of every row; equal names are one string object."""
        return _shared_strings(self._table.column("objective"))

    def __reduce__(self) -> Any:
        # a worker process maps the file again instead of receiving its content
        return open_conversations, (self.path,)


def write_conversations(folder: Path, conversations: Iterable[Conversation]) -> dict[str, int]:
    """Write `folder/conversations.arrow` batch by batch and rename it into place at the end.

    Returns counts: images, conversations, and turns by objective (loc_pred, neg_pred and rev_loc always, 0 if none).
    Raises DataError for a conversation without turns, or with text that cannot be stored.
    """
    counts = Counter(dict.fromkeys(("conversations", *STRUCTURED), 0))
    images: set[str] = set()
    rest = iter(conversations)
    with atomic_write(folder / ARROW_NAME, "wb") as file, pa.ipc.new_file(file, _SCHEMA) as writer:
        while rows := list(islice(rest, _ROWS_A_BATCH)):
            writer.write_batch(_batch(rows))
            counts["conversations"] += len(rows)
            images.update(row.image for row in rows)
            counts.update(turn.objective for row in rows for turn in row.turns)
    return {"images": len(images), **counts}


def open_conversations(path: Path) -> ConversationFile:
    """Open a dataset folder, an Arrow file written by `write_conversations`, or a LLaVA JSON list (.json, .json.gz).

    An Arrow file is mapped into memory, checked once and read row by row. A LLaVA list is read whole, each record once;
    its turns are literal and a record that cannot be used is counted in `.skipped`.
    Raises DataError for a missing, cut-short or foreign file, or when most records of a list cannot be used.
    """
    file = _find(path)
    if file.name.endswith((".json", ".json.gz")):
        return _read_llava(file)
    has_manifest = (file.parent / "manifest.json").is_file()
    return ConversationFile(_map_arrow(file), file, read_manifest(file.parent) if has_manifest else None)


def llava_record(conversation: Conversation, text_turns: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """One record of a LLaVA list: `text_turns` are the rendered (question, answer) pairs of the conversation.

    Besides LLaVA's `id`, `image` and `conversations` it holds the image size, the objective, and the structured turns
    (objective, category, description, box in pixels), so that the text can be rendered again in another form.
    """
    messages = []
    for number, (question, answer) in enumerate(text_turns):
        asked = f"{IMAGE}\n{question}" if number == 0 else question
        messages += [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]
    record: dict[str, Any] = {
        "id": conversation.id,
        "image": conversation.image,
        "width": conversation.width,
        "height": conversation.height,
        "objective": conversation.objective,
        "conversations": messages,
    }
    places = [_place(turn) for turn in conversation.turns]
    if any(turn.objective in STRUCTURED for turn in conversation.turns):
        record["turns"] = places
    return record


def _place(turn: Turn) -> dict[str, Any]:
    place: dict[str, Any] = {"objective": turn.objective}
    if turn.category:
        place["category"] = turn.category
    if turn.description:
        place["description"] = turn.description
    if turn.box_xyxy is not None:
        place["box_xyxy"] = list(turn.box_xyxy)
    return place


def _batch(rows: Sequence[Conversation]) -> pa.RecordBatch:
    """One record batch; columns are filled flat, which is many times quicker than row by row."""
    offsets = [0]
    turns: list[Turn] = []
    for row in rows:
        if not row.turns:
            raise DataError(f"writing the conversation {row.id!r} about {row.image}: it has no turns, it needs one")
        turns.extend(row.turns)
        offsets.append(len(turns))
    try:
        structs = pa.StructArray.from_arrays(
            [
                pa.array([turn.objective for turn in turns], pa.string()),
                pa.array([turn.category for turn in turns], pa.string()),
                pa.array([turn.description for turn in turns], pa.string()),
                pa.array([turn.box_xyxy for turn in turns], _BOX),
                pa.array([turn.question for turn in turns], pa.string()),
                pa.array([turn.answer for turn in turns], pa.string()),
            ],
            fields=list(_TURN),
        )
        return pa.RecordBatch.from_arrays(
            [
                pa.array([row.id for row in rows], pa.string()),
                pa.array([row.image for row in rows], pa.string()),
                pa.array([row.width for row in rows], pa.int64()),
                pa.array([row.height for row in rows], pa.int64()),
                pa.array([row.objective for row in rows], pa.string()),
                pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), structs, type=_SCHEMA.field("turns").type),
            ],
            schema=_SCHEMA,
        )
    except (UnicodeEncodeError, OverflowError, pa.ArrowInvalid, pa.ArrowTypeError) as fault:
        raise DataError(
            f"writing the conversations {rows[0].id!r} to {rows[-1].id!r}: a value cannot be stored ({fault}); "
            "text must be valid Unicode and a box four numbers"
        ) from None


def _conversation(batch: pa.RecordBatch, row: int) -> Conversation:
    """One row as an object; slices of flat columns are quicker to convert than nested scalars."""
    name, image, width, height, objective = (batch.column(number)[row].as_py() for number in range(5))
    nested = batch.column(5)
    start, stop = nested.offsets[row].as_py(), nested.offsets[row + 1].as_py()
    values = nested.values
    columns = [values.field(number).slice(start, stop - start).to_pylist() for number in range(len(_TURN))]
    turns = tuple(
        Turn(kind, category, description, None if box is None else _as_box(box), question, answer)
        for kind, category, description, box, question, answer in zip(*columns, strict=True)
    )
    return Conversation(name, image, width, height, objective, turns)


def _as_box(numbers: Sequence[float]) -> BoxXYXY:
    x1, y1, x2, y2 = numbers
    return (x1, y1, x2, y2)


def _shared_strings(column: pa.ChunkedArray) -> list[str]:
    encoded = pc.dictionary_encode(column).combine_chunks()
    if isinstance(encoded, pa.ChunkedArray):  # no chunk at all
        return []
    names = encoded.dictionary.to_pylist()
    return [names[code] for code in encoded.indices.to_numpy()]


def _find(path: Path) -> Path:
    if not path.exists():
        raise DataError(f"opening the conversations {path}: there is no such file or folder")
    if not path.is_dir():
        return path
    for name in (ARROW_NAME, LLAVA_NAME):
        if (path / name).is_file():
            return path / name
    raise DataError(
        f"opening the conversations {path}: the folder holds neither {ARROW_NAME} nor {LLAVA_NAME}; "
        "build it with `locvlm data ...`"
    )


def _map_arrow(file: Path) -> pa.Table:
    try:
        table = pa.ipc.open_file(pa.memory_map(str(file))).read_all()
        if table.schema.equals(_SCHEMA):
            table.validate(full=True)  # damage inside the file would otherwise be read as text and boxes
            return table
        fault = f"its columns are {', '.join(table.schema.names) or 'none'}"
    except (pa.ArrowException, OSError) as error:
        fault = str(error).splitlines()[0]
    raise DataError(
        f"opening the conversations {file}: not a conversation file of LocVLM, or cut short ({fault}); "
        "build it again with `locvlm data ...`"
    )


def _read_llava(file: Path) -> ConversationFile:
    """A LLaVA list as literal conversations, held in Arrow buffers rather than as Python objects."""
    data = read_bytes(file)
    try:
        raws: Sequence[Any] = msgspec.json.decode(data, type=list[msgspec.Raw])
    except msgspec.DecodeError:
        raws = _encode_again(file, data)
    if not raws:
        raise DataError(f"opening the conversations {file}: the list is empty, it needs at least one record")
    skipped: Counter[str] = Counter()
    conversations = _usable_records(raws, skipped)
    batches = []
    while rows := list(islice(conversations, _ROWS_A_BATCH)):
        batches.append(_batch(rows))
    refuse_if_most_skipped(file, "records", skipped, len(raws))
    return ConversationFile(pa.Table.from_batches(batches, _SCHEMA), file, None, skipped)


def _encode_again(file: Path, data: bytes) -> list[bytes]:
    """The records of a list that has NaN or broken Unicode somewhere: only such records are lost, not the file."""
    value = decode_json(file, data)
    if not isinstance(value, list):
        raise DataError(
            f"opening the conversations {file}: found a {type(value).__name__} at the top; needed is a LLaVA list "
            "[{id, image, conversations: [{from, value}]}]"
        )
    raws = []
    for record in value:
        try:
            raws.append(msgspec.json.encode(record))
        except UnicodeEncodeError:
            raws.append(b"null")
    return raws


def _usable_records(raws: Sequence[Any], skipped: Counter[str]) -> Iterator[Conversation]:
    decoder = msgspec.json.Decoder(_LlavaRecord)
    for number, raw in enumerate(raws):
        try:
            record = decoder.decode(raw)
        except (msgspec.DecodeError, UnicodeDecodeError):
            skipped["record that does not have the form {id, image, conversations: [{from, value}]}"] += 1
            continue
        conversation = _literal(record, number)
        if isinstance(conversation, str):
            skipped[conversation] += 1
        else:
            yield conversation


def _literal(record: _LlavaRecord, number: int) -> Conversation | str:
    """The conversation of one record, or why it cannot be used. A record without an id is called by its number."""
    messages = record.conversations
    if record.image is None:
        return "record without an image (text only)"
    if leads_out(record.image):
        return "image file name that leads out of the image folder"
    if not messages:
        return "record without conversations"
    senders = [message.sender for message in messages]
    if senders != ["human", "gpt"] * (len(messages) // 2):
        return "turns that are not human and gpt in turn"
    texts = [message.value for message in messages]
    texts[0] = _without_image_token(texts[0])
    if any(IMAGE in text or STOP in text for text in texts):
        return f"{IMAGE} outside the first question, or {STOP} in a text"
    if not all(text.strip() for text in texts[1:]):  # a lone first question may be nothing but the image
        return "empty question or answer"
    if not texts[0].strip() and len(texts) > 2:
        return "empty question or answer"
    objective = record.objective or "text"
    # the text is given: a structured objective would be rendered again
    kind = "text" if objective in STRUCTURED else objective
    turns = tuple(Turn(kind, question=q, answer=a) for q, a in zip(texts[::2], texts[1::2], strict=True))
    name = f"row-{number}" if record.id is None else str(record.id)
    return Conversation(name, record.image, whole(record.width) or 0, whole(record.height) or 0, objective, turns)


def _without_image_token(question: str) -> str:
    """LLaVA puts the token before or after the first question, on a line of its own."""
    if question.startswith(IMAGE):
        return question.removeprefix(IMAGE).lstrip()
    if question.endswith(IMAGE):
        return question.removesuffix(IMAGE).rstrip()
    return question
