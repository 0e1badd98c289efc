"""Conversations on disk: an Arrow IPC file that a rank maps into memory, and LLaVA's JSON list.

A dataset folder holds `conversations.arrow` and `manifest.json`. One Arrow row is one conversation; its turns are a
list of structs, so that any Arrow reader (pandas, polars, Ray Data) can open the file. Boxes are doubles in pixels.
"""

from abc import abstractmethod
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from locvlm.data.coco import decode_json, read_bytes, refuse_if_most_skipped, whole
from locvlm.errors import DataError
from locvlm.prompts import IMAGE, STOP, VIDEO
from locvlm.records import BoxXYXY, Conversation, Turn, atomic_write, leads_out, read_manifest

ARROW_NAME = "conversations.arrow"
LLAVA_NAME = "conversations.json"
STRUCTURED = ("loc_pred", "neg_pred", "rev_loc")
TEXT_ONLY = "record without an image (text only): the model is always shown one"

_ROWS_A_BATCH = 8192
_ROWS_AT_A_TIME = 512

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
        pa.field("medium", pa.string(), nullable=False),
    ]
)
_SCHEMA_WITHOUT_MEDIUM = _SCHEMA.remove(_SCHEMA.get_field_index("medium"))  # of files written before there were videos


class _Message(msgspec.Struct, gc=False):
    sender: str = msgspec.field(name="from")
    value: str


class _Pair(msgspec.Struct, gc=False):
    q: str
    a: str


class _LlavaRecord(msgspec.Struct, gc=False):
    id: str | int | None = None
    image: str | None = None
    video: str | None = None
    conversations: list[_Message] | None = None
    pairs: list[_Pair] | None = msgspec.field(name="QA", default=None)  # VideoChat's form
    objective: str | None = None
    width: int | float | None = None
    height: int | float | None = None


class ConversationBatches(Iterable[Conversation]):
    """Conversations that are made as Arrow batches, thousands at a time; each becomes an object only when iterated."""

    @abstractmethod
    def batches(self) -> Iterator[pa.RecordBatch]:
        """The batches, made with `record_batch`."""

    def __iter__(self) -> Iterator[Conversation]:
        for batch in self.batches():
            yield from _conversations(batch)


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
            for start in range(0, batch.num_rows, _ROWS_AT_A_TIME):
                yield from _conversations(batch.slice(start, _ROWS_AT_A_TIME))

    @property
    def table(self) -> pa.Table:
        """The rows as an Arrow table, to count over whole columns; those of an Arrow file stay mapped."""
        return self._table

    @property
    def images(self) -> list[str]:
        """The image name of every row; equal names are one string object."""
        return _shared_strings(self._table.column("image"))

    @property
    def objectives(self) -> list[str]:
        """The objective of every row; equal names are one string object."""
        return _shared_strings(self._table.column("objective"))

    def about_videos(self) -> npt.NDArray[np.bool_]:
        """Which conversations are about a video."""
        return np.asarray(pc.equal(self._table.column("medium"), "video"), np.bool_)

    def text_lengths(self) -> npt.NDArray[np.int64]:
        """About how many characters each conversation has when it is rendered, without rendering it."""
        turns = self._table.column("turns").combine_chunks()
        values = turns.values
        lengths = np.zeros(len(values), np.int64)
        for name, times in (("question", 1), ("answer", 1), ("category", 1), ("description", 1)):
            lengths += times * pc.utf8_length(values.field(name)).fill_null(0).to_numpy(zero_copy_only=False)
        lengths += np.where(pc.utf8_length(values.field("question")).to_numpy(zero_copy_only=False) == 0, 80, 0)
        totals = np.concatenate([[0], np.cumsum(lengths)])
        offsets = turns.offsets.to_numpy()
        return np.asarray(totals[offsets[1:]] - totals[offsets[:-1]], np.int64)

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
    batches = conversations.batches() if isinstance(conversations, ConversationBatches) else _batches(conversations)
    with atomic_write(folder / ARROW_NAME, "wb") as file, pa.ipc.new_file(file, _SCHEMA) as writer:
        for batch in batches:
            writer.write_batch(batch)
            counts["conversations"] += batch.num_rows
            images.update(pc.unique(batch.column("image")).to_pylist())
            for entry in pc.value_counts(batch.column("turns").values.field("objective")).to_pylist():
                counts[entry["values"]] += entry["counts"]
    return {"images": len(images), **counts}


