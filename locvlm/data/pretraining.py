"""Conversations from what others published: captions for stage 1 (LLaVA's CC3M-595K and LCS-558K lists, plain CC3M tar
shards), instruction data (LLaVA-Instruct, VideoInstruct-100K).

Everything is read record by record, so that a list of a gigabyte needs no gigabyte of memory. A data set is made from
parts (a piece of a list, a tar file) that outlive a kill: each is read, and its images are checked, once.
"""

import codecs
import gzip
import json
import shutil
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from hashlib import blake2b
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Literal

import msgspec

from locvlm.data.coco import BAD_FILE, MISSING_FILE
from locvlm.data.conversations import TEXT_ONLY, literal_conversations, open_conversations, write_conversations
from locvlm.data.instruct import draw
from locvlm.data.shards import IndexWriter, Member, TarMembers, is_image_name, shard_path, tar_members
from locvlm.errors import DataError
from locvlm.pixels import ImageSource, ShardFile
from locvlm.prompts import BRIEF_REQUESTS, IMAGE, STOP
from locvlm.records import Conversation, Manifest, Turn, encodable, read_manifest, write_manifest

NOT_ONE_CAPTION = "record that is not one request and one caption"
REPEATED = "conversation that occurred before: the same image, the same words"
REPEATED_IMAGE = "image of a tar file whose name occurred before"
NO_CAPTION = "sample of a tar file without a caption"
NO_IMAGE = "sample of a tar file without an image"
BAD_CAPTION = f"caption that is empty, holds {IMAGE} or {STOP}, or is not valid Unicode"
BAD_QA = "record that does not have the form {q, a, video_id}"
MISSING_VIDEO = "question about a video that is missing"
# what says nothing against a list: images may be there in part only, text-only records are known to be in it
HARMLESS = (MISSING_FILE, MISSING_VIDEO, REPEATED, REPEATED_IMAGE, TEXT_ONLY)

RECORDS_A_PART = 20_000

_BLOCK = 1 << 20
_LONGEST_RECORD = 16 << 20  # characters; a list that is broken at one place must not be searched to its end
_LONGEST_TEXT = 1 << 20  # bytes of a caption in a tar file
_CHECKED_AT_A_TIME = 256
_THREADS = 8

Grouping = Literal["qa", "video"]


class _Caption(msgspec.Struct, gc=False):
    caption: str | None = None


class _VideoQA(msgspec.Struct, gc=False):
    q: str
    a: str
    video_id: str


def stream_list(path: Path, on_block: Callable[[], object] = lambda: None) -> Iterator[bytes]:
    """The records of a JSON list, plain or gzip, undecoded, one after the other; `on_block` is called after each MiB.

    Raises DataError for a file that cannot be read, is no JSON list, or is cut short.
    """
    decoder = json.JSONDecoder()
    text, wanted = "", "list"
    blocks = _blocks(path, on_block)
    for block in blocks:
        text, place = text + block, 0
        while (place := _skip_space(text, place)) < len(text):
            mark = text[place]
            if mark == "]" and wanted in ("first record", "comma"):
                if text[place + 1 :].strip() or any(block.strip() for block in blocks):
                    raise _no_list(path, "there is something after the list")
                return
            if mark == {"list": "[", "comma": ","}.get(wanted):
                wanted, place = "first record" if mark == "[" else "record", place + 1
                continue
            if wanted in ("list", "comma"):
                raise _no_list(path, f"found {text[place : place + 40]!r}")
            end = _end_of_value(decoder, text, place)
            if end is None:  # it goes on in the next block, or is damaged
                if len(text) - place > _LONGEST_RECORD:
                    raise _no_list(path, f"no record ends after {text[place : place + 40]!r}")
                break
            yield text[place:end].encode()
            wanted, place = "comma", end
        text = text[place:]
    raise _no_list(path, "it is empty" if wanted == "list" else f"it breaks off or is damaged at {text[:40]!r}")


def _end_of_value(decoder: json.JSONDecoder, text: str, place: int) -> int | None:
    """Where the value ends; None unless it is whole, which what follows it must show."""
    try:
        end = decoder.raw_decode(text, place)[1]
    except (ValueError, RecursionError):
        return None
    follows = _skip_space(text, end)
    return end if text[follows : follows + 1] in (",", "]") else None


def _skip_space(text: str, place: int) -> int:
    while place < len(text) and text[place] in " \t\r\n":
        place += 1
    return place


def _blocks(path: Path, on_block: Callable[[], object]) -> Iterator[str]:
    decode = codecs.getincrementaldecoder("utf-8-sig")()
    try:
        with open(path, "rb") as raw:
            is_packed = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            with gzip.open(raw) if is_packed else nullcontext(raw) as file:
                while data := file.read(_BLOCK):
                    yield decode.decode(data)
                    on_block()
            decode.decode(b"", final=True)
    except FileNotFoundError:
        raise DataError(f"reading {path}: there is no such file") from None
    except UnicodeDecodeError as fault:
        raise _no_list(path, str(fault)) from None
    except (OSError, EOFError, zlib.error) as fault:
        raise DataError(f"reading {path}: {fault}; it may be cut short, copy or download it again") from None


