"""The card of a data set: Markdown with the header that the Hugging Face hub reads.

All it says comes from manifest.json and the data. What they do not say is called not recorded; nothing is guessed. The
warnings about overlap say from which names they were concluded.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import yaml

from locvlm.data.actnet import VIDEOS_NAME
from locvlm.data.conversations import ARROW_NAME, LLAVA_NAME, STRUCTURED, open_conversations
from locvlm.data.instruct import Renderer
from locvlm.data.names import coco_image_id
from locvlm.data.pages import number
from locvlm.data.rows import decode_row, split_rows
from locvlm.errors import DataError
from locvlm.records import read_manifest

NOT_RECORDED = "not recorded"
QUESTIONS_NAME = "questions.jsonl"
PAPER = "Learning to Localize Objects Improves Spatial Reasoning in Visual-LLMs"

_SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"))
_CITATION = f"""@inproceedings{{ranasinghe2024learning,
  title = {{{PAPER}}},
  author = {{Ranasinghe, Kanchana and Shukla, Satya Narayan and Poursaeed, Omid and Ryoo, Michael S.
            and Lin, Tsung-Yu}},
  booktitle = {{Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)}},
  year = {{2024}}
}}"""
_KINDS = {
    "conversations": "conversations for training: turns of question and answer about an image or a video",
    "questions": "questions with known answers, for evaluation",
    "labels": "labels of videos: the segments of a few frames of each, and the categories that none of them shows",
    "annotations": "annotated images in COCO's format, for building other data sets",
    "other": "files for building other data sets",
}
_OBJECTIVES = {
    "loc_pred": "LocPred: where is this object?",
    "neg_pred": "NegPred: where is this object, which is not there?",
    "rev_loc": "RevLoc: what is at this place?",
}
# the verbs that build data sets of other names, by the beginning of these
_VERBS = {"hal-": "hallucination", "pope-": "pope"}
# what is known of COCO's splits, by the word for a split in the name of an annotation file or an image
_OVERLAPS = {
    "train2017": "train2017 is train2014 and about 35,000 images of val2014. Images of the val and test splits of "
    "RefCOCO, RefCOCO+ and RefCOCOg (all of train2014), of VQAv2 val and of POPE (both val2014) can be among these.",
    "val2017": "val2017 is a part of val2014. Images of VQAv2 val and of POPE can be among these.",
    "train2014": "train2014 holds the images of RefCOCO, RefCOCO+ and RefCOCOg, their val and test splits included.",
    "val2014": "val2014 holds the images of VQAv2 val and of POPE, and all of val2017.",
}


@dataclass(frozen=True, slots=True)
class _Content:
    """What the card tells of the data themselves. `names`: of the distinct images or videos."""

    kind: str
    records: int | None
    medium: str
    names: frozenset[str]
    example: str
    text: str
    structured: bool
    load: str


def dataset_card(folder: Path, license_id: str = "", renderer: Renderer | None = None) -> str:
    """The card of a data set folder. `license_id`: the licence of the data as the hub calls it; without it the card
    says that it is not recorded. `renderer` writes the text of the example.

    Raises DataError when the folder is not a finished data set, or its data are damaged.
    """
    manifest = read_manifest(folder)
    name = _word(manifest.get("dataset")) or folder.resolve().name
    content = _content(folder, renderer)
    lines = [_header(name, license_id, content), f"# {name}", "", *_what(content, manifest)]
    sections: list[tuple[str, Iterable[str]]] = [
        ("How it was built", _built(name, manifest)),
        ("Sources", _sources(manifest)),
        ("Counts", _counts(manifest.get("counts"), "what", content)),
        ("Left out", _left_out(manifest)),
        ("Places", _places(manifest, content)),
        ("Splits and overlap", _overlap(manifest, content)),
        ("An example", _example(content)),
        (
            "How to load it",
            _fenced(content.load, "python") if content.load else ["Give the folder to a verb that takes it."],
        ),
        ("Licence", _licence(license_id)),
        ("Intended use and limits", _use(content)),
        ("Citation", [f"The method is that of *{PAPER}* (CVPR 2024).", "", *_fenced(_CITATION, "bibtex")]),
    ]
    for title, section in sections:
        lines += [f"## {title}", "", *section, ""]
    text = "\n".join(lines).rstrip() + "\n"
    return text.encode("utf-8", "replace").decode()  # a manifest may hold half of a surrogate pair


def _content(folder: Path, renderer: Renderer | None) -> _Content:
    if (folder / QUESTIONS_NAME).is_file():
        return _of_rows(folder / QUESTIONS_NAME, "questions")
    if (folder / VIDEOS_NAME).is_file():
        return _of_rows(folder / VIDEOS_NAME, "labels")
    if (folder / ARROW_NAME).is_file() or (folder / LLAVA_NAME).is_file():
        return _of_conversations(folder, renderer)
    annotations = sorted(path.name for path in folder.glob("instances*.json*"))
    if not annotations:
        return _Content("other", None, "", frozenset(), "", "", False, "")
    load = "\n".join(
        ["from pathlib import Path", "", "from locvlm.data.coco import read_instances", ""]
        + [f'print(len(read_instances(Path("{folder.resolve().name}/{name}")).images))' for name in annotations]
    )
    return _Content("annotations", None, "", frozenset(), "", "", False, load)


def _of_conversations(folder: Path, renderer: Renderer | None) -> _Content:
    file = open_conversations(folder)
    table = file.table
    names = frozenset(pc.unique(table.column("image")).to_pylist())
    media = sorted(pc.unique(table.column("medium")).to_pylist())
    first = table.slice(0, 1).to_pylist()
    text = ""
    structured = bool(first) and any(turn["objective"] in STRUCTURED for turn in first[0]["turns"])
    if first and (renderer is not None or not structured):
        conversation = file[0]
        try:
            pairs = (
                [(turn.question, turn.answer) for turn in conversation.turns]
                if renderer is None
                else renderer.turns(conversation)
            )
            text = "\n".join(f"Q: {question}\nA: {answer}" for question, answer in pairs)
        except DataError as fault:
            text = f"cannot be written: {fault}"
    load = (
        "from pathlib import Path\n\nfrom locvlm.data.conversations import open_conversations\n\n"
        f'conversations = open_conversations(Path("{folder.resolve().name}"))\n'
        "print(len(conversations), conversations[0])"
    )
    if file.path.name == ARROW_NAME:
        load += (
            "\n\n# or without LocVLM: one Arrow row is one conversation\nimport pyarrow as pa\n\n"
            f'table = pa.ipc.open_file(pa.memory_map("{folder.resolve().name}/{ARROW_NAME}")).read_all()'
        )
    example = json.dumps(first[0], indent=1, ensure_ascii=False) if first else ""
    return _Content("conversations", len(file), " and ".join(media), names, example, text, structured, load)


def _of_rows(path: Path, kind: str) -> _Content:
    rows = split_rows(path)
    names, media = set(), set()
    for raw in rows:
        row = decode_row(raw, dict[str, Any]) or {}
        for key in ("image", "video"):
            if isinstance(row.get(key), str):
                names.add(row[key])
                media.add("video" if row.get("medium") == "video" else key)  # Hal-Act keeps the name in `image`
    first = decode_row(rows[0], dict[str, Any])
    load = (
        "import json\nfrom pathlib import Path\n\n"
        f'lines = Path("{path.resolve().parent.name}/{path.name}").read_text(encoding="utf-8").split("\\n")\n'
        "rows = [json.loads(line) for line in lines if line]"
    )
    example = json.dumps(first, indent=1, ensure_ascii=False)
    return _Content(kind, len(rows), " and ".join(sorted(media)), frozenset(names), example, "", False, load)


def _header(name: str, license_id: str, content: _Content) -> str:
    tasks = ["visual-question-answering"]
    if "video" in content.medium:
        tasks.append("video-text-to-text")
    values: dict[str, Any] = {"pretty_name": name, "license": license_id or "unknown"}
    if content.structured or content.kind == "questions":
        values["language"] = ["en"]  # the templates are English
    if content.kind in ("conversations", "questions"):
        values["task_categories"] = tasks
    if content.records is not None:
        values["size_categories"] = [next((label for top, label in _SIZES if content.records < top), "n>10M")]
    values["tags"] = ["locvlm", "localization", "spatial-reasoning"]
    if content.kind == "questions":
        values["configs"] = [{"config_name": "default", "data_files": QUESTIONS_NAME}]
    return f"---\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True)}---\n"


def _what(content: _Content, manifest: Mapping[str, Any]) -> Iterator[str]:
    size = "" if content.records is None else f" {number(content.records)} records."
    kind = _KINDS[content.kind]
    yield f"{kind[0].upper()}{kind[1:]}.{size}"
    yield ""
    counts = manifest.get("counts")
    if isinstance(counts, Mapping):
        told = [f"- {text}" for kind, text in _OBJECTIVES.items() if counts.get(kind)]
        yield from [*told, ""] if told else []
    yield f"Built by LocVLM, an open implementation of *{PAPER}*."
    yield ""


def _built(name: str, manifest: Mapping[str, Any]) -> Iterator[str]:
    verb = next((verb for prefix, verb in _VERBS.items() if name.startswith(prefix)), name)
    yield f"`locvlm data {verb}`, with"
    yield ""
    rows = [("seed", manifest.get("seed", NOT_RECORDED))]
    options = manifest.get("options")
    rows += sorted(_flat(options)) if isinstance(options, Mapping) and options else [("options", NOT_RECORDED)]
    known = {"dataset", "counts", "skipped", "notes", "seed", "sources", "coordinates", "geometry", "options"}
    version = manifest.get("version", NOT_RECORDED)
    rows += sorted(_flat({key: value for key, value in manifest.items() if key not in {*known, "version"}}))
    yield from _table(("setting", "value"), [*rows, ("version of the code", version)])


def _sources(manifest: Mapping[str, Any]) -> Iterator[str]:
    sources = [entry for entry in manifest.get("sources") or () if isinstance(entry, Mapping)]
    if not sources:
        yield f"The sources are {NOT_RECORDED}."
    else:
        yield from _table(
            ("source", "fingerprint"),
            [(entry.get("path", NOT_RECORDED), entry.get("fingerprint", NOT_RECORDED)) for entry in sources],
        )
    yield ""
    faces = [entry["faces_blurred"] for entry in sources if entry.get("faces_blurred")]
    yield (
        f"Faces: blurred by {'; '.join(map(_text, faces))}."
        if faces
        else f"Whether faces were blurred is {NOT_RECORDED}."
    )


def _counts(counts: Any, head: str, content: _Content) -> Iterator[str]:
    if not isinstance(counts, Mapping) or not counts:
        yield f"{NOT_RECORDED.capitalize()}."
        return
    yield from _table((head, "n"), [(key, _amount(value)) for key, value in counts.items()])
    if content.names:
        yield ""
        yield f"The data name {number(len(content.names))} distinct {content.medium or 'image'} files."


def _left_out(manifest: Mapping[str, Any]) -> Iterator[str]:
    skipped, notes = manifest.get("skipped"), manifest.get("notes")
    if not isinstance(skipped, Mapping):
        yield f"What was skipped is {NOT_RECORDED}."
    elif skipped:
        yield from _table(("skipped, by reason", "n"), [(reason, _amount(n)) for reason, n in sorted(skipped.items())])
    else:
        yield "Nothing was skipped."
    if isinstance(notes, Mapping) and notes:
        yield ""
        yield from _table(("noted", "n"), [(note, _amount(n)) for note, n in sorted(notes.items())])


def _places(manifest: Mapping[str, Any], content: _Content) -> Iterator[str]:
    rows = [
        (f"{section}.{key}", value)
        for section in ("coordinates", "geometry")
        for key, value in dict(manifest.get(section) or {}).items()
    ]
    if content.kind == "conversations":
        yield "Boxes are stored as (x1, y1, x2, y2) in pixels of the original image, origin at the top left, with"
        yield "x2 = x + w. Their text is written when a conversation is read: as below, unless asked for otherwise."
        yield ""
    yield from _table(("setting", "value"), rows) if rows else [f"{NOT_RECORDED.capitalize()}."]


def _overlap(manifest: Mapping[str, Any], content: _Content) -> Iterator[str]:
    counts = manifest.get("counts")
    found = counts if isinstance(counts, Mapping) else {}
    told = [f"{key.removeprefix('images_')} {_amount(n)}" for key, n in found.items() if key.startswith("images_")]
    yield f"Images of its own splits: {', '.join(told)}." if told else "It has no splits of its own."
    coco = sum(coco_image_id(name) is not None for name in content.names)
    sources = [str(entry.get("path")) for entry in manifest.get("sources") or () if isinstance(entry, Mapping)]
    named = sorted({split for text in sources for split in re.findall("(?:train|val)20(?:14|17)", text)})
    in_images = sorted({f"{m[1]}2014" for name in content.names if (m := re.search(r"COCO_(train|val)2014_", name))})
    yield ""
    if not coco and not named:
        yield "Neither the sources nor the images have names of COCO. Overlap with other data sets is not recorded."
    else:
        yield f"{number(coco)} of the {number(len(content.names))} {content.medium or 'image'} names are COCO's."
        yield ""
        for split in sorted({*named, *in_images}):
            whence = "sources" if split in named else "images"
            yield f"- By the names of its {whence}, it is made of {split}. {_OVERLAPS[split]}"
        if not named and not in_images:
            yield "- Of which split they are is not recorded. COCO's 2014 and 2017 splits share images with RefCOCO,"
            yield "  VQAv2 and POPE."
    yield ""
    notes = manifest.get("notes")
    excluded = notes.get("image excluded on request") if isinstance(notes, Mapping) else None
    yield (
        f"{_amount(excluded)} images were excluded on request."
        if excluded
        else "No image was excluded on request, as far as is recorded."
    )
    yield "`locvlm data overlap` counts the images that two data sets share; `locvlm data exclusions` lists those of"
    yield "benchmarks for `--exclude`."


def _example(content: _Content) -> Iterator[str]:
    if not content.example:
        yield f"{NOT_RECORDED.capitalize()}."
        return
    yield "The first record:"
    yield ""
    yield from _fenced(content.example, "json")
    if content.text:
        yield ""
        yield "Its text in the first epoch:" if content.structured else "Its text:"
        yield ""
        yield from _fenced(content.text, "text")


def _licence(license_id: str) -> Iterator[str]:
    known = f"{_text(license_id)}, as given when this card was written." if license_id else f"{NOT_RECORDED}."
    yield f"Of the annotations and the text: {known}"
    yield f"Of the images or videos: {NOT_RECORDED}. They keep their own terms."


def _use(content: _Content) -> Iterator[str]:
    if content.kind == "questions":
        yield "For measuring visual LLMs. No model should have been trained on these questions, nor on their images"
        yield "unless the result says so."
    elif content.kind == "conversations":
        yield "For teaching visual LLMs, with the objectives named above."
    else:
        yield "For building conversations and questions."
    yield ""
    yield "- Answers come from annotations or from a model, not from a person who was asked this question about the"
    yield "  image. What is not annotated counts as absent."
    yield "- Left and right are those of the stored pixels; mirroring an image makes its texts wrong."
    yield f"- Consent of the people shown, and a check by hand: {NOT_RECORDED}."


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and (value or not prefix):
        for key, inner in value.items():
            yield from _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value


def _table(head: tuple[str, str], rows: Iterable[tuple[Any, Any]]) -> Iterator[str]:
    yield f"| {head[0]} | {head[1]} |"
    yield "|---|---|"
    for key, value in rows:
        yield f"| {_text(key)} | {_text(value)} |"


def _amount(value: Any) -> str:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return number(value) if is_number and float(value).is_integer() else _text(value)


def _text(value: Any) -> str:
    """A value as one line of Markdown that is text and nothing else."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return re.sub(r"([\\`*\[\]<>|])", r"\\\1", " ".join(text.split()))


def _word(value: Any) -> str:
    """The name of a data set as it stands in a command and a title; empty when it is none."""
    return value if isinstance(value, str) and re.fullmatch(r"[\w.-]+", value) else ""


def _fenced(text: str, language: str) -> list[str]:
    """A code block that its own text cannot end."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return [f"{fence}{language}", text, fence]
