from pathlib import Path
from typing import Any

import pytest

from locvlm.errors import ConfigError, DataError
from locvlm.evaluation.arms import Arm, Result, facts_of, read_arm, with_files, with_labels
from locvlm.evaluation.paper_tables import Keywords, PaperLine, PaperTable, paper_tables, read_keywords_file
from locvlm.evaluation.score import write_metrics
from locvlm.presets import preset
from locvlm.records import write_json


def metrics(task: str, dataset: str, figures: dict[str, float], **more: Any) -> dict[str, Any]:
    shown = {
        name: {"value": v, "n": 100, "low": v - 0.05, "high": v + 0.05, "floor": None, "floor_answer": ""}
        for name, v in figures.items()
    }
    items = {"1": {"image": "1.png", "sums": {}}}
    told = {"format": 1, "task": task, "primary": next(iter(figures)), "dataset": dataset, "n": 100, "n_images": 50}
    return {**told, "figures": shown, "n_failures": 0, "items": items, **more}


def arm(name: str, *results: dict[str, Any], **labels: Any) -> Arm:
    return Arm(name, tuple(Result(entry, {}, {}) for entry in results), labels)


def table(number: str, arms: list[Arm], keywords: tuple[Keywords, ...] = (), which: int = 0) -> PaperTable:
    return [one for one in paper_tables(arms, keywords) if one.number == number][which]


def cells(found: PaperTable, line: PaperLine) -> dict[str, str]:
    return {head: cell.text or cell.reason for head, cell in zip(found.heads, line.cells, strict=True)}


def ours(found: PaperTable) -> list[dict[str, str]]:
    return [cells(found, line) for line in found.lines if line.arm is not None]


def test_all_tables_are_there_without_any_arm() -> None:
    numbers = [one.number for one in paper_tables([])]
    assert numbers == ["2", "4", "5", "6", "7", "8", "9", "10", "11", "11", "12", "13", "14"]
    assert all(one.n_ours == 0 for one in paper_tables([]))
    assert all(len(line.cells) == len(one.heads) for one in paper_tables([]) for line in one.lines)
    first = cells(table("4", []), table("4", []).lines[0])
    assert (first["All L/R"], first["Right"]) == ("45.5", "4.74")


def test_spatial_accuracies_go_to_the_columns_of_their_axis() -> None:
    sides = metrics("coco-spatial", "h", {"accuracy": 0.7, "accuracy_left": 0.8, "accuracy_right": 0.6})
    heights = metrics("coco-spatial", "v", {"accuracy": 0.5, "accuracy_above": 0.4, "accuracy_below": 0.6})
    direct, icl = ours(table("4", [arm("a", sides, heights)]))
    assert list(direct.values()) == ["70.0", "80.0", "60.0", "50.0", "40.0", "60.0"]
    assert set(icl.values()) == {"no metrics given"}
    only = ours(table("4", [arm("a", sides)]))[0]
    assert only["Above"] == "no metrics given for above and below"
    assert ours(table("13", [arm("a", heights)]))[0]["All"] == "no metrics given for left and right"


def test_popes_mean_f1_needs_all_three_splits() -> None:
    splits = [metrics("pope", f"coco_pope_{name}", {"f1": v}) for name, v in zip("rpa", (0.9, 0.8, 0.7), strict=True)]
    named = [
        {**m, "dataset": f"coco_pope_{s}"} for m, s in zip(splits, ("random", "popular", "adversarial"), strict=True)
    ]
    found = table("9", [arm("a", *named)])
    lines = {(line.label, line.arm): cells(found, line) for line in found.lines}
    assert lines[("mean, a", 0)]["F1"] == "80.0"
    assert lines[("mean, LLaVA", None)]["F1"] == "66.4"
    assert lines[("popular, a", 0)]["F1"] == "80.0"
    assert "lack accuracy" in lines[("popular, a", 0)]["Accuracy"]
    found = table("9", [arm("a", named[0])])
    lines = {(line.label, line.arm): cells(found, line) for line in found.lines}
    assert lines[("mean, a", 0)]["F1"] == "1 of 3 splits given"
    assert lines[("popular, a", 0)]["F1"] == "no metrics given for this set, only for coco_pope_random"


def test_every_judge_has_a_column_of_its_own() -> None:
    one = arm("a", metrics("activitynet-qa", "test_q", {"accuracy": 0.6}, judge="lexical"))
    two = arm("b", metrics("activitynet-qa", "test_q", {"accuracy": 0.4}, judge="exact"), metrics("gqa", "x", {"f": 1}))
    found = table("6", [one, two, arm("c")])
    a, b, c = ours(found)
    theirs, exact, lexical = (f"ActivityNet-QA, judge {name}" for name in ("GPT-3.5 of 2023", "exact", "lexical"))
    assert (a[theirs], a[exact], a[lexical]) == ("judge differs", "judge differs", "60.0")
    assert (b[theirs], b[exact], b[lexical]) == ("judge differs", "40.0", "judge differs")
    assert "needs video data" in c[exact]
    assert "needs video data" in a["MSVD-QA, judge GPT-3.5 of 2023"]
    last = next(cells(found, line) for line in found.lines if line.label == "LocVLM-Vid-B")
    assert (last[theirs], last[exact]) == ("37.4", "judge differs")


