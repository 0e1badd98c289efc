"""COCO-Spatial and region description as a task folder of EvolvingLMMs-Lab/lmms-eval, for models that are run there.

The folder holds <task>.yaml, utils.py (the scoring rules, which need nothing of ours) and data/test-*.parquet with the
images inside, in the form that Hugging Face `datasets` reads. Places are text in the prompt, written as the config
says; models with a form of their own get it with --set coordinates...
"""

import io
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import ImageOps

from locvlm.config import ExperimentConfig
from locvlm.errors import DataError
from locvlm.evaluation.asks import locate
from locvlm.evaluation.questions import Question, QuestionSet
from locvlm.evaluation.tasks import read_set, task_named
from locvlm.geometry import to_rgb
from locvlm.pixels import ImageSource
from locvlm.prompts import OPPOSITE

_ROWS = 64  # of a row group; bounds memory
_SHARD_BYTES = 500_000_000
_UNREADABLE = "question whose image is missing or damaged"


@dataclass(frozen=True, slots=True)
class _Kind:
    """`rules`: the file that becomes utils.py; `metrics`: name -> how its values are put together."""

    rules: str
    columns: Mapping[str, str]
    row: Callable[[Question], dict[str, Any]]
    metrics: Callable[[QuestionSet], dict[str, str]]
    max_new_tokens: int


def _spatial_row(question: Question) -> dict[str, Any]:
    return {"target": str(question.reference)}


def _spatial_metrics(questions: QuestionSet) -> dict[str, str]:
    targets = {str(question.reference) for question in questions.questions}
    names = dict.fromkeys(("accuracy", "strict", "opposite_reading", "answered"), "mean")
    return names | {f"accuracy_{word}": "!function utils.mean_of_class" for word in OPPOSITE if word in targets}


def _region_row(question: Question) -> dict[str, Any]:
    reference = question.reference
    if reference["references"] == [reference["category"]] or reference["box"] is None:
        raise DataError(
            f"exporting region {question.id!r}: it has no expression of a person or no box, and METEOR needs both; "
            "give RefCOCO data or rows with box, width, height and references"
        )
    corners = dict(zip(("x1", "y1", "x2", "y2"), map(float, reference["box"]), strict=True))
    return {"target": reference["references"][0], "references": json.dumps(reference["references"]), **corners}


def _region_metrics(_: QuestionSet) -> dict[str, str]:
    return {"meteor": "!function utils.meteor", "meteor_stripped": "!function utils.meteor"}


_SPATIAL = _Kind("spatial.py", {"target": "string"}, _spatial_row, _spatial_metrics, 128)
_REGION = _Kind(
    "region.py",
    {"target": "string", "references": "string", **dict.fromkeys(("x1", "y1", "x2", "y2"), "float64")},
    _region_row,
    _region_metrics,
    128,
)
KINDS = {"coco-spatial": _SPATIAL, "coco-spatial-icl": _SPATIAL, "region-description": _REGION}


@dataclass(frozen=True, slots=True)
class Export:
    """What was written: the name of the task in lmms-eval, numbers, and questions left out by reason."""

    name: str
    questions: int
    images: int
    skipped: Counter[str]


def export(
    task: str, data: Path, split: str | None, images: ImageSource, config: ExperimentConfig, folder: Path, where: str
) -> Export:
    """Write the task folder. `where`: the dataset_path of the YAML file, a folder or a hub id.

    Raises DataError for a set that cannot be exported, or when no question is left.
    """
    kind = KINDS[task]
    questions = read_set(task_named(task), data, config, split=split)
    name = f"locvlm_{task.replace('-', '_')}"
    skipped: Counter[str] = Counter()
    shown: set[str] = set()
    (folder / "data").mkdir()
    written = _write(folder / "data", kind, _rows(kind, questions, images, skipped, shown))
    if not written:
        raise DataError(f"exporting {data}: none of its {len(questions.questions)} questions has a readable image")
    rules = files("locvlm").joinpath(f"assets/lmms_eval/{kind.rules}").read_text(encoding="utf-8")
    (folder / "utils.py").write_text(rules, encoding="utf-8")
    (folder / f"{name}.yaml").write_text(_yaml(name, kind, kind.metrics(questions), where), encoding="utf-8")
    (folder / "README.md").write_text(_readme(name, questions.name, where), encoding="utf-8")
    return Export(name, written, len(shown), skipped)


