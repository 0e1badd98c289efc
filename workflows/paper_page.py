"""The page of the paper in miniature: what was run, the gates, each claim with its verdict, and all arms."""

import textwrap
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from locvlm.evaluation.metrics import paired_difference
from locvlm.evaluation.score import read_metrics
from locvlm.evaluation.verdicts import Contrast, Verdict, contrast, overall
from locvlm.prompts import rev_answer
from locvlm.records import read_json, read_jsonl
from locvlm.training.foundation import RECIPE
from workflows.mixtures import STATED_SHARE
from workflows.paper_arms import (
    ALIGNED,
    ASKED_BEFORE,
    CAPTIONER,
    CAPTIONS,
    CLAIMS,
    DIRECT,
    EXPRESSIONS,
    MINIATURE,
    N_TEST,
    N_TRAIN,
    NAMED,
    PRESENCE,
    SIDE,
    WHERE,
    Claim,
    Plan,
    foundation_of,
)

GATE = 0.9


def page(plan: Plan) -> str:
    """The page: what was run, the gates, each claim with its verdict, the figures behind it, and all arms."""
    arms = ["## Arms", "", "| arm | what it is |", "|---|---|"]
    arms += [f"| {trained.name} | {trained.title} |" for trained in MINIATURE]
    sections = [_head(plan), "\n".join(arms), _gates(plan)]
    rows = ["## Claims", "", "| | claim | paper's table | verdict | of each figure |", "|---|---|---|---|---|"]
    details = []
    for claim in CLAIMS:
        found = [_contrast(plan, *names) for *names, _ in claim.contrasts]
        verdicts: list[Verdict] = ["not run" if one is None else one.verdict for one in found]
        each = "; ".join(f"{words}: {verdict}" for (*_, words), verdict in zip(claim.contrasts, verdicts, strict=True))
        rows.append(f"| {claim.letter} | {claim.text} | {claim.tables} | **{overall(verdicts)}** | {each} |")
        details += _details(plan, claim, found)
        if any(task == EXPRESSIONS for _, _, task, _, _ in claim.contrasts):
            details.append(_told(plan))
    sections += ["\n".join(rows), "\n".join(details), _arms(plan)]
    return "\n\n".join(sections) + "\n"


