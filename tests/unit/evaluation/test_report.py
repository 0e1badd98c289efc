import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from locvlm.errors import DataError
from locvlm.evaluation.figures import curves_svg, picture, read_curve
from locvlm.evaluation.report import read_arm, write_report
from locvlm.evaluation.score import score, write_metrics
from locvlm.evaluation.tasks import TASKS
from locvlm.presets import preset
from locvlm.records import write_json, write_jsonl

N = 30
VOID = {"meta", "link", "br", "img"}


class Balance(HTMLParser):
    """Checks that every element is closed, and collects texts and references."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.references += [value or "" for name, value in attrs if name in ("href", "src", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.references += [value or "" for name, value in attrs if name in ("href", "src", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def arm(folder: Path, n_right: int, *, localization: bool = True) -> Path:
    """Results of one model: `n_right` of N left/right questions, and boxes that are right as often."""
    folder.mkdir(parents=True)
    spatial = [
        {
            "id": str(i),
            "task": "coco-spatial",
            "image": f"{i}.png",
            "prompt": "Which side of <b>cat</b> is dog located?",
            "answer": "It is left" if i < n_right else "It is right",
            "parsed": "left" if i < n_right else "right",
            "reference": "left",
            "boxes": {"dog": [1, 1, 4, 4]},
        }
        for i in range(N)
    ]
    results: dict[str, list[dict[str, Any]]] = {"coco-spatial": spatial}
    if localization:
        results["localization"] = [
            {
                "id": str(i),
                "image": f"{i}.png",
                "prompt": "Localize the object described dog?",
                "answer": "(0,0,24,24)" if i < n_right else "(40,40,48,48)",
                "parsed": [0, 0, 6, 6] if i < n_right else [10, 10, 12, 12],
                "reference": {
                    "objective": "loc_pred",
                    "category": "dog",
                    "box": [0, 0, 6, 6],
                    "width": 12,
                    "height": 12,
                },
                "boxes": {"dog": [0, 0, 6, 6]},
            }
            for i in range(N)
        ]
    for task, rows in results.items():
        write_jsonl(folder / f"{task}.jsonl", rows)
        meta = {
            "task": task,
            "dataset": "scenes",
            "config": preset("tiny").model_dump(mode="json"),
            "decoding": {"temperature": 0.0},
            "model": {"fingerprint": f"sha256:{folder.name}", "receipt": {"steps": 1200}},
            "identity": {"data": "sha256:da7a"},
        }
        write_json(folder / f"{task}.meta.json", meta)
        write_metrics(folder / f"{task}.metrics.json", score(TASKS[task], folder / f"{task}.jsonl"))
    return folder


@pytest.fixture
def world(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for i in range(N):
        Image.new("RGB", (12, 12), (8 * i, 0, 0)).save(tmp_path / "images" / f"{i}.png")
    points = [{"step": i, "loss": 3 / i, "tokens": 100 * i, "seconds": 2.0 * i} for i in range(1, 50)]
    write_jsonl(tmp_path / "curve.jsonl", points)
    return tmp_path


def make(world: Path, *, images: bool = True, title: str = "A & B") -> str:
    good, poor = arm(world / "locvlm", 25), arm(world / "baseline", 12, localization=False)
    arms = [read_arm("locvlm", good), read_arm("baseline", poor)]
    curves = [read_curve("locvlm instruct", world / "curve.jsonl", ["locvlm", "baseline"])]
    html, _ = write_report(arms, curves, world / "images" if images else None, world / "report", title)
    return html.read_text(encoding="utf-8")


def test_the_page_is_whole_and_refers_to_nothing_outside(world: Path) -> None:
    page = make(world)
    parser = Balance()
    parser.feed(page)
    assert parser.open == []
    assert parser.references
    assert all(reference.startswith(("data:", "#")) for reference in parser.references)
    assert not re.search(r"@import|url\(\s*['\"]?(?!#)", page)
    assert "<script" not in page
    assert str(world) not in page


def test_numbers_intervals_floor_paper_and_verdict_are_on_the_page(world: Path) -> None:
    parser = Balance()
    parser.feed(make(world))
    text = " ".join(parser.text.split())
    assert "83.3" in text  # 25 of 30
    assert "40.0" in text  # 12 of 30
    assert "+43.3" in text
    assert "Table 4, direct" in text
    assert "7 billion parameters" in text
    assert "always the mean box" in text
    assert "baseline: not run (no localization.metrics.json in its folder)" in text
    assert "sha256:locvlm" in text
    assert "training steps" in text
    assert "1200" in text
    assert "49 steps, last loss 0.061, 4 900 tokens, 1 min 38 s" in text


def test_what_a_model_or_a_file_says_is_never_markup(world: Path) -> None:
    page = make(world, title="<i>x</i>")
    assert "<b>cat" not in page
    assert "&lt;b&gt;cat" in page
    assert "<i>x" not in page


def test_pictures_show_successes_and_failures_of_both(world: Path) -> None:
    page = make(world)
    figures = re.findall(r"<figure.*?</figure>", page, flags=re.DOTALL)
    spatial = [figure for figure in figures if "Which side of" in figure]
    marks = {tuple(re.findall(r'title="(right|wrong)"', figure)) for figure in spatial}
    assert marks == {("right", "right"), ("right", "wrong"), ("wrong", "wrong")}
    located = [figure for figure in figures if "Localize" in figure]
    assert len(located) == 6
    for figure in located:
        assert len(re.findall(r'class="truth"', figure)) == 1
        assert len(re.findall(r'class="guess dash"', figure)) == 1
        assert "pixelated" in figure


def test_without_images_the_page_says_so(world: Path) -> None:
    page = make(world, images=False)
    assert "No pictures: no image folder was given." in page
    assert "<figure" not in page


def test_the_report_repeats_byte_for_byte(world: Path) -> None:
    first = make(world)
    (world / "again").mkdir()
    for name in ("locvlm", "baseline"):
        (world / name).rename(world / "again" / name)
    assert make(world) == first


def test_the_markdown_holds_the_same_tables(world: Path) -> None:
    make(world)
    text = (world / "report" / "report.md").read_text(encoding="utf-8")
    assert "| Accuracy | 83.3 (" in text
    assert "LLaVA 55.1, LocVLM-B 69.5 (Table 4, direct)" in text
    assert "shown" in text
    assert "| locvlm instruct | 49 | 0.061 | 4900 | 1 min 38 s |" in text


def test_a_folder_without_scores_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no folder"):
        read_arm("x", tmp_path / "no")
    with pytest.raises(DataError, match="run `locvlm score` first"):
        read_arm("x", tmp_path)


def test_scores_under_a_wrong_name_are_told(world: Path) -> None:
    folder = arm(world / "a", 3)
    (folder / "coco-spatial.metrics.json").rename(folder / "presence.metrics.json")
    with pytest.raises(DataError, match="holds scores of the task 'coco-spatial'"):
        read_arm("a", folder)


def test_curves_without_rows_or_losses_are_told(tmp_path: Path) -> None:
    path = tmp_path / "curve.jsonl"
    path.write_text("")
    with pytest.raises(DataError, match="no rows"):
        read_curve("a b", path, [])
    path.write_text('{"step": 1}\n')
    with pytest.raises(DataError, match="rows with step and loss"):
        read_curve("a b", path, [])


def test_a_curve_takes_the_colour_of_its_arm_and_the_theme_of_the_page(world: Path) -> None:
    curve = read_curve("base line align", world / "curve.jsonl", ["locvlm", "base line"])
    assert (curve.label, curve.panel, curve.colour) == ("base line", "align", 1)
    svg = curves_svg([curve])
    assert svg.startswith("<svg")
    assert "var(--arm1)" in svg
    assert "var(--arm0)" not in svg
    assert "<style" not in svg
    assert curves_svg([curve]) == svg


def test_small_images_are_enlarged_by_whole_pixels_and_large_ones_reduced(tmp_path: Path) -> None:
    import base64
    import io

    def decoded(uri: str) -> Image.Image:
        return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))

    Image.new("RGB", (48, 24), (9, 8, 7)).save(tmp_path / "small.png")
    small = picture(tmp_path / "small.png")
    assert (small.width, small.height) == (48, 24)
    assert decoded(small.uri).size == (384, 192)
    assert decoded(small.uri).getpixel((383, 191)) == (9, 8, 7)
    Image.new("RGB", (2000, 1000)).save(tmp_path / "large.png")
    large = picture(tmp_path / "large.png")
    assert (large.width, large.height) == (2000, 1000)
    assert decoded(large.uri).size == (640, 320)
