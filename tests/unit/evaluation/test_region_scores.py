from pathlib import Path
from typing import Any

import pytest

from locvlm.errors import DataError
from locvlm.evaluation.meteor import Meteor, Segments
from locvlm.evaluation.metrics import Item, summarise
from locvlm.evaluation.questions import Question, QuestionSet
from locvlm.evaluation.region import RegionScorer, question
from locvlm.evaluation.score import score
from locvlm.evaluation.tasks import TASKS, read_set
from locvlm.presets import preset
from locvlm.records import write_jsonl

REGIONS = TASKS["region-description"]
CATEGORIES = ("cat", "dog", "hot dog", "traffic light")


def ask(key: str, category: str) -> Question:
    return question({"id": key, "image": f"{key}.png", "prompt": "?", "category": category, "box": [0, 0, 1, 1]})


def rules_for(questions: list[Question]) -> RegionScorer:
    return RegionScorer(QuestionSet("set", tuple(questions), CATEGORIES))


@pytest.mark.parametrize(
    ("answer", "named"),
    [
        ("There is a dog.", ["dog"]),
        ("There is a hot dog.", ["hot dog"]),
        ("a HOT  DOG beside a dog", ["hot dog", "dog"]),
        ("hotdog, dogs and a category", None),
        ("a traffic light", ["traffic light"]),
        ("", None),
    ],
)
def test_the_longest_whole_words_are_read(answer: str, named: list[str] | None) -> None:
    assert rules_for([ask("0", "dog")]).parse(answer, ask("0", "dog")) == named


def test_scores_worked_by_hand() -> None:
    questions = [ask("0", "dog"), ask("1", "dog"), ask("2", "cat"), ask("3", "hot dog"), ask("4", "cat")]
    answers = ["There is a dog.", "a dog and a cat", "There is a dog.", "a thing", None]
    rules = rules_for(questions)
    entries = [Item(q.id, q.image, rules.sums(a, q)) for a, q in zip(answers, questions, strict=True)]
    found = {name: figure.value for name, figure in summarise(entries, rules.figures, rules.floors()).items()}
    assert found == pytest.approx({"accuracy": 1 / 5, "names_category": 2 / 5, "names_nothing": 2 / 5})


def test_the_floor_is_the_commonest_category() -> None:
    floor = rules_for([ask("0", "dog"), ask("1", "dog"), ask("2", "cat")]).floors()["accuracy"]
    assert (floor.value, floor.answer) == (pytest.approx(2 / 3), "always 'dog'")


def expressions(answers: list[str | None], *, category: str | None = None) -> RegionScorer:
    rows = [["the cat on the left", "a black cat sitting on a chair."], ["left bottle", "the green bottle"]]
    questions = tuple(
        question({"id": str(n), "box": [0, 0, 1, 1], "references": texts, "category": category})
        for n, texts in enumerate(rows)
    )
    names = (category,) if category else ()
    rules = RegionScorer(QuestionSet("set", questions, names))
    rules.prepare({str(n): answer for n, answer in enumerate(answers)})
    return rules


def test_meteor_is_the_corpus_figure_with_and_without_the_prefix(meteor: Meteor) -> None:
    answers = ["There is a cat that is black and sitting on a chair.", "There is a bottle."]
    rules = expressions(list(answers))
    assert rules.figures == ("meteor", "meteor_stripped")
    questions = rules._questions
    items = [Item(q.id, q.image, rules.sums(a, q)) for q, a in zip(questions, answers, strict=True)]
    found = summarise(items, rules.figures, rules.floors())
    references = [q.reference["references"] for q in questions]
    whole = Segments(answers, references)
    bare = Segments(["cat that is black and sitting on a chair.", "bottle."], references)
    scores = meteor.score(whole, bare)
    common = max(text for texts in references for text in texts)  # each is there once
    (floor,) = meteor.score(Segments([common] * 2, references))
    for name, score_of in zip(rules.figures, scores, strict=True):
        assert found[name].value == pytest.approx(score_of.corpus, abs=1e-12)
        assert found[name].n == 2
        assert found[name].floor == pytest.approx(floor.corpus, abs=1e-12)
        assert found[name].floor_answer == f"always '{common}'"
        assert found[name].low is not None
        assert found[name].low < found[name].value < (found[name].high or 0)
        assert found[name].value != pytest.approx(sum(score_of.segments) / 2, abs=1e-3)