def _head(plan: Plan) -> str:
    stage = plan.config.stages.instruct
    assert stage is not None
    n_figures = sum(len(claim.contrasts) for claim in CLAIMS)
    before = ""
    if ASKED_BEFORE and tuple(plan.scenes) == (N_TRAIN, N_TEST):
        before = f"""
- The test scenes were asked before, by {ASKED_BEFORE};
  the recipe was changed afterwards. Nothing is trained on them, but they are not unseen by whoever chose the recipe."""
    return f"""# The paper in miniature

Claims of "Learning to Localize Objects Improves Spatial Reasoning in Visual-LLMs" (CVPR 2024), tried with a tiny model
on drawn scenes. Written by `make paper`; do not edit.

A model is taught, beside captions, to say where a named object is (LocPred), to say that it is not there (NegPred) and
to name what is at a place (RevLoc), places written as text: as integer bins (IVB), as fractions (NFP) or as deviations
from an anchor (DIGA). Scenes are coloured shapes, each with a name ({plan.scenes[0]} to train on, {plan.scenes[1]} to
ask about, drawn for this page alone). The tiny preset, {len(plan.seeds)} seeds ({", ".join(map(str, plan.seeds))});
stage 1 and stage 2 from the same foundation, the one that the package ships (`make foundation` makes it again), whose
lessons had scenes of their own, and asked in words of their own and in those of the evaluation (see the gates).

- Image arms start from `align`, the model of their seed after stage 1, and take {stage.steps} steps of
  {stage.global_batch} images with {stage.conversations_per_image} questions each. Arms take equally many questions,
  not tokens: a place costs more tokens than a yes. Without location objectives fewer of them are different ones: an
  image has one caption and few presence questions to ask.{before}
- Where a run goes on on another machine, `align`, and the full arm that video arms start from, are taught again there:
  from the same seed, not to the bit, and on some processors in fp32 instead of bf16. The figures of both are those of
  the first time.
- No arm but `direct` is asked about sides in an image; {100 * STATED_SHARE:.0f} % of the questions of the others are
  about sides in scenes stated in words, of other names, so that the language model does not forget them. Columns and
  rows stand there as whole numbers, as integer-valued binning writes them: in claim d that is in its favour.
- Where an arm lacks a location objective, captions and presence questions have its share, half and half.
- `captions` reads and says sides in images: they are what its objects are told by, as in the paper's pseudo-captions.
- `direct`, the gate, is asked the evaluated questions themselves, for {DIRECT.n_times} times the steps: it tells what
  can be learned here at all, not what can be in {stage.steps} steps.
- Video arms start from the full arm of their seed and take {plan.video_steps} steps on drawn clips of 8 frames, in
  which some things move; they see 4 of the frames, and are asked about other clips and what stays in place there.
  `video-none` has captions in the place of the location objectives.

A claim is *shown* when the 95 % interval of the difference over the seeds (Student's, a seed is one observation) lies
above 0 in every figure named, and so does the one that the questions leave (all seeds are asked the same ones:
bootstrap over the images, both arms together, the mean of the seeds' ends), and the mean of the better arm is above the
floor, the best answer that never looks at the image (RevLoc: or that names any object of the image without looking at
the place, which is more); *shown in part* when that is so in some; *contrary* when both lie below 0 in one of them and
the mean of the other arm is above the floor; else *not shown*. Each of the {n_figures} figures is decided at 95 % by
itself: with no effect anywhere, one in 40 would still come out as shown.

Percent. The answers lie in `runs/*/predictions/<seed>/<arm>/`, and packed beside this page with the settings of each
arm: `locvlm score --task TASK --predictions FILE --config configs/ARM.yaml` computes every figure of an arm again
(METEOR, which needs Java, from `expressions.jsonl` with `--task region-description`); `make paper ARGS="--continue
--only-report"` makes this page again."""


def _gates(plan: Plan) -> str:
    rows = ["## Gates", "", "| gate | figure | wanted | passed |", "|---|---|---|---|"]
    rows += _gates_of_the_foundation(foundation_of(plan.config))
    gates = [
        ("left or right, asked directly in training", "coco-spatial", "accuracy"),
        ("presence, asked directly in training", "presence", "accuracy"),
        ("LocPred, centre in box", "localization", "centre_in_box"),
        ("RevLoc, names the object there", "region-description", "names_category"),
    ]
    for words, task, figure in gates:
        values = [value for seed in plan.seeds for value in _values(plan, DIRECT.name, task, figure, [seed]) or []]
        if not values:
            rows.append(f"| {words} | not run | {100 * GATE:.0f} | |")
            continue
        n_seeds = "" if len(values) == len(plan.seeds) else f" ({len(values)} of {len(plan.seeds)} seeds)"
        passed = "yes" if sum(values) / len(values) >= GATE else "no"
        rows.append(f"| {words} | {_each(values)}{n_seeds} | {100 * GATE:.0f} | {passed} |")
    return "\n".join(rows)