def open_conversations(path: Path) -> ConversationFile:
    """Open a dataset folder, an Arrow file written by `write_conversations`, or a LLaVA JSON list (.json, .json.gz).

    An Arrow file is mapped into memory, checked once and read row by row. A LLaVA list is read whole, each record once;
    its turns are literal and a record that cannot be used is counted in `.skipped`.
    Raises DataError for a missing, cut-short or foreign file, or when most records of a list cannot be used.
    """
    file = _find(path)
    # a list of any other name may lie beside the manifest of something else
    is_ours = file.name in (ARROW_NAME, LLAVA_NAME) and (file.parent / "manifest.json").is_file()
    manifest = read_manifest(file.parent) if is_ours else None
    if file.name.endswith((".json", ".json.gz")):
        return _read_llava(file, manifest)
    return ConversationFile(_map_arrow(file), file, manifest)


def llava_record(conversation: Conversation, text_turns: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """One record of a LLaVA list: `text_turns` are the rendered (question, answer) pairs of the conversation.

    Besides LLaVA's `id`, `image` and `conversations` it holds the image size, the objective, and the structured turns
    (objective, category, description, box in pixels), so that the text can be rendered again in another form.
    A conversation about a video has the key `video` in place of `image`, and begins with `<video>`.
    """
    messages = []
    token = VIDEO if conversation.medium == "video" else IMAGE
    for number, (question, answer) in enumerate(text_turns):
        asked = f"{token}\n{question}" if number == 0 else question
        messages += [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]
    record: dict[str, Any] = {
        "id": conversation.id,
        conversation.medium: conversation.image,
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


def record_batch(columns: Mapping[str, pa.Array], offsets: pa.Array, turns: Mapping[str, pa.Array]) -> pa.RecordBatch:
    """Conversations from columns by name; `offsets` (int32, one more than there are conversations) says which `turns`
    belong to each. A text of the turns that is not given is empty, and `medium` is image.

    Raises ArrowInvalid when the columns do not fit.
    """
    n_turns = offsets[-1].as_py()
    structs = pa.StructArray.from_arrays(
        [turns[column.name] if column.name in turns else pa.repeat("", n_turns) for column in _TURN],
        fields=list(_TURN),
    )
    nested = pa.ListArray.from_arrays(offsets, structs, type=_SCHEMA.field("turns").type)
    whole_columns = {"medium": pa.repeat("image", len(nested)), **columns, "turns": nested}
    return pa.RecordBatch.from_arrays([whole_columns[name] for name in _SCHEMA.names], schema=_SCHEMA)


def box_column(boxes: npt.NDArray[np.float64], missing: npt.NDArray[np.bool_]) -> pa.Array:
    """The column of `boxes` [n, 4] float64; null where `missing` [n]."""
    values = np.where(missing[:, None], 0.0, boxes)
    return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), type=_BOX, mask=pa.array(missing))


