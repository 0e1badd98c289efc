"""COCO annotations -> LocPred, NegPred and RevLoc records: ours against pycocotools and dict loops.

    python benchmarks/coco_records.py [--images 20000] [--rounds 3]

Both do the same work on the same generated file (polygons included), alternately and each in its own process. The
records are compared first: without equal records there is no figure. Printed are the medians of CPU seconds and of peak
memory (both after the imports), and their ratios.
"""

import argparse
import contextlib
import hashlib
import io
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

SEED = 0
N_CATEGORIES = 80


def generate(path: Path, n_images: int) -> None:
    """A file with the density of instances_train2017: 7.3 objects and about 3 kB an image, 1% crowd regions, ids with
    gaps and in no order."""
    rng = random.Random(SEED)
    categories = [{"id": 1 + key * 9 // 8, "name": f"thing {key}", "supercategory": "x"} for key in range(N_CATEGORIES)]
    image_ids = rng.sample(range(1, 6 * n_images), n_images)
    images, annotations = [], []
    for image_id in image_ids:
        width, height = rng.choice(((640, 480), (480, 640), (640, 427), (500, 375)))
        images.append({"license": 1, "file_name": f"{image_id:012d}.jpg", "width": width, "height": height})
        images[-1] |= {"coco_url": f"http://images/{image_id:012d}.jpg", "date_captured": "2013-11-14", "id": image_id}
        palette = rng.sample(categories, rng.randint(1, 5))
        n = min(60, int(rng.expovariate(1 / 7.0)) + rng.randint(0, 1))
        annotations += [_annotation(rng, image_id, width, height, rng.choice(palette)["id"]) for _ in range(n)]
    for annotation, key in zip(annotations, rng.sample(range(1, 20 * len(annotations)), len(annotations)), strict=True):
        annotation["id"] = key
    with open(path, "w") as file:
        json.dump({"info": {}, "images": images, "annotations": annotations, "categories": categories}, file)


def _annotation(rng: random.Random, image_id: int, width: int, height: int, category: int) -> dict[str, Any]:
    w, h = round(rng.uniform(4, width / 2), 2), round(rng.uniform(4, height / 2), 2)
    x, y = round(rng.uniform(0, width - w - 1), 2), round(rng.uniform(0, height - h - 1), 2)
    corners = max(4, int(rng.expovariate(1 / 22)))
    polygon = [round(rng.uniform(0, 640), 2) for _ in range(2 * corners)]
    crowd = int(rng.random() < 0.01)
    return {
        "segmentation": {"counts": [1, 2, 3], "size": [height, width]} if crowd else [polygon],
        "area": round(w * h, 4),
        "iscrowd": crowd,
        "image_id": image_id,
        "bbox": [x, y, w, h],
        "category_id": category,
    }


def ours(path: Path) -> Iterator[Any]:
    from locvlm.config import InstructConfig
    from locvlm.data.coco import read_instances
    from locvlm.data.instruct import build_localize_instruct

    yield from build_localize_instruct(read_instances(path), InstructConfig(), SEED)


def peer(path: Path) -> Iterator[Any]:
    """What one writes with pycocotools; the draws are ours, so that the records can be equal."""
    from pycocotools.coco import COCO

    from locvlm.data.instruct import draw

    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(path))
    names = {category["id"]: category["name"] for category in coco.loadCats(coco.getCatIds())}
    for image_id in sorted(coco.getImgIds()):
        image = coco.loadImgs(image_id)[0]
        annotations = sorted(coco.loadAnns(coco.getAnnIds(imgIds=image_id)), key=lambda a: a["id"])
        n = Counter(annotation["category_id"] for annotation in annotations)
        usable = [a for a in annotations if n[a["category_id"]] == 1 and not a["iscrowd"]]
        if not usable:
            continue
        located, reverse = [], []
        for annotation in usable:
            x, y, w, h = annotation["bbox"]
            turn = {"category": names[annotation["category_id"]], "box_xyxy": (x, y, x + w, y + h)}
            located.append({"objective": "loc_pred", **turn})
            reverse.append({"objective": "rev_loc", **turn})
        absent = [name for key, name in sorted(names.items()) if key not in n]
        category = absent[draw(len(absent), SEED, image_id, "category", 0)]
        place = draw(len(located) + 1, SEED, image_id, "place", 0)
        located.insert(place, {"objective": "neg_pred", "category": category, "box_xyxy": None})
        about = {"image": image["file_name"], "width": image["width"], "height": image["height"]}
        for objective, turns in (("loc_pred", located), ("rev_loc", reverse)):
            yield {"id": f"{image_id}-{objective}", **about, "objective": objective, "turns": turns}


def digest(records: Iterable[Any]) -> str:
    """One fingerprint for objects and dicts of equal content."""
    value = hashlib.sha256()

    def field(thing: Any, name: str) -> Any:
        return thing[name] if isinstance(thing, dict) else getattr(thing, name)

    for record in records:
        head = [field(record, name) for name in ("id", "image", "width", "height", "objective")]
        turns = [
            [field(turn, name) for name in ("objective", "category", "box_xyxy")] for turn in field(record, "turns")
        ]
        value.update(json.dumps([head, turns]).encode())
    return value.hexdigest()


def measure(side: str, path: Path) -> dict[str, Any]:
    """Run one side in this process."""
    import pycocotools.coco  # noqa: F401

    import locvlm.data.instruct  # noqa: F401

    before = peak_kib()
    start, wall = time.process_time(), time.perf_counter()
    run = {"ours": ours, "peer": peer}[side]
    n = sum(1 for _ in run(path))
    cpu, wall = time.process_time() - start, time.perf_counter() - wall
    peak = peak_kib() - before
    return {"n": n, "cpu": cpu, "wall": wall, "mib": peak / 1024, "digest": digest(run(path))}


def peak_kib() -> int:
    """Peak resident memory of this program (ru_maxrss would begin with the parent's)."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", choices=("ours", "peer"), help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure, args.file)))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "instances.json")
        generate(path, args.images)
        print(f"{args.images:,} images, {path.stat().st_size / 1e6:.0f} MB")
        runs: dict[str, list[dict[str, Any]]] = {"ours": [], "peer": []}
        for _ in range(args.rounds):
            for side in ("ours", "peer"):
                command = [sys.executable, __file__, "--measure", side, "--file", str(path)]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                runs[side].append(json.loads(done.stdout))
    if len({run["digest"] for side in runs.values() for run in side}) != 1:
        sys.exit("the records differ, so the figures would mean nothing")
    print(f"{runs['ours'][0]['n']:,} records, equal on both sides")
    medians = {
        side: {key: statistics.median(run[key] for run in done) for key in ("cpu", "wall", "mib")}
        for side, done in runs.items()
    }
    for side, name in (("ours", "locvlm"), ("peer", "pycocotools + loops")):
        m = medians[side]
        print(f"{name:20} {m['cpu']:7.2f} s CPU {m['wall']:7.2f} s wall {m['mib']:7.0f} MiB")
    ratios = {key: medians["peer"][key] / medians["ours"][key] for key in medians["ours"]}
    print(f"ratio (medians of {args.rounds}): CPU {ratios['cpu']:.1f}x, memory {ratios['mib']:.1f}x")


if __name__ == "__main__":
    main()