def _rows(
    kind: _Kind, questions: QuestionSet, images: ImageSource, skipped: Counter[str], shown: set[str]
) -> Iterator[dict[str, Any]]:
    for question in questions.questions:
        stored = _stored(images, question)
        if stored is None:
            skipped[_UNREADABLE] += 1
            continue
        shown.add(question.image)
        image = {"bytes": stored, "path": question.image}
        yield {"id": question.id, "image": image, "prompt": question.prompt, **kind.row(question)}


def _stored(images: ImageSource, question: Question) -> bytes | None:
    """The bytes of the image as they lie there, or a PNG of its mirror image; None where it cannot be decoded."""
    found = locate([images], question.image)
    if found is None:
        return None
    source, name = found
    try:
        if question.mirror:
            buffer = io.BytesIO()
            ImageOps.mirror(to_rgb(source.open(name))).save(buffer, "PNG")
            return buffer.getvalue()
        source.checked_size(name)
        with source.stream(name) as file:
            return file.read()
    except DataError:
        return None


def _write(folder: Path, kind: _Kind, rows: Iterable[dict[str, Any]]) -> int:
    """test-00000.parquet and so on; returns the number of rows."""
    schema = _schema(kind)
    total, shard, size = 0, 0, 0
    writer: pq.ParquetWriter | None = None
    try:
        for group in _groups(rows):
            if writer is None or size > _SHARD_BYTES:
                if writer is not None:
                    writer.close()
                writer = pq.ParquetWriter(folder / f"test-{shard:05d}.parquet", schema, compression="zstd")
                shard, size = shard + 1, 0
            table = pa.Table.from_pylist(group, schema=schema)
            writer.write_table(table)
            total, size = total + len(group), size + table.nbytes
    finally:
        if writer is not None:
            writer.close()
    return total


def _groups(rows: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    group: list[dict[str, Any]] = []
    for row in rows:
        group.append(row)
        if len(group) == _ROWS:
            yield group
            group = []
    if group:
        yield group


def _schema(kind: _Kind) -> pa.Schema:
    """With the note by which `datasets` knows that the image column holds images."""
    texts = {"id": "string", "prompt": "string", **kind.columns}
    fields = [pa.field(name, pa.string() if form == "string" else pa.float64()) for name, form in texts.items()]
    fields.insert(1, pa.field("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])))
    features: dict[str, Any] = {name: {"dtype": form, "_type": "Value"} for name, form in texts.items()}
    features["image"] = {"_type": "Image"}
    ordered = {field.name: features[field.name] for field in fields}
    return pa.schema(fields, metadata={"huggingface": json.dumps({"info": {"features": ordered}})})


def _yaml(name: str, kind: _Kind, metrics: Mapping[str, str], where: str) -> str:
    listed = "".join(
        f"  - metric: {metric}\n    aggregation: {how}\n    higher_is_better: true\n" for metric, how in metrics.items()
    )
    return f"""task: {name}
dataset_path: {json.dumps(where)}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.visual
doc_to_text: !function utils.text
doc_to_target: target
process_results: !function utils.results
generation_kwargs:
  max_new_tokens: {kind.max_new_tokens}
  temperature: 0
  do_sample: false
metric_list:
{listed}lmms_eval_specific_kwargs:
  default:
    pre_prompt: ""
    post_prompt: ""
metadata:
  version: 1.0
"""


def _readme(name: str, dataset: str, where: str) -> str:
    return f"""# {name}

The questions of {dataset} for [lmms-eval](https://github.com/EvolvingLMMs-Lab/lmms-eval), with places as text.

    python -m lmms_eval --include_path . --tasks {name} --model ... --model_args ...

`{name}.yaml` reads the data from `{where}`. After moving or publishing the folder `data`, change `dataset_path` there.
"""