def _no_list(path: Path, found: str) -> DataError:
    return DataError(f"reading {path}: not a whole JSON list of records ({found}); copy or download it again")


class Parts:
    """The parts of a data set under way, in a folder of their own that outlives a kill.

    `key` says what the data set is made from. Parts that were made from something else are thrown away.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self._folder = folder
        self.made: list[Path] = []
        marker = folder / "key"
        if not marker.is_file() or marker.read_text() != key:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            marker.write_text(key)

    def make(self, name: str, fill: Callable[[Path, Counter[str]], Iterable[Conversation]]) -> None:
        """Make the next part unless it is there. `fill` gives its conversations and counts what it skips."""
        part = self._folder / name
        if not (part / "manifest.json").is_file():
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()
            skipped: Counter[str] = Counter()
            counts = write_conversations(part, fill(part, skipped))
            write_manifest(part, Manifest("part", counts, dict(skipped)))
        self.made.append(part)

    def skipped(self) -> Counter[str]:
        """Reason -> number of records that were skipped in all parts."""
        total: Counter[str] = Counter()
        for part in self.made:
            total.update(read_manifest(part)["skipped"])
        return total

    def conversations(self) -> Iterator[Conversation]:
        """Those of all parts, in their order."""
        for part in self.made:
            yield from open_conversations(part)

    def index(self) -> IndexWriter:
        """The images of all parts, which were made from tar files."""
        index = IndexWriter()
        for part in self.made:
            index.add_index(part)
        return index

    def remove(self) -> None:
        """When the data set is whole."""
        shutil.rmtree(self._folder, ignore_errors=True)


def listed_captions(records: Iterable[bytes], skipped: Counter[str], first: int = 0) -> Iterator[Conversation]:
    """Stage-1 conversations from the undecoded records of a LLaVA caption list (CC3M-595K's chat.json, LCS-558K).

    The question is LLaVA's request; the plain format of stage 1 leaves it away. White space in a caption becomes single
    spaces, since a caption is one line. `first`: the number of the first record in its list.
    """
    for conversation in literal_conversations(records, skipped, first):
        if len(conversation.turns) != 1:
            skipped[NOT_ONE_CAPTION] += 1
            continue
        (turn,) = conversation.turns
        turn = Turn("caption", question=turn.question, answer=" ".join(turn.answer.split()))
        yield replace(conversation, objective="caption", turns=(turn,))


def tar_captions(path: Path, part: Path, final: Path, skipped: Counter[str], seed: int) -> Iterator[Conversation]:
    """Stage-1 conversations from one tar file of a webdataset, as img2dataset writes CC3M: members that follow one
    another and share their name up to the first dot are a sample, with an image and a .txt, or .json with "caption".

    Images are decoded where they lie; `part/images.arrow` indexes the sound ones for a data set that will be at
    `final`. The question is one of LLaVA's requests, drawn by (seed, image name).
    """
    index, shard = IndexWriter(), shard_path(path, final)
    samples = _samples(path, skipped)
    while window := list(islice(samples, _CHECKED_AT_A_TIME)):
        members = {member.name: member for member, _ in window}
        conversations = (_captioned(member.name, caption, seed) for member, caption in window)
        for conversation in with_sound_images(conversations, TarMembers(path, members.values()), skipped):
            index.add(shard, members[conversation.image])
            yield conversation
    index.write(part)


def _captioned(name: str, caption: str, seed: int) -> Conversation:
    request = BRIEF_REQUESTS[draw(len(BRIEF_REQUESTS), seed, "request", name)]
    key = PurePosixPath(name).name.partition(".")[0]
    return Conversation(key, name, 0, 0, "caption", (Turn("caption", question=request, answer=caption),))


def _samples(path: Path, skipped: Counter[str]) -> Iterator[tuple[Member, str]]:
    """Image and caption of each sample of a tar file."""
    file = ShardFile(path)
    key, members = "", list[Member]()
    for member in tar_members(path, skipped):
        name = PurePosixPath(member.name)
        found = str(name.parent / name.name.partition(".")[0])
        if found != key:
            yield from _sample(file, members, skipped)
            key, members = found, []
        members.append(member)
    yield from _sample(file, members, skipped)


def _sample(file: ShardFile, members: Sequence[Member], skipped: Counter[str]) -> Iterator[tuple[Member, str]]:
    if not members:
        return
    image = next((member for member in members if is_image_name(member.name)), None)
    texts = [_text(file, member) for kind in (".txt", ".json") for member in members if member.name.endswith(kind)]
    found = [text for text in texts if text is not None]
    if image is None:
        skipped[NO_IMAGE] += 1
    elif not found:
        skipped[NO_CAPTION] += 1
    else:
        caption = " ".join(found[0].split())
        if not caption or IMAGE in caption or STOP in caption or not encodable(caption):
            skipped[BAD_CAPTION] += 1
        else:
            yield image, caption


def _text(file: ShardFile, member: Member) -> str | None:
    """The caption in a member; None when there is none in it."""
    if member.size > _LONGEST_TEXT:
        return None
    data = file.read(member.offset, member.size)
    try:
        return msgspec.json.decode(data, type=_Caption).caption if member.name.endswith(".json") else data.decode()
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def dead_links(tars: Iterable[Path]) -> int:
    """How many images img2dataset could not download or use, by the <shard>_stats.json files beside its tar files."""
    n = 0
    for path in tars:
        stats = path.with_name(f"{path.stem}_stats.json")
        if stats.is_file():
            try:
                found = json.loads(stats.read_bytes())
                n += int(found["failed_to_download"]) + int(found["failed_to_resize"])
            except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
                continue
    return n


def video_instructions(
    path: Path, file_name: Callable[[str], str | None], skipped: Counter[str], grouping: Grouping = "qa"
) -> Iterator[Conversation]:
    """Conversations about videos from VideoInstruct-100K, a list of {q, a, video_id}.

    `file_name`: video id -> the video's file, None when it is missing. `grouping`: one conversation a question, as
    Video-ChatGPT trains ("qa"), or one a video, in the order of the first question about each ("video").
    """
    singles = literal_conversations(_video_records(path, file_name, skipped), skipped)
    if grouping == "qa":
        yield from singles
        return
    videos: dict[str, list[Conversation]] = {}
    for single in singles:
        videos.setdefault(single.image, []).append(single)
    for group in videos.values():
        turns = tuple(turn for single in group for turn in single.turns)
        yield replace(group[0], id=PurePosixPath(group[0].image).stem, turns=turns)


def _video_records(path: Path, file_name: Callable[[str], str | None], skipped: Counter[str]) -> Iterator[bytes]:
    """The questions as LLaVA records about a video, called <video id>-0, -1, ..."""
    decoder = msgspec.json.Decoder(_VideoQA)
    numbers: Counter[str] = Counter()
    for raw in stream_list(path):
        try:
            found = decoder.decode(raw)
        except (msgspec.DecodeError, UnicodeDecodeError):
            skipped[BAD_QA] += 1
            continue
        name = file_name(found.video_id)
        if name is None:
            skipped[MISSING_VIDEO] += 1
            continue
        messages = [{"from": "human", "value": found.q}, {"from": "gpt", "value": found.a}]
        key = f"{found.video_id}-{numbers[found.video_id]}"
        numbers[found.video_id] += 1
        yield msgspec.json.encode({"id": key, "video": name, "conversations": messages})


def with_sound_images(
    conversations: Iterable[Conversation], source: ImageSource, skipped: Counter[str]
) -> Iterator[Conversation]:
    """The conversations whose image is there and decodes, with its size; the others are counted by reason. Of a video
    it is only looked whether it is there."""
    rest = iter(conversations)
    with ThreadPoolExecutor(_THREADS) as pool:  # Pillow decodes outside the interpreter's lock
        while batch := list(islice(rest, _CHECKED_AT_A_TIME)):
            keys = list(dict.fromkeys((conversation.image, conversation.medium) for conversation in batch))
            sizes = dict(zip(keys, pool.map(lambda key: _size(source, *key), keys), strict=True))
            for conversation in batch:
                size = sizes[conversation.image, conversation.medium]
                if isinstance(size, str):
                    skipped[size] += 1
                else:
                    yield replace(conversation, width=size[0], height=size[1])


def _size(source: ImageSource, name: str, medium: str) -> tuple[int, int] | str:
    if not source.has(name):
        return MISSING_FILE
    if medium == "video":
        return (0, 0)
    try:
        return source.checked_size(name)
    except DataError:
        return BAD_FILE


def distinct(
    conversations: Iterable[Conversation], skipped: Counter[str], *, by_image: bool = False
) -> Iterator[Conversation]:
    """Each conversation once: one that repeats an earlier one, words and image (or, `by_image`, the image's name, which
    an index can hold once only), is counted. A repetition is known by an 8-byte digest."""
    seen: set[bytes] = set()
    for conversation in conversations:
        digest = blake2b(conversation.image.encode(), digest_size=8)
        if not by_image:
            for turn in conversation.turns:
                digest.update(f"\0{turn.question}\0{turn.answer}".encode())
        if digest.digest() in seen:
            skipped[REPEATED_IMAGE if by_image else REPEATED] += 1
            continue
        seen.add(digest.digest())
        yield conversation
