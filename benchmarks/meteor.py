"""METEOR 1.5 of the five region-description splits: one Java process for all against pycocoevalcap, one for each.

    python benchmarks/meteor.py [--regions 400] [--rounds 1]

The same tokeniser, jar and texts on both sides, alternately and each in its own process. The scores, of every corpus
and of every segment, are compared first: without equal scores there is no figure. Times are those of the whole process
tree, Java included, as wall clock and as CPU seconds; a machine that does other work too distorts the first.
"""

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SEED = 0
SPLITS = ("refcoco-testB", "refcoco+-testB", "refcocog-val", "refcocog-test", "refcoco-testA")
TOLERANCE = 1e-6
_PLACES = ("on the left", "on right", "in the middle", "front", "behind the table", "next to the window", "far right")
_THINGS = (
    "bottle",
    "cake",
    "car",
    "horse",
    "elephant",
    "chair",
    "tv",
    "bowl",
    "boat",
    "giraffe",
    "man",
    "woman",
    "kid",
)
_LOOKS = ("red", "green", "big", "dark", "tall", "striped", "half eaten", "smiling", "sitting", "standing", "parked")


def generate(path: Path, n_regions: int) -> None:
    """One to three expressions a region, an answer in the words of the RevLoc template or without them."""
    rng = random.Random(SEED)

    def expression() -> str:
        words = [rng.choice(_LOOKS) if rng.random() < 0.6 else "", rng.choice(_THINGS)]
        words.append(rng.choice(_PLACES) if rng.random() < 0.7 else "")
        return " ".join(word for word in words if word)

    splits = {
        name: {
            "references": [[expression() for _ in range(rng.randint(1, 3))] for _ in range(n_regions)],
            "hypotheses": [f"There is a {expression()}." if rng.random() < 0.8 else "" for _ in range(n_regions)],
        }
        for name in SPLITS
    }
    path.write_text(json.dumps(splits))


def ours(splits: dict[str, Any]) -> list[list[float]]:
    from locvlm.evaluation.meteor import Meteor, Segments

    with Meteor() as meteor:
        corpora = [Segments(split["hypotheses"], split["references"]) for split in splits.values()]
        return [[scores.corpus, *scores.segments] for scores in meteor.score(*corpora)]


def peer(splits: dict[str, Any]) -> list[list[float]]:
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    found = []
    for split in splits.values():
        tokenizer = PTBTokenizer()
        references = dict(enumerate([{"caption": text} for text in texts] for texts in split["references"]))
        answers = dict(enumerate([{"caption": text}] for text in split["hypotheses"]))
        corpus, segments = Meteor().compute_score(tokenizer.tokenize(references), tokenizer.tokenize(answers))
        found.append([corpus, *segments])
    return found


def measure(side: str, file: Path) -> dict[str, Any]:
    """Run one side in this process."""
    splits = json.loads(file.read_text())
    begin = time.perf_counter()
    scores = {"ours": ours, "peer": peer}[side](splits)
    return {"wall": time.perf_counter() - begin, "scores": scores}


def main() -> None:
    from locvlm.evaluation.meteor import find_java

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--regions", type=int, default=400, help="in each split")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--measure", choices=("ours", "peer"), help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure, args.file)))
        return
    java = Path(find_java()).parent  # the peer looks on PATH only
    environment = {**os.environ, "PATH": f"{java}{os.pathsep}{os.environ.get('PATH', '')}"}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "splits.json")
        generate(file, args.regions)
        runs: dict[str, list[dict[str, Any]]] = {"ours": [], "peer": []}
        for _ in range(args.rounds):
            for side in runs:
                command = [sys.executable, __file__, "--measure", side, "--file", str(file)]
                before = _children_cpu()
                done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
                cpu = _children_cpu() - before
                runs[side].append({**json.loads(done.stdout.splitlines()[-1]), "cpu": cpu})
    first = runs["ours"][0]["scores"]
    others = [run["scores"] for side in runs.values() for run in side]
    apart = max(
        abs(a - b)
        for other in others
        for ours_of, theirs_of in zip(first, other, strict=True)
        for a, b in zip(ours_of, theirs_of, strict=True)
    )
    if apart > TOLERANCE:
        sys.exit(f"the scores differ by up to {apart:.2g}, so the times would mean nothing")
    told = ", ".join(f"{name} {scores[0]:.4f}" for name, scores in zip(SPLITS, first, strict=True))
    print(f"{len(SPLITS)} splits of {args.regions} regions: {told}; equal to {TOLERANCE:g} in every segment")
    labels = {"ours": "locvlm, one Java", "peer": "pycocoevalcap, one a split"}
    medians = {
        side: {kind: statistics.median(run[kind] for run in done) for kind in ("wall", "cpu")}
        for side, done in runs.items()
    }
    for side, label in labels.items():
        print(f"{label:28} {medians[side]['wall']:7.1f} s   {medians[side]['cpu']:7.1f} s CPU")
    wall, cpu = (medians["peer"][kind] / medians["ours"][kind] for kind in ("wall", "cpu"))
    print(f"ratio (medians of {args.rounds}): {wall:.1f}x, CPU {cpu:.1f}x")


def _children_cpu() -> float:
    """CPU seconds of all processes that were waited for, and of theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
