"""The benchmarks of the paper's tables, found on disk under the names that their publishers gave their files.

A folder is searched to any depth. Files that several data sets call alike (refs(unc).p, test_qa.json) are told apart by
the folder they lie in. Sets of our own are the folders that `locvlm data ...` built, told by their manifest.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from locvlm.errors import DataError
from locvlm.evaluation.asks import locate
from locvlm.evaluation.questions import manifest_of, spread
from locvlm.evaluation.tasks import read_set, set_name, task_named
from locvlm.pixels import ImageSource

_MANIFEST = "manifest.json"
_LOOKED_AT = 20  # images, before a benchmark is asked


@dataclass(frozen=True, slots=True)
class Files:
    """One form of a benchmark: its file, that of its answers where they lie apart, what must lie beside them, and which
    split of the file is meant. `is_scored`: whether its answers are public."""

    data: str
    annotations: str = ""
    beside: tuple[str, ...] = ()
    split: str | None = None
    is_scored: bool = True

    @property
    def names(self) -> tuple[str, ...]:
        """All that must lie in one folder; each may be gzipped."""
        return tuple(name for name in (self.data, self.annotations, *self.beside) if name)


@dataclass(frozen=True, slots=True)
class Kind:
    """A benchmark. `asks`: the stem of its output files -> the task, one for each way of asking it. `forms`: of its
    files, the best first; `folder`: the name of the folder that they must lie in, "" for any. `dataset`, `command`: of
    a set of our own, and what builds it."""

    name: str
    asks: Mapping[str, str]
    tables: str
    images: str
    forms: tuple[Files, ...] = ()
    folder: str = ""
    dataset: str = ""
    command: str = ""

    @property
    def wanted(self) -> str:
        """What to put where."""
        folder = f"{self.folder}/" if self.folder else ""
        forms = [f"{folder}{' with '.join(form.names)}" for form in self.forms]
        return ", or ".join([*forms, *([f"a folder of `locvlm data {self.command}`"] if self.command else [])])


@dataclass(frozen=True, slots=True)
class Benchmark:
    """One that is on disk. `name`: the stem of its files in the output."""

    name: str
    kind: Kind
    task: str
    data: Path
    annotations: Path | None = None
    split: str | None = None
    is_scored: bool = True


@dataclass(frozen=True, slots=True)
class Search:
    """What lies in a folder: benchmarks in the order of KINDS; kind -> what to put there where it is missing; files
    that were left out, because something better was there."""

    found: tuple[Benchmark, ...]
    missing: Mapping[str, str]
    left_out: tuple[str, ...]


def _spatial(name: str, options: str, *, in_context: bool = True) -> Kind:
    asks = {name: "coco-spatial", **({f"{name}-icl": "coco-spatial-icl"} if in_context else {})}
    return Kind(name, asks, "Tables 4 and 13", "COCO", dataset=name, command=f"coco-spatial{options}")


def _presence(name: str, source: str, images: str) -> Kind:
    dataset = "hallucination" if source == "coco" else name
    asks = {name: "presence"}
    return Kind(name, asks, "Table 8", images, dataset=dataset, command=f"hallucination --source {source}")


def _pope(split: str) -> Kind:
    name, forms = f"pope-{split}", (Files(f"coco_pope_{split}.json"),)
    return Kind(
        name, {name: "pope"}, "Table 9", "COCO val2014", forms, dataset=name, command=f"pope --strategy {split}"
    )


def _refs(folder: str, by: str, split: str) -> Kind:
    forms = (Files(f"refs({by}).p", beside=("instances.json",), split=split), Files(f"{folder}_{split}.json"))
    tables = "Tables 10, 2 and 11" if (folder, split) == ("refcocog", "test") else "Table 10"
    name = f"{folder}-{split}"
    return Kind(name, {name: "region-description"}, tables, "COCO train2014", forms, folder)


def _video(task: str, tables: str, images: str, *forms: Files, folder: str = "") -> Kind:
    return Kind(task, {task: task}, tables, images, forms, folder)


_TEST_DEV = Files("v2_OpenEnded_mscoco_test-dev2015_questions.json", is_scored=False)
_VAL = Files("v2_OpenEnded_mscoco_val2014_questions.json", "v2_mscoco_val2014_annotations.json")
_GQA = Files("testdev_balanced_questions.json")
_ACTIVITYNET = (Files("test_q.json", "test_a.json"), Files("val_q.json", "val_a.json"))
_QA = (Files("test_qa.json"), Files("val_qa.json"))  # the figures that the paper compares with are of the test files

KINDS: tuple[Kind, ...] = (
    _spatial("coco-spatial", ""),
    _spatial("coco-spatial-vertical", " --axis vertical"),
    _spatial("coco-spatial-released", " --rules released", in_context=False),  # they choose no third object
    Kind("vqav2-val", {"vqav2-val": "vqav2"}, "Table 5", "COCO val2014", (_VAL,)),
    Kind("vqav2-test-dev", {"vqav2-test-dev": "vqav2"}, "Table 5", "COCO test2015", (_TEST_DEV,)),
    Kind("gqa-testdev", {"gqa-testdev": "gqa"}, "Tables 5, 2 and 11", "GQA", (_GQA,)),
    _presence("hal-coco", "coco", "COCO val2017"),
    _presence("hal-ade", "ade", "ADE20K validation"),
    _presence("hal-act", "act", "ActivityNet (videos)"),
    *map(_pope, ("random", "popular", "adversarial")),
    _refs("refcoco", "unc", "testB"),
    _refs("refcoco+", "unc", "testB"),
    _refs("refcocog", "umd", "val"),
    _refs("refcocog", "umd", "test"),
    Kind(
        "localize",
        {"localization": "localization", "region-description": "region-description"},
        "Figures 4 and 5",
        "COCO val2017",
        dataset="localize-instruct",
        command="localize-instruct",
    ),
    _video("activitynet-qa", "Tables 6, 7, 2, 11 and 12", "ActivityNet (videos)", *_ACTIVITYNET),
    _video("msrvtt-qa", "Table 6", "MSR-VTT (videos)", *_QA, folder="msrvtt-qa"),
    _video("msvd-qa", "Table 6", "MSVD (videos)", *_QA, folder="msvd-qa"),
    _video("tgif-qa", "Table 6", "TGIF (GIFs)", Files("Test_frameqa_question.csv")),
)


def find_benchmarks(folder: Path, tasks: Sequence[str] = ()) -> Search:
    """What lies in `folder`, of the named tasks where any are named. Raises DataError when there is no such folder, or
    nothing in it."""
    if not folder.is_dir():
        raise DataError(f"looking for benchmarks: there is no folder {folder}; give it with --benchmarks")
    places = list(_places(folder))
    found: list[Benchmark] = []
    missing: dict[str, str] = {}
    left_out: list[str] = []
    for kind in KINDS:
        if tasks and not set(tasks) & set(kind.asks.values()):
            continue
        first, *others = [*_official(kind, places), *_own(kind, places)] or [()]
        found += [way for way in first if not tasks or way.task in tasks]
        if not first:
            missing[kind.name] = kind.wanted
        left_out += [f"{ways[0].data}, for {first[0].data}" for ways in others]
    if not found:
        lines = "\n".join(f"  {name}: {wanted}" for name, wanted in missing.items())
        raise DataError(f"looking for benchmarks in {folder}: there is none; put there any of\n{lines}")
    return Search(tuple(found), missing, tuple(left_out))


def has_images(benchmark: Benchmark, sources: Sequence[ImageSource]) -> bool:
    """Whether any of some twenty of its images is in one of the sources. Raises DataError for questions that cannot be
    read."""
    questions = read_set(task_named(benchmark.task), benchmark.data, split=benchmark.split).questions
    return any(locate(sources, question.image) for question in spread(questions, _LOOKED_AT))


@dataclass(frozen=True, slots=True)
class _Place:
    """A folder: the names of its files, and the manifest of a set that `locvlm data` built, else empty."""

    path: Path
    files: frozenset[str]
    manifest: Mapping[str, Any]

    def file(self, name: str) -> Path | None:
        """The file of that name, plain or gzipped."""
        return next((self.path / form for form in (name, f"{name}.gz") if form in self.files), None)


def _places(folder: Path) -> Iterator[_Place]:
    """The folder and all below it, the shallow ones first; a built set has nothing below."""
    level, seen = [folder], {folder.resolve()}
    while level:
        below: list[Path] = []
        for path in level:
            with os.scandir(path) as entries:
                items = sorted(entries, key=lambda entry: entry.name)
            files = frozenset(entry.name for entry in items if entry.is_file())
            manifest = manifest_of(path) if _MANIFEST in files else {}
            yield _Place(path, files, manifest)
            for entry in items if not manifest else ():
                if (
                    entry.is_dir()
                    and not entry.name.startswith(".")
                    and (real := Path(entry.path).resolve()) not in seen
                ):
                    seen.add(real)
                    below.append(Path(entry.path))
        level = below


def _official(kind: Kind, places: Sequence[_Place]) -> Iterator[tuple[Benchmark, ...]]:
    """Every copy of its files, in the best form first."""
    ((name, task),) = list(kind.asks.items())[:1]
    for form in kind.forms:
        for place in places:
            data, answers = place.file(form.data), place.file(form.annotations)
            fits = not kind.folder or place.path.name.lower() == kind.folder
            if fits and data is not None and all(place.file(needed) for needed in form.names):
                yield (Benchmark(name, kind, task, data, answers, form.split, form.is_scored),)


def _own(kind: Kind, places: Sequence[_Place]) -> Iterator[tuple[Benchmark, ...]]:
    """Every set of our own of this kind, in each way of asking it."""
    for place in places:
        if place.manifest and kind.dataset and set_name(place.path, place.manifest) == kind.dataset:
            yield tuple(Benchmark(name, kind, task, place.path) for name, task in kind.asks.items())
