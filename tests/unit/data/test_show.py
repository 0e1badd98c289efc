import base64
import io
import json
import math
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import msgspec
import pytest
from PIL import Image

from locvlm.coordinates import make_location_format
from locvlm.data.actnet import VideoLabels
from locvlm.data.conversations import llava_record, write_conversations
from locvlm.data.distribution import chi_square_p, conversation_distribution
from locvlm.data.instruct import Renderer, draw
from locvlm.data.marks import Marks
from locvlm.data.pages import picture
from locvlm.data.panoptic import Segment
from locvlm.data.show import Groups, View, open_dataset, write_page
from locvlm.errors import DataError
from locvlm.presets import preset
from locvlm.prompts import LOC_PROMPTS, REV_PROMPTS
from locvlm.records import Conversation, Manifest, Turn, write_jsonl, write_manifest

CONFIG = preset("locvlm-b")
RENDERER = Renderer(make_location_format(CONFIG.coordinates), CONFIG.prompts, 0)
DOG, CAT = (64.0, 48.0, 320.0, 240.0), (400.0, 10.5, 630.0, 300.0)
HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&"
VOID = {"meta", "link", "image", "rect", "line", "circle"}


class Page(HTMLParser):
    """What a page holds; fails on an element that is not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.samples: list[str] = []
        self.groups: list[str] = []
        self.boxes: list[tuple[str, tuple[float, ...]]] = []  # (sample, (x, y, width, height))
        self.images: list[str] = []
        self.references: list[str] = []
        self.coloured: list[tuple[str, str]] = []  # (class, text)
        self.text = ""
        self._class = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.tags[tag] += 1
        assert not any(name.startswith("on") for name in found)
        if tag not in VOID:
            self.open.append(tag)
        self._class = found.get("class", "")
        self.references += [value for name, value in found.items() if name in ("href", "src", "xlink:href")]
        if tag == "article":
            self.samples.append(found["data-id"])
        if tag == "rect" and self._class.startswith("box"):
            place = tuple(float(found[name]) for name in ("x", "y", "width", "height"))
            self.boxes.append((self.samples[-1], place))
        if tag == "image":
            self.images.append(found["href"])

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.open and self.open[-1] == "b":
            self.coloured.append((self._class.strip(), data))
        if self.open and self.open[-1] == "h3" and self._class == "group":
            self.groups.append(data)


def conversations(n: int = 10, description: str = "") -> list[Conversation]:
    found = []
    for key in range(n):
        size = (f"{key}.png", 640, 480)
        located = (
            Turn("loc_pred", "dog", description, DOG),
            Turn("neg_pred", "zebra"),
            Turn("loc_pred", "cat", "", CAT),
        )
        found.append(Conversation(f"{key}-loc_pred", *size, "loc_pred", located))
        found.append(Conversation(f"{key}-rev_loc", *size, "rev_loc", (Turn("rev_loc", "dog", description, DOG),)))
    return found


def dataset(folder: Path, rows: list[Conversation]) -> Path:
    counts = write_conversations(folder, rows)
    forms = {"coordinates": CONFIG.coordinates.model_dump(mode="json")}
    write_manifest(folder, Manifest("localize-instruct", counts, {"image file that is missing": 3}, **forms))
    return folder


def questions(folder: Path, rows: list[dict[str, Any]], options: dict[str, Any] | None = None) -> Path:
    folder.mkdir()
    write_jsonl(folder / "questions.jsonl", rows)
    write_manifest(folder, Manifest("set", {"questions": len(rows)}, extra={"options": options or {}}))
    return folder


def images(folder: Path) -> Any:
    """What gives the pictures: PNG files of a folder."""

    def shoot(name: str, medium: str, indices: Any) -> Any:
        path = folder / name
        if not path.is_file():
            return "missing"
        with Image.open(path) as image:
            return picture(image)

    return shoot


def shown(path: Path, tmp_path: Path, **options: Any) -> Page:
    output = tmp_path / "page.html"
    write_page(path, output, View(**{"renderer": RENDERER, **options}))
    return Page(output.read_text(encoding="utf-8"))


def test_a_page_shows_as_many_samples_as_asked_for_and_every_objective(tmp_path: Path) -> None:
    folder = dataset(tmp_path / "set", conversations())
    page = shown(folder, tmp_path, n=6)
    assert len(page.samples) == len(set(page.samples)) == 6
    assert page.groups == ["loc_pred", "neg_pred", "rev_loc"]
    assert len(shown(folder, tmp_path, n=100).samples) == 20
    seeds = {tuple(shown(folder, tmp_path, n=6, seed=seed).samples) for seed in range(4)}
    assert len(seeds) == 4


def test_samples_of_one_objective_only(tmp_path: Path) -> None:
    folder = dataset(tmp_path / "set", conversations())
    page = shown(folder, tmp_path, n=8, objective="rev_loc")
    assert len(page.samples) == 8
    assert all(name.endswith("rev_loc") for name in page.samples)
    with pytest.raises(DataError, match="nothing of the objective 'caption'; there are loc_pred, neg_pred, rev_loc"):
        shown(folder, tmp_path, objective="caption")


def test_too_few_samples_for_all_objectives_are_told(tmp_path: Path) -> None:
    page = shown(dataset(tmp_path / "set", conversations()), tmp_path, n=1)
    assert "Not among these samples: neg_pred, rev_loc" in " ".join(page.text.split())


def test_boxes_are_drawn_at_their_pixels_and_their_text_has_their_colour(tmp_path: Path) -> None:
    page = shown(dataset(tmp_path / "set", conversations(1)), tmp_path)
    located = [box for name, box in page.boxes if name == "0-loc_pred"]
    assert located == [(64, 48, 256, 192), (400, 10.5, 230, 289.5)]
    assert [box for name, box in page.boxes if name == "0-rev_loc"] == [(64, 48, 256, 192)]
    coloured = set(page.coloured)
    assert ("o0", RENDERER.location.encode(DOG, 640, 480)) in coloured
    assert ("o1", RENDERER.location.encode(CAT, 640, 480)) in coloured
    assert {("o0", "dog"), ("o1", "cat"), ("o0", "64, 48, 320, 240 px")} <= coloured
    assert not any(text == "zebra" for _, text in coloured)


def test_the_text_is_that_of_the_renderer_in_its_form(tmp_path: Path) -> None:
    rows = conversations(1)
    folder = dataset(tmp_path / "set", rows)
    nfp = Renderer(
        make_location_format(preset("locvlm-b", ["coordinates.representation=nfp"]).coordinates), CONFIG.prompts, 7
    )
    text = shown(folder, tmp_path, renderer=nfp).text
    for question, answer in nfp.turns(rows[0]):
        assert question in text
        assert answer in text
    assert "(0.1000,0.1000,0.5000,0.5000)" in text
    assert "<image>" in text  # unfolded: what the model reads


def test_a_form_that_is_not_known_is_told_and_the_boxes_stay(tmp_path: Path) -> None:
    page = shown(dataset(tmp_path / "set", conversations(1)), tmp_path, renderer=None)
    assert "nothing says how this set writes places" in page.text
    assert len(page.boxes) == 3


def test_pictures_are_embedded_and_those_missing_are_counted(tmp_path: Path) -> None:
    folder = dataset(tmp_path / "set", conversations(3))
    pixels = tmp_path / "images"
    pixels.mkdir()
    Image.new("RGB", (640, 480), (200, 30, 30)).save(pixels / "0.png")
    Image.new("RGB", (320, 480), (200, 30, 30)).save(pixels / "1.png")
    output = tmp_path / "page.html"
    found = write_page(folder, output, View(renderer=RENDERER, shoot=images(pixels)))
    assert found.samples == 6
    assert found.faults == {"missing": 2, "the picture has another size than the record says": 2}
    page = Page(output.read_text())
    assert len(page.images) == 4
    kind, _, data = page.images[0].partition(",")
    assert kind == "data:image/jpeg;base64"
    red, green, blue = Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB").getpixel((9, 9))
    assert red > 180
    assert max(green, blue) < 60
    text = " ".join(page.text.split())
    assert "2 of 6: missing." in text
    assert "No image folder" not in text


def test_without_pictures_the_canvas_has_the_size_of_the_image(tmp_path: Path) -> None:
    page = shown(dataset(tmp_path / "set", conversations(1)), tmp_path)
    assert "No image folder was given: the boxes stand on an empty canvas" in page.text
    assert page.images == []
    assert 'viewBox="0 0 640 480"' in (tmp_path / "page.html").read_text()


def test_what_the_data_say_is_never_markup(tmp_path: Path) -> None:
    rows = conversations(2, HOSTILE)
    rows.append(Conversation(HOSTILE, HOSTILE, 9, 9, "caption", (Turn("caption", question=HOSTILE, answer=HOSTILE),)))
    page = shown(dataset(tmp_path / "set", rows), tmp_path)
    assert page.tags["script"] == page.tags["img"] == 0
    assert page.text.count(HOSTILE) > 5
    assert HOSTILE in page.samples
    raw = (tmp_path / "page.html").read_text()
    assert "<script" not in raw
    assert "default-src 'none'" in raw
    assert page.references
    assert all(reference.startswith(("data:", "#")) for reference in page.references)
    assert not re.search(r"@import|url\(", raw)


def test_the_page_repeats_byte_for_byte(tmp_path: Path) -> None:
    folder = dataset(tmp_path / "set", conversations())
    pages = []
    for name in ("a.html", "b.html"):
        write_page(folder, tmp_path / name, View(renderer=RENDERER, seed=3))
        pages.append((tmp_path / name).read_bytes())
    assert pages[0] == pages[1]
    assert str(tmp_path).encode() not in pages[0]


def test_a_llava_list_is_shown_and_the_boxes_in_its_text_are_read(tmp_path: Path) -> None:
    rows = conversations(2)
    path = tmp_path / "list.json"
    path.write_text(json.dumps([llava_record(row, RENDERER.turns(row)) for row in rows]))
    page = shown(path, tmp_path)
    assert len(page.samples) == 4
    x, y, width, height = next(box for name, box in page.boxes if name == "0-rev_loc")
    assert (x, y) == pytest.approx(DOG[:2], abs=2)
    assert (x + width, y + height) == pytest.approx(DOG[2:], abs=2)


def test_spatial_questions_show_both_objects_and_the_middle_fifth(tmp_path: Path) -> None:
    row = {
        "id": "7-horizontal-0",
        "task": "coco-spatial",
        "image": "7.jpg",
        "width": 640,
        "height": 480,
        "prompt": "Which side of dog is cat located?",
        "reference": "right",
        "icl_prompt": "Q: Which side ...",
        "icl_reference": "left",
        "subject": {"category": "cat", "box": list(CAT)},
        "object": {"category": "dog", "box": list(DOG)},
        "third": None,
    }
    folder = questions(
        tmp_path / "set", [row, {**row, "id": "8", "reference": "left"}], {"rules": "paper", "axis": "horizontal"}
    )
    page = shown(folder, tmp_path)
    assert page.groups == ["left", "right"]
    assert [box[:2] for name, box in page.boxes if name == "8"] == [(400, 10.5), (64, 48)]
    assert {("o0", "cat"), ("o1", "dog")} <= set(page.coloured)
    raw = (tmp_path / "page.html").read_text()
    assert raw.count('<line class="band" x1="256.00" x2="256.00"') == 2
    assert "centre at 80.5 % from the left" in page.text


def test_presence_localization_and_region_rows_are_shown(tmp_path: Path) -> None:
    common = {"image": "1.jpg", "width": 640, "height": 480}
    rows = [
        {
            "id": 1,
            "task": "presence",
            "prompt": "Is there dog in image?",
            "reference": "yes",
            "category": "dog",
            **common,
        },
        {
            "id": 2,
            "task": "localization",
            "objective": "loc_pred",
            "prompt": "Where?",
            "category": "dog",
            "box": DOG,
            **common,
        },
        {
            "id": 3,
            "task": "region-description",
            "prompt": "What?",
            "references": ["a dog", "dog"],
            "box": CAT,
            **common,
        },
        {"id": 4, "note": "no question"},
    ]
    page = shown(questions(tmp_path / "set", rows), tmp_path)
    assert page.groups == ["loc_pred", "region-description", "yes"]
    assert [name for name, _ in page.boxes] == ["2", "3"]
    assert "a dog | dog" in page.text
    assert "skipped: records that are no questions" in page.text


def test_official_pope_files_are_shown(realdata: Path, tmp_path: Path) -> None:
    path = realdata / "pope" / "coco_pope_random.json"
    page = shown(path, tmp_path, n=4, renderer=None)
    assert page.groups == ["no", "yes"]
    text = " ".join(page.text.split())
    assert "4 of 2 910 records" in text
    assert "images or videos500" in text


def test_labels_of_videos_show_the_middle_frame(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    frames = tuple((Segment("dog", True, (k, 5.0, k + 20.0, 30.0), 400),) for k in range(3))
    labels = VideoLabels("v.mp4", 64, 48, (4, 9, 14), frames, ("cat",))
    (folder / "videos.jsonl").write_bytes(msgspec.json.encode(labels) + b"\n")
    write_manifest(folder, Manifest("pseudo-actnet", {"videos": 1}))
    asked: list[Any] = []

    def shoot(name: str, medium: str, indices: Any) -> Any:
        asked.append((name, medium, tuple(indices)))
        return picture(Image.new("RGB", (64, 48)))

    page = shown(folder, tmp_path, shoot=shoot)
    assert asked == [("v.mp4", "video", (4, 9, 14))]
    assert page.boxes == [("v.mp4", (1, 5, 20, 25))]
    assert "frame 9 (shown)" in page.text


def test_questions_about_videos_show_a_frame(tmp_path: Path) -> None:
    row = {"id": "v.mp4-presence-0", "task": "presence", "image": "v.mp4", "medium": "video", "reference": "yes"}
    folder = questions(tmp_path / "set", [{**row, "prompt": "Is there dog in video?"}], {"source": "act"})
    asked: list[Any] = []

    def shoot(name: str, medium: str, indices: Any) -> Any:
        asked.append((name, medium, tuple(indices)))
        return picture(Image.new("RGB", (64, 48)))

    shown(folder, tmp_path, shoot=shoot)
    assert asked == [("v.mp4", "video", ())]


def test_a_broken_line_of_labels_is_told(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "videos.jsonl").write_text('{"video": 1}\n{"video": 2}\n')
    write_manifest(folder, Manifest("pseudo-actnet", {"videos": 1}))
    with pytest.raises(DataError, match="record 1 is not the labels of a video"):
        shown(folder, tmp_path)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('{"images": [], "annotations": []}', "this is an annotation file"),
        ('{"a": 1}\n{"a": 2}\n', "holds nothing to show"),
        ("[1, 2]", "holds nothing to show"),
        ("", "the file is empty"),
        ("not json", "not valid JSON"),
    ],
)
def test_a_file_that_is_no_data_set_is_told(tmp_path: Path, content: str, told: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(DataError, match=told):
        shown(path, tmp_path)
    assert not (tmp_path / "page.html").exists()


def test_broken_unicode_nan_and_a_box_turned_round_do_not_break_the_page(tmp_path: Path) -> None:
    lines = [
        '{"id": 1, "prompt": "half \\ud800 pair", "reference": "no"}',
        '{"id": 2, "prompt": "a?", "reference": NaN, "box": [1, 2, NaN, 4], "width": 9, "height": 9}',
        '{"id": 3, "prompt": "b?", "reference": "no", "box": [9, 9, 1, 1], "width": 9, "height": 9}',
        '{"id": 4, "prompt": "c?", "reference": "no", "box": "x", "width": -1, "height": 1e300}',
    ]
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(lines))
    page = shown(path, tmp_path)
    assert len(page.samples) == 4
    assert page.boxes == []


def test_a_missing_path_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        open_dataset(tmp_path / "none")
    with pytest.raises(DataError, match="holds neither"):
        open_dataset(tmp_path)


def test_the_distribution_counts_what_is_there(tmp_path: Path) -> None:
    rows = conversations(30)
    folder = dataset(tmp_path / "set", [*rows, rows[0]])
    found = open_dataset(folder)
    _, distribution = found.read(View(renderer=RENDERER))
    facts = dict(distribution.facts)
    assert facts["conversations"] == "61"
    assert facts["turns"] == "123"
    assert facts["images or videos"] == "30"
    assert facts["ids used before"] == "1"
    assert facts["turns that say the same about the same image as one before"] == "3"
    charts = {chart.title: chart for chart in distribution.charts}
    objectives = {bar.label: bar.n for bar in charts["Turns by objective"].bars}  # type: ignore[union-attr]
    assert objectives == {"loc_pred": 62, "neg_pred": 31, "rev_loc": 30}
    absent = charts["Categories that are not in the image"].bars  # type: ignore[union-attr]
    assert [(bar.label, bar.n) for bar in absent] == [("zebra", 31)]
    area = charts["Area of a box"]
    assert area.kind == "histogram"
    assert sum(area.counts) == 92  # type: ignore[union-attr]
    step = math.floor((math.log10(256 * 192 / (640 * 480)) + 5) * 4)
    assert area.counts[step] == 61  # type: ignore[union-attr]
    heat = charts["Where the boxes are"]
    assert heat.cells[math.floor(144 / 480 * 8)][math.floor(192 / 640 * 8)] == 61  # type: ignore[union-attr]


def test_the_template_draw_is_the_renderers(tmp_path: Path) -> None:
    rows = conversations(200)
    folder = dataset(tmp_path / "set", rows)
    found: Any = open_dataset(folder)
    draws = {item.objective: item for item in conversation_distribution(found.file, RENDERER).templates}
    said = Counter(question for row in rows for question, _ in RENDERER.turns(row))
    located = [
        sum(said[template.format(category=name, repr="(x1,y1,x2,y2) bbox")] for name in ("dog", "cat"))
        for template in LOC_PROMPTS
    ]
    assert list(draws["loc_pred"].counts) == located
    place = RENDERER.location.encode(DOG, 640, 480)
    assert list(draws["rev_loc"].counts) == [said[template.format(loc=place)] for template in REV_PROMPTS]
    assert sum(draws["neg_pred"].counts) == 200
    assert draws["loc_pred"].expected == 80
    assert draws["neg_pred"].p > 0.001


def test_a_draw_that_is_not_uniform_has_a_small_p_value() -> None:
    assert chi_square_p([100, 0, 0]) < 1e-20
    assert chi_square_p([0, 0]) == 1
    assert chi_square_p([7, 7, 7, 7]) == 1
    # tables of the chi-square distribution: 5 % points 3.841 (1 degree), 5.991 (2), 7.815 (3), 9.488 (4)
    for freedom, point in ((1, 3.841), (2, 5.991), (3, 7.815), (4, 9.488)):
        values = freedom + 1
        shift = math.sqrt(point * 1e6 / 2)  # two counts off, the statistic is 2 * shift^2 / expected
        counts = [10**6 + shift, 10**6 - shift, *[10**6] * (values - 2)]
        assert chi_square_p(counts) == pytest.approx(0.05, abs=2e-4)  # type: ignore[arg-type]


def test_groups_take_turns_and_no_row_comes_twice() -> None:
    groups = Groups()
    for row in range(1000):
        groups.add(row, ("common", "rare") if row == 500 else ("common",))
    chosen = groups.choose(4, seed=1)
    assert [name for name, _ in chosen].count("rare") == 1
    assert len({row for _, row in chosen}) == 4
    keys = sorted(range(1000), key=lambda row: draw(1 << 62, 1, "show", row))
    assert {row for name, row in chosen if name == "common"} <= set(keys[:5])


def test_labels_stay_inside_the_picture_and_apart() -> None:
    marks = Marks(None, 640, 480)
    for number in range(6):
        marks.add((5.0 + number, 5.0, 90.0, 60.0), f"thing {number}")
    marks.add((600.0, 470.0, 640.0, 480.0), "a very long label that does not fit anywhere at all")
    tags = list(marks.tags())
    assert len({(tag.x, tag.y, tag.leftwards, tag.upwards) for tag in tags}) == len(tags)
    assert tags[-1].leftwards
    assert tags[-1].upwards
    assert tags[-1].text.endswith("\u2026")


def test_a_picture_of_any_mode_can_be_embedded() -> None:
    for mode in ("RGBA", "P", "L", "CMYK", "I;16", "1"):
        assert picture(Image.new(mode, (700, 300))).width == 700