def test_a_region_without_an_answer_lowers_meteor_and_stays_in_the_count(meteor: Meteor) -> None:
    answered = "There is a cat that is black and sitting on a chair."
    rules = expressions([answered, None], category="cat")
    items = [Item(q.id, q.image, rules.sums(a, q)) for q, a in zip(rules._questions, [answered, None], strict=True)]
    found = summarise(items, rules.figures, rules.floors())
    (alone,) = meteor.score(Segments([answered], [rules._questions[0].reference["references"]]))
    assert 0 < found["meteor"].value < alone.corpus
    assert found["meteor"].n == 2
    assert found["accuracy"].value == 0.5  # where a category is known, its rules go on


def refs_file(folder: Path, **more: Any) -> Path:
    row = {"id": 7, "box": [10, 20, 50, 60], "width": 100, "height": 100, "references": ["red cup", "left cup"]}
    write_jsonl(folder / "refs.jsonl", [{**row, **more}])
    return folder / "refs.jsonl"


def test_refs_are_asked_with_the_papers_first_prompt(tmp_path: Path) -> None:
    tiny = preset("tiny")  # 48 bins
    (found,) = read_set(REGIONS, refs_file(tmp_path), tiny).questions
    assert found.prompt == "Describe the object located at (5,10,24,29)?"
    assert found.boxes == {"region": (10, 20, 50, 60)}
    with pytest.raises(DataError, match="box or the size of its image is not known"):
        read_set(REGIONS, refs_file(tmp_path, box=None), tiny)


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"references": []}, "holds an empty one"),
        ({"references": "cup"}, "not a list of texts"),
        ({"references": ["cup", ""]}, "holds an empty one"),
        ({"references": [3]}, "not a list of texts"),
        ({"box": [1, 2, 3]}, "is not \\[x1, y1, x2, y2\\]"),
        ({"width": 0}, "no usable 'width'"),
    ],
)
def test_faulty_refs_are_told(tmp_path: Path, row: dict[str, Any], fault: str) -> None:
    with pytest.raises(DataError, match=fault):
        read_set(REGIONS, refs_file(tmp_path, **row))


def test_a_refs_file_is_scored_through_the_task(tmp_path: Path, meteor: Meteor) -> None:
    write_jsonl(tmp_path / "p.jsonl", [{"ref_id": 7, "sent": "There is a red cup."}])
    found = score(REGIONS, tmp_path / "p.jsonl", refs_file(tmp_path))
    assert (found["primary"], found["n"]) == ("meteor", 1)
    assert found["meteor"] == pytest.approx(meteor.score(Segments(["There is a red cup."], [["red cup"]]))[0].corpus)
    assert found["meteor_stripped"] == 1.0
    (tmp_path / "p.json").write_text('{"predictions": [{"ref_id": 7, "sent": "red cup"}]}')  # as REFER wraps them
    assert score(REGIONS, tmp_path / "p.json", refs_file(tmp_path))["meteor"] == 1.0


def test_a_split_of_the_official_pickle_is_scored(realdata: Path, tmp_path: Path, meteor: Meteor) -> None:
    path = realdata / "refcoco" / "refer_format_refcocog_umd_tiny" / "refs(umd).p"
    with pytest.raises(DataError, match="holds the splits test, train, val, none was named; name one with --split"):
        read_set(REGIONS, path)
    with pytest.raises(DataError, match="'testB' was asked for"):
        read_set(REGIONS, path, split="testB")
    questions = read_set(REGIONS, path, split="val").questions
    rows = [{"id": q.id, "answer": q.reference["references"][0]} for q in questions]
    write_jsonl(tmp_path / "p.jsonl", rows)
    found = score(REGIONS, tmp_path / "p.jsonl", path, split="val")
    assert (found["n"], found["meteor"]) == (len(questions), pytest.approx(1.0))
    assert found["dataset"] == "refer_format_refcocog_umd_tiny-val"
    asked = read_set(REGIONS, path, preset("tiny"), split="val").questions
    assert all(q.prompt.startswith("Describe the object located at (") for q in asked)
    assert all(q.image.startswith("COCO_train2014_") for q in asked)
