"""VQAv2 accuracy of every question: ours against the official evaluator.

    python benchmarks/vqa_scorer.py [--questions 20000] [--rounds 3] [--peer vqaEval.py]

The official evaluator (GT-Vision-Lab/VQA, vqaEval.py) is no package; give a copy with --peer (its Python 2 prints are
no hindrance). Without one the same published algorithm stands in, written here as plainly as it reads: every annotator
against the nine others, every reference normalised on the spot. The output says which of the two ran.

Both score the same generated answers, with words as common as those of VQAv2, alternately and each in its own process.
The accuracies are compared question by question first: without equal ones there is no figure. Reading the files is not
timed, and neither side computes intervals.
"""

import argparse
import contextlib
import io
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

SEED = 0
N_PEOPLE = 10
_NOUNS = """
man woman dog cat table grass sky tree water snow street kitchen bathroom tennis baseball frisbee skateboard
surfboard bench pizza sandwich cake banana apple orange broccoli carrot bus train car truck motorcycle bicycle airplane
boat horse cow sheep elephant giraffe zebra bear bird umbrella handbag suitcase laptop phone keyboard book clock vase
bottle glass fork knife spoon bowl chair couch bed toilet sink oven helmet hat shirt jacket tie shoe glove fence wall
window door sign light beach park field court room house building tower road sidewalk leash collar ball kite ski
"""
_ADJECTIVES = """
white black red blue green brown yellow gray orange pink purple silver tan small large old young wooden
metal plastic striped plaid open closed wet dry sunny cloudy
"""
_SHAPES = (
    "{a}",
    "{n}",
    "{n}s",
    "{a} {n}",
    "{a} and {b}",
    "the {n}",
    "a {n}",
    "on the {n}",
    "{n}/{m}",
    "{a} {n} and {m}",
    "{n} on a {m}",
    "{a}, {b} {n}",
    "{a}-{b}",
)
_ODD = (
    "don't know",
    "dont know",
    "not sure",
    "can't tell",
    "U.S.A.",
    "10:35",
    "2,000",
    "st. louis",
    "coca-cola",
    "2.5",
)
_TYPES = (("yes/no", 0.38), ("number", 0.12), ("other", 0.50))


def generate(path: Path, n_questions: int) -> None:
    """Questions of the three types in VQAv2's shares; people agree on two of three, others stray to a near answer."""
    rng = random.Random(SEED)
    nouns, adjectives = _NOUNS.split(), _ADJECTIVES.split()
    phrases = [
        rng.choice(_SHAPES).format(
            a=rng.choice(adjectives), b=rng.choice(adjectives), n=rng.choice(nouns), m=rng.choice(nouns)
        )
        for _ in range(60_000)
    ]
    phrases = [*nouns, *adjectives, *_ODD, *dict.fromkeys(phrases)]
    heavy = [(rank + 10) ** -0.8 for rank in range(len(phrases))]  # nearly Zipf
    numbers = [*map(str, range(30)), "two", "one", "none", "3:45", "1,500"]
    pools: dict[str, Callable[[int], list[str]]] = {
        "yes/no": lambda k: rng.choices(("yes", "no", "maybe"), (55, 44, 1), k=k),
        "number": lambda k: rng.choices(numbers, [1 / (rank + 1) for rank in range(len(numbers))], k=k),
        "other": lambda k: rng.choices(phrases, heavy, k=k),
    }
    questions = []
    for number in range(n_questions):
        (kind,) = rng.choices([name for name, _ in _TYPES], [share for _, share in _TYPES])
        favourite, *near = pools[kind](3)
        answers = [favourite if rng.random() < 0.65 else rng.choice((favourite, *near)) for _ in range(N_PEOPLE)]
        answers = [text.capitalize() + "." if rng.random() < 0.01 else text for text in answers]
        said = rng.choice((favourite, favourite, near[0], f"{favourite}.", f"The {favourite}"))
        questions.append({"question_id": number, "answer_type": kind, "answers": answers, "said": said})
    path.write_text(json.dumps(questions))


def ours(questions: list[dict[str, Any]]) -> dict[int, float]:
    from locvlm.evaluation.vqa import accuracies

    return {row["question_id"]: accuracies(row["said"], row["answers"])[0] for row in questions}