def _gates_of_the_foundation(folder: Path) -> list[str]:
    """What it could do before stage 1, as its recipe has it."""
    figures = read_json(folder / RECIPE).get("figures", {})
    gates = [
        ("foundation: the tower tells what a patch shows", "tower", "category"),
        ("foundation: the tower tells the column of what a patch shows (of 12)", "tower", "column"),
        ("foundation: the tower tells the row of what a patch shows (of 12)", "tower", "row"),
        ("foundation: presence in stated scenes, names held out", "reading", "presence"),
        ("foundation: left or right in stated scenes, names held out", "reading", "side"),
        ("foundation: above or below in stated scenes, names held out", "reading", "height"),
        ("foundation: presence in the words of the evaluation", "reading", "presence_in_full"),
        ("foundation: left or right likewise", "reading", "side_in_full"),
        ("foundation: presence in scenes of soft tokens (as an image is given), names held out", "soft", "presence"),
        ("foundation: left or right likewise", "soft", "side"),
        ("foundation: above or below likewise", "soft", "height"),
        ("foundation: presence in scenes of soft tokens, in the words of the evaluation", "soft", "presence_in_full"),
        ("foundation: left or right likewise", "soft", "side_in_full"),
        ("foundation: the column of a name in them, asked and answered in any words", "soft", "told"),
    ]
    rows = []
    for words, lesson, name in gates:
        value = figures.get(lesson, {}).get(name)
        found = "not known" if value is None else f"{100 * value:.1f}"
        passed = "" if value is None else "yes" if value >= GATE else "no"
        rows.append(f"| {words} | {found} | {100 * GATE:.0f} | {passed} |")
    return rows


