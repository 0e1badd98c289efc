"""Opening the Localize-Instruct set on a training rank: ours against LLaVA's `json.load` of the same conversations.

    python benchmarks/open_dataset.py [--conversations 191798] [--rounds 5]

191,798 conversations (those of 95,899 images) are built once from a generated COCO file and written twice: as our Arrow
file, and as the plain list {id, image, conversations} that LLaVA reads. A rank of ours opens the file and reads the
image and the objective of every row, which is what it plans an epoch with; LLaVA's reads the list. Compared first:
every conversation of ours, rendered, is the record of the list. Printed are the medians of CPU seconds and of the
memory that opening adds to the process (what of a mapped file was touched counts as its own), and their ratios.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from coco_records import SEED, TRAIN2017_IMAGES, generate, peak_kib

CONVERSATIONS = 191_798


def build(folder: Path, n: int) -> None:
    """conversations.arrow and list.json of the same n conversations."""
    from locvlm.config import InstructConfig
    from locvlm.data.coco import read_instances
    from locvlm.data.conversations import write_conversations
    from locvlm.data.instruct import build_localize_instruct

    generate(folder / "instances.json", min(TRAIN2017_IMAGES, n))
    built = build_localize_instruct(read_instances(folder / "instances.json"), InstructConfig(), SEED)
    counts = write_conversations(folder, islice(built, n))
    if counts["conversations"] < n:
        sys.exit(f"the generated file gave {counts['conversations']:,} conversations; ask for no more")
    with open(folder / "list.json", "w") as file:
        json.dump(list(rendered(folder)), file)


def rendered(folder: Path) -> Iterator[dict[str, Any]]:
    """The conversations of the Arrow file as LLaVA's records."""
    from locvlm.config import CoordinateConfig, PromptConfig
    from locvlm.coordinates import make_location_format
    from locvlm.data.conversations import llava_record, open_conversations
    from locvlm.data.instruct import Renderer

    renderer = Renderer(make_location_format(CoordinateConfig()), PromptConfig(), SEED)
    for conversation in open_conversations(folder):
        record = llava_record(conversation, renderer.turns(conversation))
        yield {key: record[key] for key in ("id", "image", "conversations")}


def compare(folder: Path) -> int:
    """The number of conversations; leaves when one of them differs from its record."""
    records = json.loads((folder / "list.json").read_bytes())
    for number, (ours, theirs) in enumerate(zip(rendered(folder), records, strict=True)):
        if ours != theirs:
            sys.exit(f"conversation {number} differs, so the figures would mean nothing: {ours} and {theirs}")
    return len(records)


def measure(side: str, folder: Path) -> dict[str, Any]:
    """Open the set in this process."""
    from locvlm.data.conversations import open_conversations

    before, start, wall = peak_kib(), time.process_time(), time.perf_counter()
    if side == "ours":
        opened = open_conversations(folder)
        kept: Any = (opened, opened.images, opened.objectives)
    else:
        with open(folder / "list.json") as file:
            kept = (json.load(file),)
    cpu, wall = time.process_time() - start, time.perf_counter() - wall
    return {"n": len(kept[0]), "cpu": cpu, "wall": wall, "mib": (peak_kib() - before) / 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conversations", type=int, default=CONVERSATIONS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--side", choices=("ours", "peer"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(measure(args.side, args.folder)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build(folder, args.conversations)
        sizes = [(folder / file).stat().st_size / 1e6 for file in ("conversations.arrow", "list.json")]
        print(
            f"{compare(folder):,} conversations, equal on both sides; {sizes[0]:.0f} and {sizes[1]:.0f} MB", flush=True
        )
        runs: dict[str, list[dict[str, Any]]] = {"ours": [], "peer": []}
        for _ in range(args.rounds):
            for side, done in runs.items():
                command = [sys.executable, __file__, "--side", side, "--folder", name]
                done.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    medians = {
        side: {key: statistics.median(run[key] for run in done) for key in ("cpu", "wall", "mib")}
        for side, done in runs.items()
    }
    for side, label in (("ours", "locvlm"), ("peer", "json.load")):
        m = medians[side]
        print(f"{label:12} {m['cpu']:7.3f} s CPU {m['wall']:7.3f} s wall {m['mib']:7.0f} MiB")
    ratios = {key: medians["peer"][key] / medians["ours"][key] for key in medians["ours"]}
    print(f"ratio (medians of {args.rounds}): CPU {ratios['cpu']:.1f}x, memory {ratios['mib']:.1f}x")


if __name__ == "__main__":
    main()