def official(questions: list[dict[str, Any]], path: Path) -> Callable[[], dict[int, float]]:
    """The evaluator of a copy of vqaEval.py, ready to run."""
    source = re.sub(r"^(\s*)print (['\"].*)$", r"\1print(\2)", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    module: dict[str, Any] = {}
    exec(compile(source, str(path), "exec"), module)
    ids = [row["question_id"] for row in questions]
    annotations = {
        row["question_id"]: {
            "question_type": "what",
            "answer_type": row["answer_type"],
            "answers": [{"answer_id": n, "answer": text} for n, text in enumerate(row["answers"], 1)],
        }
        for row in questions
    }
    results = {row["question_id"]: {"answer": row["said"]} for row in questions}
    evaluator = module["VQAEval"](
        SimpleNamespace(qa=annotations, getQuesIds=lambda: ids),
        SimpleNamespace(qa=results, getQuesIds=lambda: ids),
        n=9,
    )

    def run() -> dict[int, float]:
        with contextlib.redirect_stdout(io.StringIO()):
            evaluator.evaluate()
        return {key: value / 100 for key, value in evaluator.evalQA.items()}

    return run


def as_published(questions: list[dict[str, Any]]) -> dict[int, float]:
    """The published algorithm, step by step. The tables of words are ours, which the tests compare with golden values;
    nothing else is shared."""
    from locvlm.evaluation.vqa import _ARTICLES, _CONTRACTIONS, _NUMBERS, _PUNCTUATION

    comma, period = re.compile(r"(\d)(,)(\d)"), re.compile(r"\.(?!\d)")

    def processed(text: str) -> str:
        out = text
        for mark in _PUNCTUATION:
            if mark + " " in text or " " + mark in text or re.search(comma, text) is not None:
                out = out.replace(mark, "")
            else:
                out = out.replace(mark, " ")
        out = period.sub("", out, count=32)
        words = []
        for word in out.lower().split():
            number = _NUMBERS.get(word, word)
            if number not in _ARTICLES:
                words.append(_CONTRACTIONS.get(number, number))
        return " ".join(words)

    scores = {}
    for row in questions:
        said = row["said"].replace("\n", " ").replace("\t", " ").strip()
        given = [{"id": n, "answer": text.replace("\n", " ").strip()} for n, text in enumerate(row["answers"])]
        if len({person["answer"] for person in given}) > 1:
            said = processed(said)
            for person in given:
                person["answer"] = processed(person["answer"])
        parts = []
        for person in given:
            others = [other for other in given if other != person]
            matching = [other for other in others if other["answer"] == said]
            parts.append(min(1.0, len(matching) / 3))
        scores[row["question_id"]] = sum(parts) / len(parts)
    return scores


def measure(side: str, file: Path, peer: Path | None) -> dict[str, Any]:
    """Run one side in this process."""
    import locvlm.evaluation.vqa  # noqa: F401 - its import is not what is measured

    questions = json.loads(file.read_text())
    run: Callable[[], dict[int, float]] = lambda: ours(questions)  # noqa: E731
    if side == "peer":
        run = official(questions, peer) if peer is not None else lambda: as_published(questions)
    begin = time.process_time()
    scores = run()
    cpu = time.process_time() - begin
    return {"cpu": cpu, "scores": [round(scores[row["question_id"]], 7) for row in questions]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer", type=Path, metavar="FILE", help="a copy of the official vqaEval.py")
    parser.add_argument("--measure", choices=("ours", "peer"), help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure, args.file, args.peer)))
        return
    name = "the published algorithm" if args.peer is None else f"the official {args.peer.name}"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "questions.json")
        generate(file, args.questions)
        answers = [text for row in json.loads(file.read_text()) for text in row["answers"]]
        print(f"{args.questions:,} questions, {len(answers):,} answers of {len(set(answers)):,} kinds; against {name}")
        runs: dict[str, list[dict[str, Any]]] = {"ours": [], "peer": []}
        for _ in range(args.rounds):
            for side in runs:
                command = [sys.executable, __file__, "--measure", side, "--file", str(file)]
                command += ["--peer", str(args.peer.resolve())] if args.peer else []
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                runs[side].append(json.loads(done.stdout))
    first, *others = [run["scores"] for side in runs.values() for run in side]
    differing = sum(any(abs(a - b) > 1e-6 for b in other) for a, *other in zip(first, *others, strict=True))
    if differing:
        sys.exit(f"{differing} questions have another accuracy, so the times would mean nothing")
    print(f"accuracy {100 * statistics.mean(first):.2f}, equal for every question")
    medians = {side: statistics.median(run["cpu"] for run in done) for side, done in runs.items()}
    for side, label in (("ours", "locvlm"), ("peer", name)):
        print(f"{label:28} {medians[side]:7.3f} s CPU")
    print(f"ratio (medians of {args.rounds}): {medians['peer'] / medians['ours']:.1f}x")


if __name__ == "__main__":
    main()