def test_regions_and_presence_sets_are_told_by_their_names() -> None:
    model = arm(
        "a",
        metrics("region-description", "refcoco+-testB", {"meteor": 0.1}),
        metrics("presence", "hal-act", {"accuracy": 0.7}),
        metrics("presence", "hallucination", {"accuracy": 0.9}),
    )
    assert ours(table("10", [model]))[0]["RefCOCO+ testB"] == "10.0"
    assert "no metrics given for this set" in ours(table("10", [model]))[0]["RefCOCO testB"]
    presence = ours(table("8", [model]))[0]
    assert (presence["Hal-COCO"], presence["Hal-Act"]) == ("90.0", "70.0")
    assert "no metrics given" in presence["Hal-ADE"]
    missing = arm(
        "b", metrics("region-description", "refcocog-val", {"accuracy": 1}, not_computed={"meteor": "no Java; x"})
    )
    assert ours(table("10", [missing]))[0]["RefCOCOg val"] == "not computed: no Java"


def config(*changes: str, name: str = "locvlm-b") -> dict[str, Any]:
    return preset(name, changes).model_dump(mode="json")


def test_ablation_runs_are_labelled_by_their_config() -> None:
    nfp = arm("nfp", metrics("gqa", "testdev", {"accuracy": 0.46}, config=config("coordinates.representation=nfp")))
    unknown = arm("who", metrics("gqa", "testdev", {"accuracy": 0.40}))
    found = table("2", [unknown, nfp])
    assert [(line.label, line.arm) for line in found.lines if line.arm is not None] == [("nfp", 1)]
    assert ours(found)[0]["Coordinates"] == "NFP"
    assert ours(found)[0]["GQA"] == "46.0"
    assert any("Not in this table" in note and "who" in note for note in found.notes)


def test_objectives_come_from_the_mixture_or_the_sources_of_the_receipt() -> None:
    some = "stages.instruct.mixture=[{source: localize, objective: loc_pred}, {source: llava}]"
    mixed = arm("m", metrics("gqa", "x", {"accuracy": 0.1}, config=config(some)))
    assert {key: facts_of(mixed)[key] for key in ("locpred", "negpred", "revloc")} == {
        "locpred": True,
        "negpred": False,
        "revloc": False,
    }
    receipt = {"fingerprint": "f", "receipt": {"stage": "instruct", "data": {"localize": "sha256:0"}}}
    whole = arm("w", metrics("gqa", "x", {"accuracy": 0.1}, config=config(), model=receipt))
    assert facts_of(whole)["revloc"] is True
    nothing = arm("n", metrics("gqa", "x", {"accuracy": 0.1}, config=config()))
    assert "revloc" not in facts_of(nothing)
    video = "stages.video.mixture=[{source: localize-video, objective: neg_pred}]"
    film = arm("v", metrics("gqa", "x", {"accuracy": 0.1}, config=config(video, name="locvlm-vid-b-plus")))
    assert (facts_of(film)["video_negpred"], facts_of(film)["video_revloc"], facts_of(film)["frames"]) == (
        True,
        False,
        "8",
    )
    assert [row["NegPred"] for row in ours(table("12", [mixed, film]))] == ["yes"]


def test_labels_say_what_a_config_does_not() -> None:
    plain = arm("a", metrics("gqa", "testdev", {"accuracy": 0.465}, config=config()))
    assert ours(table("11", [plain], which=1)) == []
    told = with_labels(plain, {"pseudo_data": "no", "location": "point"})
    row = ours(table("11", [told], which=1))[0]
    assert (row["Location"], row["Pseudo-data"], row["GQA"]) == ("point", "no", "46.5")
    with pytest.raises(ConfigError, match="'colour' is not one of"):
        with_labels(plain, {"colour": "red"})
    with pytest.raises(ConfigError, match="must be yes or no"):
        with_labels(plain, {"pseudo_data": "maybe"})


def test_table_14_takes_the_counts_of_data_keywords(tmp_path: Path) -> None:
    phrases = {"the left": {"conversations": 4, "percent_of_conversations": 0.5714}}
    write_json(tmp_path / "keywords.json", {"conversations": 700, "phrases": phrases})
    found = table("14", [], (read_keywords_file("mine", tmp_path),))
    assert list(cells(found, found.lines[1]).values())[:1] == ["4"]
    assert found.lines[1].cells[1].text == "0.57"
    assert found.lines[1].cells[2].reason == "not counted"
    assert found.lines[0].cells[0].text == "171"
    faulty: list[Any] = [[], {"phrases": []}, {"phrases": {"the left": 3}}, {"a": 1}]
    for content in faulty:
        write_json(tmp_path / "other.json", content)
        with pytest.raises(DataError, match="no phrase counts"):
            read_keywords_file("mine", tmp_path / "other.json")


def test_an_arm_holds_any_number_of_files(tmp_path: Path) -> None:
    for split in ("random", "popular"):
        write_metrics(tmp_path / f"pope-{split}.metrics.json", metrics("pope", f"coco_pope_{split}", {"f1": 0.5}))
    write_metrics(tmp_path / "elsewhere.json", metrics("gqa", "testdev", {"accuracy": 0.5}))
    found = with_files("a", read_arm("a", tmp_path), [tmp_path / "elsewhere.json"])
    assert [result.key[:2] for result in found.results] == [
        ("pope", "coco_pope_popular"),
        ("pope", "coco_pope_random"),
        ("gqa", "testdev"),
    ]
    assert with_files("b", None, [tmp_path / "elsewhere.json"]).results[0].task == "gqa"
    with pytest.raises(DataError, match="two of its metrics files are of gqa on testdev"):
        with_files("a", found, [tmp_path / "elsewhere.json"])
    write_metrics(tmp_path / "odd.metrics.json", metrics("chess", "x", {"f1": 0.5}))
    with pytest.raises(DataError, match="task 'chess', which is not known"):
        read_arm("a", tmp_path)
