"""The page of the paper in miniature: what was run, the gates, each claim with its verdict, and all arms."""

from collections.abc import Sequence
from pathlib import Path

from locvlm.evaluation.score import read_metrics
from locvlm.evaluation.verdicts import Contrast, Verdict, contrast, overall
from locvlm.records import read_json
from locvlm.training.foundation import RECIPE
from workflows.mixtures import STATED_SHARE
from workflows.paper_arms import (
    ALIGNED,
    CAPTIONER,
    CLAIMS,
    DIRECT,
    EXPRESSIONS,
    MINIATURE,
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
    sections = [_head(plan), _gates(plan)]
    rows = ["## Claims", "", "| | claim | paper's table | verdict | of each figure |", "|---|---|---|---|---|"]
    details = []
    for claim in CLAIMS:
        found = [(words, _contrast(plan, *names)) for *names, words in claim.contrasts]
        verdicts = [_verdict(one) for _, one in found]
        each = "; ".join(f"{words}: {verdict}" for (words, _), verdict in zip(found, verdicts, strict=True))
        rows.append(f"| {claim.letter} | {claim.text} | {claim.tables} | **{overall(verdicts)}** | {each} |")
        details += _details(claim, found)
        if any(task == EXPRESSIONS for _, _, task, _, _ in claim.contrasts):
            details.append(_told(plan))
    sections += ["\n".join(rows), "\n".join(details), _arms(plan)]
    return "\n\n".join(sections) + "\n"


def _head(plan: Plan) -> str:
    stage = plan.config.stages.instruct
    assert stage is not None
    return f"""# The paper in miniature

Written by `make paper`; do not edit. Drawn scenes ({plan.scenes[0]} to train on, {plan.scenes[1]} to ask about, drawn
for this page alone), the tiny preset, {len(plan.seeds)} seeds ({", ".join(map(str, plan.seeds))}). Stage 1 and stage 2
from the same foundation, the one that the package ships (`make foundation` makes it again), whose lessons had scenes
and words of their own.

- Image arms start from `align`, the model of their seed after stage 1, and take {stage.steps} steps of
  {stage.global_batch} images with {stage.conversations_per_image} questions each. Arms take equally many questions,
  not tokens: a place costs more tokens than a yes.
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
above 0 in every figure named, and the better arm is above the floor, the best answer that never looks at the image;
*shown in part* when it does in some; *contrary* when it lies below 0 in one of them; else *not shown*. Percent; the
answers lie in `runs/*/predictions/<seed>/<arm>/`, and packed beside this page; `locvlm score` computes every figure of
an arm from them again."""


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
        values = _values(plan, DIRECT.name, task, figure)
        if values is None:
            rows.append(f"| {words} | not run | {100 * GATE:.0f} | |")
            continue
        mean = sum(values) / len(values)
        rows.append(f"| {words} | {_each(values)} | {100 * GATE:.0f} | {'yes' if mean >= GATE else 'no'} |")
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


def _details(claim: Claim, found: Sequence[tuple[str, Contrast | None]]) -> list[str]:
    lines = [f"### {claim.letter}: {claim.text}", ""]
    lines += ["| figure | arm | other arm | difference (95 %) | floor | verdict |", "|---|---|---|---|---|---|"]
    for (better, other, _, _, words), (_, one) in zip(claim.contrasts, found, strict=True):
        if one is None:
            lines.append(f"| {words} | {better} | {other} | | | not run |")
            continue
        between = "" if one.low is None or one.high is None else f" ({100 * one.low:+.1f} to {100 * one.high:+.1f})"
        floor = "" if one.floor is None else f"{100 * one.floor:.1f}"
        sides = (f"{name} {100 * spread.mean:.1f}" for name, spread in ((better, one.better), (other, one.other)))
        difference = f"{100 * one.difference:+.1f}{between}"
        lines.append(f"| {words} | {' | '.join(sides)} | {difference} | {floor} | {one.verdict} |")
    return [*lines, ""]


def _told(plan: Plan) -> str:
    """How well the captioner did, where there was one."""
    path = plan.root / CAPTIONER
    if not path.is_file():
        return ""
    found = read_json(path)
    share = 100 * found["word for word"] / found["objects"]
    return f"""The captioner is the aligned model of seed {found["seed"]} after stage 2 on what objects are told by in
{plan.scenes[0]} other scenes (`locvlm data described`: "The tent is located to the left of book."), taken from their
annotations. It describes {share:.1f} % of the {found["objects"]} objects of the training scenes as the annotations do,
word by word.
What the answers are scored against are such descriptions of the test scenes: the arm with captions is taught their
form, the other one is not.
"""


def _arms(plan: Plan) -> str:
    names = ["left or right", "turned around", "asked presence", "presence", "LocPred IoU", "NegPred F1", "RevLoc"]
    figures = [
        SIDE,
        (SIDE[0], "opposite_reading"),
        PRESENCE,
        WHERE,
        ("localization", "neg_f1"),
        ("region-description", "names_category"),
    ]
    told = """*Turned around*: the share of answers that name the opposite side; with 0 % right and 100 % turned around
a model tells the sides apart and calls each by the other's name. *Asked presence*: the share of presence questions in
training. RevLoc is the share of answers that name the object, which the descriptions of `captions` could do by naming
another's neighbour: left out."""
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
    floor = read_metrics(plan.metrics(better, plan.seeds[0], task))["figures"][figure]["floor"]
    return contrast(values[0], values[1], floor)


def _values(plan: Plan, name: str, task: str, figure: str) -> list[float] | None:
    """A figure of an arm, seed by seed; None where it is not finished for every seed, or has no such figure."""
    paths = [plan.metrics(name, seed, task) for seed in plan.seeds]
    if not all(path.is_file() for path in paths):
        return None
    found = [read_metrics(path)["figures"] for path in paths]
    if not all(figure in figures for figures in found):  # points have no overlap
        return None
    return [float(figures[figure]["value"]) for figures in found]


def _verdict(found: Contrast | None) -> Verdict:
    return "not run" if found is None else found.verdict


def _each(values: Sequence[float]) -> str:
    return ", ".join(f"{100 * value:.1f}" for value in values)
