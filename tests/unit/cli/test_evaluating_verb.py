"""`locvlm evaluate`: every benchmark on disk, asked of a real endpoint whose answers have known scores."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from locvlm.cli import main
from locvlm.data.scenes import draw_scenes
from locvlm.evaluation.benchmarks import KINDS, find_benchmarks
from locvlm.evaluation.tasks import TASKS
from locvlm.records import read_json, read_jsonl, write_json, write_jsonl
from tests.endpoint import Endpoint, reply

QUESTIONS = {"Is it red?": "Yes.", "How many?": "three", "What is it?": "a cup"}  # question -> what the endpoint says


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Official files under their official names, sets of our own, COCO images under their names of 2017, a video."""
    root = tmp_path_factory.mktemp("world")
    draw_scenes(root / "scenes", seed=3, n_train=30, n_test=1)
    for name in ("val2017", "gqa", "videos"):
        (root / name).mkdir()
    for number in (1, 2):
        Image.new("RGB", (40, 30), (90 * number, 0, 0)).save(root / "val2017" / f"{number:012d}.jpg")
    Image.new("RGB", (40, 30)).save(root / "gqa" / "n7.jpg")
    with av.open(str(root / "videos" / "v_one.mkv"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for at in range(6):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 40 * at, np.uint8), format="rgb24")
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    benchmarks = root / "benchmarks"
    for folder in ("vqa", "gqa", "pope/coco", "activitynet-qa", "refcocog"):
        (benchmarks / folder).mkdir(parents=True)
    asked = list(enumerate(QUESTIONS, 1))
    questions = [{"question_id": n, "image_id": 1 + n % 2, "question": text} for n, text in asked]
    for part in ("val2014", "test-dev2015"):
        path = benchmarks / "vqa" / f"v2_OpenEnded_mscoco_{part}_questions.json"
        write_json(path, {"questions": questions, "data_subtype": "val2014"})
    answers = [
        {"question_id": n, "answer_type": "other", "answers": [{"answer": "3"}] * 9 + [{"answer": "x"}]}
        for n, _ in asked
    ]
    write_json(benchmarks / "vqa" / "v2_mscoco_val2014_annotations.json", {"annotations": answers})
    record = {"imageId": "n7", "isBalanced": True, "types": {"structural": "query"}}
    write_json(
        benchmarks / "gqa" / "testdev_balanced_questions.json",
        {str(n): {**record, "question": text, "answer": "a cup"} for n, text in asked},
    )
    image = {"image": "COCO_val2014_000000000001.jpg"}
    pope = [{"question_id": n, "text": f"Is it red? {n}", "label": ("yes", "no")[n % 2], **image} for n in range(4)]
    write_jsonl(benchmarks / "pope" / "coco" / "coco_pope_random.json", pope)
    write_json(
        benchmarks / "activitynet-qa" / "val_q.json",
        [{"question_id": "v_one_1", "video_name": "one", "question": "What is it?"}],
    )
    write_json(benchmarks / "activitynet-qa" / "val_a.json", [{"question_id": "v_one_1", "answer": "cup", "type": 3}])
    ref = {"ref_id": 5, "ann_id": 9, "image_id": 2, "file_name": "?", "category_id": 1, "split": "test"}
    with open(benchmarks / "refcocog" / "refs(umd).p", "wb") as file:
        said = [{"sent": "a cup", "raw": "a cup", "tokens": [], "sent_id": 1}]
        pickle.dump([{**ref, "sentences": said}, {**ref, "ref_id": 6, "split": "val", "sentences": said}], file, 2)
    size = {"id": 2, "file_name": "COCO_train2014_000000000002.jpg", "width": 40, "height": 30}
    place = {"id": 9, "image_id": 2, "category_id": 1, "bbox": [4, 4, 20, 20], "area": 400, "iscrowd": 0}
    cup = {"id": 1, "name": "cup"}
    write_json(
        benchmarks / "refcocog" / "instances.json", {"images": [size], "annotations": [place], "categories": [cup]}
    )
    for axis in ("horizontal", "vertical"):
        options = ["--annotations", str(root / "scenes" / "instances_train.json"), "--axis", axis]
        assert main(["data", "coco-spatial", *options, "--output", str(benchmarks / f"spatial-{axis}")]) == 0
    return root


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = Endpoint("")
    server.answer = lambda number, body: reply(said(body))
    yield server
    server.close()