def _details(plan: Plan, claim: Claim, found: Sequence[Contrast | None]) -> list[str]:
    names = [
        "figure",
        "questions",
        "arm",
        "other arm",
        "difference (95 % over seeds)",
        "by the questions",
        "floor",
        "verdict",
    ]
    lines = [f"### {claim.letter}: {claim.text}", "", f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    rows = [(*said, one, "{}") for said, one in zip(claim.contrasts, found, strict=True)]
    rows += [(*said, _contrast(plan, *said[:4]), "({}; beside the claim)") for said in claim.beside]
    for better, other, task, figure, words, one, verdict in rows:
        if one is None:
            lines.append(f"| {words} | | {better} | {other} | | | | {verdict.format('not run')} |")
            continue
        between = "" if one.low is None or one.high is None else f" ({_range(one.low, one.high)})"
        floor = "" if one.floor is None else f"{100 * one.floor:.1f}"
        sides = (f"{name} {100 * spread.mean:.1f}" for name, spread in ((better, one.better), (other, one.other)))
        difference = f"{_signed(one.difference)}{between} | {_range(*one.by_questions) if one.by_questions else ''}"
        asked, verdict = _questions(plan, better, task, figure), verdict.format(one.verdict)
        lines.append(f"| {words} | {asked} | {' | '.join(sides)} | {difference} | {floor} | {verdict} |")
    return [*lines, "", *([textwrap.fill(claim.notes, 116), ""] if claim.notes else [])]


def _range(low: float, high: float) -> str:
    return f"{_signed(low)} to {_signed(high)}"


def _signed(share: float) -> str:
    """Percent with its sign; two digits where one would hide on which side of 0 it is."""
    percent = 100 * share
    return f"{percent:+.2f}" if 0 < abs(percent) < 1 else f"{percent:+.1f}"


def _questions(plan: Plan, name: str, task: str, figure: str) -> str:
    """How many count for a figure, and in how many images those are that could."""
    metrics = read_metrics(plan.metrics(name, plan.seeds[0], task))
    images = {item["image"] for item in metrics["items"].values() if figure in item["sums"]}
    return f"{metrics['figures'][figure]['n']} in {len(images)} images"


def _told(plan: Plan) -> str:
    """How well the captioner did, where there was one."""
    path = plan.root / CAPTIONER
    if not path.is_file():
        return ""
    found = read_json(path)
    share = 100 * found["word for word"] / found["objects"]
    return f"""The captioner, one for all seeds, is the aligned model of seed {found["seed"]} after stage 2 on what
objects are told by in {plan.scenes[0]} other scenes (`locvlm data described`: "The tent is located to the left of
book."), taken from their annotations. It describes {share:.1f} % of the {found["objects"]} objects of the training
scenes that are the only one of their kind there as the annotations do, word by word. What the answers are scored
against are such descriptions of the test scenes{_word_for_word(plan)}.
"""


def _word_for_word(plan: Plan) -> str:
    """How often the arm with pseudo-captions describes an object as the reference does, seed by seed."""
    shares = []
    for path in (plan.answers(CAPTIONS.name, seed, EXPRESSIONS) for seed in plan.seeds):
        if path.is_file():
            rows = list(read_jsonl(path))
            same = sum(row["answer"] in map(rev_answer, row["reference"]["references"]) for row in rows)
            shares.append(same / len(rows))
    return f", of which the arm gives {_each(shares)} % word by word" if shares else ""


def _arms(plan: Plan) -> str:
    names = ["left or right", "turned around", "asked presence", "presence", "LocPred IoU", "NegPred F1", "RevLoc"]
    figures = [
        SIDE,
        (SIDE[0], "opposite_reading"),
        PRESENCE,
        WHERE,
        ("localization", "neg_f1"),
        NAMED,
    ]
    told = """*Turned around*: the share of answers that name the opposite side; with 0 % right and 100 % turned around
a model tells the sides apart and calls each by the other's name. *Asked presence*: the share of presence questions in
training. RevLoc is the share of answers that name the object, which the descriptions of `captions` could do by naming
another's neighbour: left out."""
    chance = _named_by_chance(plan)
    if chance is not None:
        told += f" Naming an object of the image wherever it is asked about is right in {100 * chance:.1f} %.\n"
        told += "An answer with both words counts as right and as turned around."
    lines = [
        "## All arms, a figure a seed",
        "",
        told,
        "",
        f"| arm | {' | '.join(names)} |",
        "|---" * (len(names) + 1) + "|",
    ]
    for trained in MINIATURE:
        cells = [_each(_values(plan, trained.name, *figure) or []) for figure in figures]
        if trained.captioned:
            cells[-1] = ""
        if any(cells):
            cells.insert(2, "" if trained is ALIGNED else f"{100 * trained.presence_share:.0f}")
            lines.append(f"| {trained.name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _contrast(plan: Plan, better: str, other: str, task: str, figure: str) -> Contrast | None:
    """None where one of the arms is not finished for every seed."""
    values = [_values(plan, name, task, figure) for name in (better, other)]
    if values[0] is None or values[1] is None:
        return None
    found = [[read_metrics(plan.metrics(name, seed, task)) for name in (better, other)] for seed in plan.seeds]
    floor = found[0][0]["figures"][figure]["floor"]
    if (task, figure) == NAMED:
        floor = max(floor, _named_by_chance(plan) or 0)
    return contrast(values[0], values[1], floor, [paired_difference(one, two, figure) for one, two in found])


def _named_by_chance(plan: Plan) -> float | None:
    """How often RevLoc is right that names an object of the image, whatever place is asked about: one over the kinds
    that are in the image once (no other is asked about), mean over the questions of the test scenes. None where the
    full arm of the first seed was not asked."""
    path, answers = plan.root / "data" / "scenes" / "instances_test.json", plan.answers("full", plan.seeds[0], NAMED[0])
    if not (path.is_file() and answers.is_file()):
        return None
    annotations = read_json(path)
    files = {one["id"]: one["file_name"] for one in annotations["images"]}
    kinds = Counter((files[one["image_id"]], one["category_id"]) for one in annotations["annotations"])
    single = Counter(file for (file, _), n in kinds.items() if n == 1)
    shares = [1 / single[row["image"]] for row in read_jsonl(answers)]
    return sum(shares) / len(shares)


def _values(plan: Plan, name: str, task: str, figure: str, seeds: Sequence[int] = ()) -> list[float] | None:
    """A figure of an arm, seed by seed (default: all); None where it is not finished for each, or has none such."""
    paths = [plan.metrics(name, seed, task) for seed in seeds or plan.seeds]
    if not all(path.is_file() for path in paths):
        return None
    found = [read_metrics(path)["figures"] for path in paths]
    if not all(figure in figures for figures in found):  # points have no overlap
        return None
    return [float(figures[figure]["value"]) for figures in found]


def _each(values: Sequence[float]) -> str:
    return ", ".join(f"{100 * value:.1f}" for value in values)