def _batches(conversations: Iterable[Conversation]) -> Iterator[pa.RecordBatch]:
    rest = iter(conversations)
    while rows := list(islice(rest, _ROWS_A_BATCH)):
        yield _batch(rows)


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
        return record_batch(
            {
                "id": pa.array([row.id for row in rows], pa.string()),
                "image": pa.array([row.image for row in rows], pa.string()),
                "width": pa.array([row.width for row in rows], pa.int64()),
                "height": pa.array([row.height for row in rows], pa.int64()),
                "objective": pa.array([row.objective for row in rows], pa.string()),
                "medium": pa.array([row.medium for row in rows], pa.string()),
            },
            pa.array(offsets, pa.int32()),
            {
                "objective": pa.array([turn.objective for turn in turns], pa.string()),
                "category": pa.array([turn.category for turn in turns], pa.string()),
                "description": pa.array([turn.description for turn in turns], pa.string()),
                "box_xyxy": pa.array([turn.box_xyxy for turn in turns], _BOX),
                "question": pa.array([turn.question for turn in turns], pa.string()),
                "answer": pa.array([turn.answer for turn in turns], pa.string()),
            },
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
    return Conversation(name, image, width, height, objective, turns, batch.column(6)[row].as_py())


def _conversations(batch: pa.RecordBatch) -> Iterator[Conversation]:
    """All rows as objects, many times quicker than one after the other."""
    nested = batch.column(5)
    offsets = nested.offsets.to_numpy()
    columns = [column.to_pylist() for column in nested.flatten().flatten()]
    columns[3] = [None if box is None else _as_box(box) for box in columns[3]]
    turns = list(map(Turn, *columns))
    ends = (offsets - offsets[0]).tolist()
    heads = (column.to_pylist() for number, column in enumerate(batch.columns) if number != 5)
    for row, (name, image, width, height, objective, medium) in enumerate(zip(*heads, strict=True)):
        yield Conversation(name, image, width, height, objective, tuple(turns[ends[row] : ends[row + 1]]), medium)


def _as_box(numbers: Sequence[float]) -> BoxXYXY:
    x1, y1, x2, y2 = numbers
    return (x1, y1, x2, y2)


def _shared_strings(column: pa.ChunkedArray) -> list[str]:
    """The texts of a column; equal ones are one string object."""
    known: dict[str, str] = {}
    return [known.setdefault(name, name) for chunk in column.chunks for name in chunk.to_pylist()]


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
        if table.schema.equals(_SCHEMA_WITHOUT_MEDIUM):
            table = table.append_column(_SCHEMA.field("medium"), pa.repeat(pa.scalar("image"), len(table)))
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


def _read_llava(file: Path, manifest: dict[str, Any] | None) -> ConversationFile:
    """A LLaVA list as literal conversations, held in Arrow buffers rather than as Python objects."""
    data = read_bytes(file)
    try:
        raws: Sequence[Any] = msgspec.json.decode(data, type=list[msgspec.Raw])
    except (msgspec.DecodeError, RecursionError):
        raws = _encode_again(file, data)
    if not raws:
        raise DataError(f"opening the conversations {file}: the list is empty, it needs at least one record")
    skipped: Counter[str] = Counter()
    batches = list(_batches(literal_conversations(raws, skipped)))
    refuse_if_most_skipped(file, "records", skipped, len(raws))
    return ConversationFile(pa.Table.from_batches(batches, _SCHEMA), file, manifest, skipped)


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
        except (UnicodeEncodeError, OverflowError):
            raws.append(b"null")
    return raws


def literal_conversations(
    raws: Iterable[bytes | msgspec.Raw], skipped: Counter[str], first: int = 0
) -> Iterator[Conversation]:
    """The conversations of undecoded LLaVA records, their turns literal; a record that cannot be used is counted.

    `first`: the number of the first record in its list, by which records without an id are called.
    """
    decoder = msgspec.json.Decoder(_LlavaRecord)
    for number, raw in enumerate(raws, first):
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
    messages = record.conversations or [
        _Message(sender, text) for pair in record.pairs or () for sender, text in (("human", pair.q), ("gpt", pair.a))
    ]
    medium, token, name = "image", IMAGE, record.image
    if name is None:
        medium, token, name = "video", VIDEO, record.video
    if name is None:
        return TEXT_ONLY
    if leads_out(name):
        return f"{medium} file name that leads out of the {medium} folder"
    if not messages:
        return "record without conversations"
    senders = [message.sender for message in messages]
    if senders != ["human", "gpt"] * (len(messages) // 2):
        return "turns that are not human and gpt in turn"
    texts = [message.value for message in messages]
    texts[0] = _without_token(texts[0], token)
    if any(IMAGE in text or token in text or STOP in text for text in texts):
        return f"{token} outside the first question, or {STOP} in a text"
    if not all(text.strip() for text in texts[1:]):  # a lone first question may be nothing but the image
        return "empty question or answer"
    if not texts[0].strip() and len(texts) > 2:
        return "empty question or answer"
    objective = record.objective or "text"
    # the text is given: a structured objective would be rendered again
    kind = "text" if objective in STRUCTURED else objective
    turns = tuple(Turn(kind, question=q, answer=a) for q, a in zip(texts[::2], texts[1::2], strict=True))
    key = f"row-{number}" if record.id is None else str(record.id)
    return Conversation(key, name, whole(record.width) or 0, whole(record.height) or 0, objective, turns, medium)


def _without_token(question: str, token: str) -> str:
    """LLaVA puts the token before or after the first question, on a line of its own."""
    if question.startswith(token):
        return question.removeprefix(token).lstrip()
    if question.endswith(token):
        return question.removesuffix(token).rstrip()
    return question