def said(body: dict[str, Any]) -> str:
    """Left or above, and what QUESTIONS say."""
    text = body["messages"][-1]["content"][-1]["text"]
    return next((answer for question, answer in QUESTIONS.items() if text.startswith(question)), "A cup left, above")


@pytest.fixture
def evaluate(world: Path, endpoint: Endpoint, tmp_path: Path) -> Callable[..., list[str]]:
    """The command line; options may be added."""

    def command(*more: str) -> list[str]:
        images = [
            word for name in ("val2017", "gqa", "videos", "scenes/images") for word in ("--images", str(world / name))
        ]
        model = ["--model", "openai:org/vlm", "--url", endpoint.url, "--output", str(tmp_path / "out")]
        return ["evaluate", *model, "--benchmarks", str(world / "benchmarks"), *images, *more]

    return command


def places(world: Path) -> list[str]:
    """How the model of the endpoint is to write places."""
    path = world / "places.yaml"
    if not path.is_file():
        import io
        from contextlib import redirect_stdout

        told = io.StringIO()
        with redirect_stdout(told):
            assert main(["config", "--preset", "tiny"]) == 0
        path.write_text(told.getvalue())
    return ["--config", str(path)]


def test_one_command_evaluates_what_is_there_and_says_what_is_not(
    world: Path, evaluate: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(evaluate(*places(world), "--judge", "lexical")) == 0
    out = capsys.readouterr().out
    folder = tmp_path / "out" / "org-vlm"
    figures = {path.name.split(".")[0]: read_json(path) for path in folder.glob("*.metrics.json")}
    assert figures["vqav2-val"]["accuracy"] == pytest.approx(1 / 3)  # "three" alone
    assert (figures["gqa-testdev"]["accuracy"], figures["pope-random"]["accuracy"]) == (pytest.approx(1 / 3), 0.5)
    assert (figures["activitynet-qa"]["accuracy"], figures["activitynet-qa"]["judge"]) == (1.0, "lexical")
    assert figures["refcocog-test"]["meteor"] == pytest.approx(0.389934, abs=1e-6)  # as the jar says
    for axis, word in (("", "left"), ("-vertical", "above")):
        assert figures[f"coco-spatial{axis}"][f"accuracy_{word}"] == 1.0
        assert figures[f"coco-spatial{axis}"]["dataset"] == f"coco-spatial{axis}"
        assert figures[f"coco-spatial{axis}-icl"]["task"] == "coco-spatial-icl"
    assert [row["answer"] for row in read_json(folder / "vqav2-test-dev.results.json")] == ["yes", "3", "cup"]
    # beside the paper's numbers, and why a cell is empty
    assert "random, org-vlm (ours)" in out
    assert "direct, LocVLM-B" in out
    assert "result file written; only its server can score it" in out
    assert "refcoco-testB: refcoco/refs(unc).p with instances.json" in out
    missing = read_json(folder / "missing.json")
    assert {missing[name] for name in ("refcoco-testB", "msvd-qa", "hal-ade", "pope-popular")} == {"not on disk"}
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<figure") >= 6
    assert "not on disk" in page
    assert (tmp_path / "out" / "report.md").is_file()


def test_a_second_model_stands_beside_the_first_and_finished_work_is_kept(
    evaluate: Callable[..., list[str]], endpoint: Endpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--task", "pope", "--task", "vqav2")
    assert main(evaluate(*options)) == 0
    asked = len(endpoint.requests)
    assert main(evaluate(*options)) == 0
    assert len(endpoint.requests) == asked
    endpoint.answer = lambda number, body: reply("No")
    assert main(evaluate(*options, "--name", "naysayer")) == 0
    text = (tmp_path / "out" / "report.md").read_text()
    assert "naysayer - org-vlm" in text
    assert "random, org-vlm (ours)" in capsys.readouterr().out


def test_what_fails_costs_nothing_else(
    world: Path, evaluate: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # nothing says how this model writes places
    assert main(evaluate("--task", "region-description", "--task", "gqa")) == 2
    told = capsys.readouterr()
    assert "2 of 3 benchmarks have no figure" in told.err
    assert "nothing says how it writes places" in told.err
    assert "Traceback" not in told.err
    assert read_json(tmp_path / "out" / "org-vlm" / "gqa-testdev.metrics.json")["accuracy"] == pytest.approx(1 / 3)
    missing = read_json(tmp_path / "out" / "org-vlm" / "missing.json")
    assert missing["refcocog-test"].startswith("failed: asking a openai model")


def test_a_killed_evaluation_goes_on(evaluate: Callable[..., list[str]], endpoint: Endpoint, tmp_path: Path) -> None:
    def answer(number: int, body: dict[str, Any]) -> tuple[int, bytes, dict[str, str]]:
        time.sleep(30 if number > 5 else 0)
        return reply(said(body))

    endpoint.answer = answer
    options = evaluate("--task", "pope", "--task", "gqa", "--batch-size", "1")
    run = subprocess.Popen([sys.executable, "-m", "locvlm", *options], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    folder = tmp_path / "out" / "org-vlm"
    replies = folder / "replies.jsonl"
    while not replies.is_file() or replies.read_bytes().count(b"\n") < 5:
        assert run.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    assert (folder / "gqa-testdev.jsonl").is_file()
    assert not (folder / "pope-random.jsonl").exists()
    endpoint.requests.clear()
    endpoint.answer = lambda number, body: reply(said(body))
    assert main(options) == 0
    asked = [body["messages"][0]["content"][-1]["text"] for body in endpoint.requests]
    assert len(asked) == 2  # what was replied is not asked again
    assert all(text.startswith("Is it red? ") for text in asked)
    assert len(read_jsonl(folder / "pope-random.jsonl")) == 4


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        (["--task", "vqa"], "looking up the task 'vqa'"),
        (["--name", "a/b"], "becomes a folder and a label"),
        (["--judge-url", "http://x/v1"], "say more about --judge"),
        (["--limit", "0"], "--limit is 0"),
        (["--task", "msvd-qa"], "msvd-qa/test_qa.json"),
    ],
)
def test_faulty_options_are_the_users_to_mend(
    evaluate: Callable[..., list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    fault: str,
) -> None:
    assert main(evaluate(*options)) == 2
    assert fault in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_few_questions_make_no_result_file_and_no_fault(
    evaluate: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(evaluate("--task", "vqav2", "--limit", "2")) == 0
    assert read_json(tmp_path / "out" / "org-vlm" / "vqav2-val.metrics.json")["n"] == 2
    assert "left out by --limit: its server wants all answers" in capsys.readouterr().out
    assert not (tmp_path / "out" / "org-vlm" / "vqav2-test-dev.jsonl").exists()


def test_without_its_images_a_benchmark_is_listed_not_asked(
    world: Path, endpoint: Endpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--model", "openai:m", "--url", endpoint.url, "--benchmarks", str(world / "benchmarks")]
    images = ["--images", str(world / "gqa")]
    assert (
        main(["evaluate", *common, *images, "--output", str(tmp_path / "out"), "--task", "gqa", "--task", "pope"]) == 0
    )
    assert "pope-random: COCO val2014" in capsys.readouterr().out
    assert read_json(tmp_path / "out" / "m" / "missing.json")["pope-random"] == "its images are not on disk"
    assert len(endpoint.requests) == 3


def test_every_kind_has_its_place_and_its_task() -> None:
    assert len({kind.name for kind in KINDS}) == len(KINDS)
    stems = [stem for kind in KINDS for stem in kind.asks]
    assert len(set(stems)) == len(stems)
    asked = {task for kind in KINDS for task in kind.asks.values()}
    assert asked == set(TASKS)
    assert all(kind.wanted and kind.images and kind.tables for kind in KINDS)


def test_the_documentation_names_every_file() -> None:
    text = (Path(__file__).parents[3] / "docs" / "evaluation.md").read_text()
    for kind in KINDS:
        for form in kind.forms:
            assert all(f"`{name}`" in text for name in form.names), form
        assert f"`{kind.name}`" in text or f"`-{kind.name.rpartition('-')[2]}`" in text, kind.name


def test_the_best_form_is_taken_and_the_other_told(tmp_path: Path) -> None:
    for folder in ("a", "b/msvd-qa", "c/MSVD-QA"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "a" / "test_qa.json").touch()  # of nobody knows which set
    (tmp_path / "b" / "msvd-qa" / "val_qa.json").touch()
    (tmp_path / "c" / "MSVD-QA" / "test_qa.json.gz").touch()
    search = find_benchmarks(tmp_path)
    assert [(found.name, found.data.name) for found in search.found] == [("msvd-qa", "test_qa.json.gz")]
    assert search.left_out == (f"{tmp_path}/b/msvd-qa/val_qa.json, for {tmp_path}/c/MSVD-QA/test_qa.json.gz",)
    (tmp_path / "b" / "loop").symlink_to(tmp_path)
    assert len(find_benchmarks(tmp_path).found) == 1
    assert json.dumps(search.missing)
