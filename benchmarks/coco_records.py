"""COCO annotations -> LocPred, NegPred, RevLoc and COCO-Spatial records: ours against pycocotools and dict loops.

    python benchmarks/coco_records.py [--images 118287] [--rounds 3]

Both do the same work on the same generated file (by default with the size of instances_train2017: 118,287 images,
860,001 objects, polygons), alternately and each in its own process. Ours writes the Arrow file of the data set; the
peer makes the same records as dicts and keeps none. The records are compared first: without equal records there is no
figure. Printed are the medians of CPU seconds after the imports and of the peak memory of the whole process, and their
ratios. One pass of the peer takes half a minute.
"""

import argparse
import contextlib
import hashlib
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain, combinations
from pathlib import Path
from typing import Any

import numpy as np

SEED = 0
TRAIN2017_IMAGES, TRAIN2017_ANNOTATED, TRAIN2017_OBJECTS = 118_287, 117_266, 860_001
N_CATEGORIES = 80
SIZES = ((640, 480), (480, 640), (640, 427), (500, 375))


def generate(path: Path, n_images: int) -> None:
    """A file with the density of instances_train2017: 860,001 objects and about 450 MB for 118,287 images, 1% crowd
    regions, three categories an image, ids in no order."""
    rng = np.random.default_rng(SEED)
    n_annotated = round(n_images * TRAIN2017_ANNOTATED / TRAIN2017_IMAGES)
    n_objects = round(n_images * TRAIN2017_OBJECTS / TRAIN2017_IMAGES)
    shares = rng.exponential(size=n_annotated)
    n_of_image = np.zeros(n_images, np.int64)
    n_of_image[:n_annotated] = 1 + rng.multinomial(n_objects - n_annotated, shares / shares.sum())
    image_ids = 1 + 5 * rng.permutation(n_images)
    polygons = [_polygon(rng) for _ in range(4096)]
    ids = iter((1 + 20 * rng.permutation(n_objects)).tolist())
    with open(path, "w") as file:
        file.write('{"info": {}, "images": [')
        sizes = [SIZES[number] for number in rng.integers(len(SIZES), size=n_images).tolist()]
        file.write(",\n".join(map(_image, image_ids.tolist(), sizes)))
        file.write('], "annotations": [')
        begin = ""
        for image_id, size, n in zip(image_ids.tolist(), sizes, n_of_image.tolist(), strict=True):
            for category in _categories(rng, n):
                file.write(begin + _annotation(rng, next(ids), image_id, size, 1 + category * 9 // 8, polygons))
                begin = ",\n"
        categories = [{"id": 1 + key * 9 // 8, "name": f"thing {key}"} for key in range(N_CATEGORIES)]
        file.write(f'], "categories": {json.dumps(categories)}}}')


def _image(image_id: int, size: tuple[int, int]) -> str:
    name = f"{image_id:012d}.jpg"
    return (
        f'{{"license": 1, "file_name": "{name}", "coco_url": "http://images.cocodataset.org/train2017/{name}", '
        f'"height": {size[1]}, "width": {size[0]}, "date_captured": "2013-11-14 11:18:45", "id": {image_id}}}'
    )


def _polygon(rng: np.random.Generator) -> str:
    corners = max(4, int(rng.exponential(26)))
    return ",".join(map(str, np.round(rng.uniform(0, 640, 2 * corners), 2).tolist()))


def _categories(rng: np.random.Generator, n: int) -> list[int]:
    """Of the n objects of an image: most are of one category, the others rather of their own."""
    if n == 0:
        return []
    palette = rng.choice(N_CATEGORIES, min(n, 1 + int(rng.poisson(2.7))), replace=False)
    more = palette[np.minimum(rng.geometric(0.8, n - len(palette)) - 1, len(palette) - 1)]
    return [*palette.tolist(), *more.tolist()]


def _annotation(
    rng: np.random.Generator, key: int, image_id: int, size: tuple[int, int], category: int, polygons: list[str]
) -> str:
    (width, height), (u, v, s, t, luck, which) = size, rng.random(6).tolist()
    w, h = round(4 + u * (width / 2 - 4), 2), round(4 + v * (height / 2 - 4), 2)
    x, y = round(s * (width - w - 1), 2), round(t * (height - h - 1), 2)
    crowd = luck < 0.01
    segments = (
        f'{{"counts": [1, 2, 3], "size": [{height}, {width}]}}' if crowd else f"[[{polygons[int(4096 * which)]}]]"
    )
    return (
        f'{{"segmentation": {segments}, "area": {w * h:.4f}, "iscrowd": {int(crowd)}, "image_id": {image_id}, '
        f'"bbox": [{x}, {y}, {w}, {h}], "category_id": {category}, "id": {key}}}'
    )


def ours(path: Path, folder: Path) -> list[dict[str, Any]]:
    """The conversations go into `folder`; returns the rows of the spatial questions."""
    from locvlm.config import InstructConfig
    from locvlm.data.coco import read_instances
    from locvlm.data.conversations import write_conversations
    from locvlm.data.instruct import build_localize_instruct
    from locvlm.data.spatial import build_coco_spatial

    instances = read_instances(path)
    write_conversations(folder, build_localize_instruct(instances, InstructConfig(), SEED))
    return build_coco_spatial(instances).rows


def peer(path: Path) -> Iterator[dict[str, Any]]:
    """What one writes with pycocotools: image by image, the conversations and then the spatial questions. The draws and
    the words are ours, so that the records can be equal."""
    from pycocotools.coco import COCO

    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(path))
    names = {category["id"]: category["name"] for category in coco.loadCats(coco.getCatIds())}
    for image_id in sorted(coco.getImgIds()):
        image = coco.loadImgs(image_id)[0]
        annotations = sorted(coco.loadAnns(coco.getAnnIds(imgIds=image_id)), key=lambda a: a["id"])
        n = Counter(annotation["category_id"] for annotation in annotations)
        unique = []
        for annotation in annotations:
            if n[annotation["category_id"]] == 1 and not annotation["iscrowd"]:
                x, y, w, h = annotation["bbox"]
                unique.append({"category": names[annotation["category_id"]], "box": [x, y, x + w, y + h]})
        if unique:
            absent = [name for key, name in names.items() if key not in n]
            yield from _peer_conversations(image, unique, absent)
            yield from _peer_spatial(image, unique)


def _peer_conversations(
    image: dict[str, Any], unique: list[dict[str, Any]], absent: list[str]
) -> Iterator[dict[str, Any]]:
    from locvlm.data.instruct import draw

    located = [{"objective": "loc_pred", "category": thing["category"], "box": thing["box"]} for thing in unique]
    reverse = [{"objective": "rev_loc", "category": thing["category"], "box": thing["box"]} for thing in unique]
    category = absent[draw(len(absent), SEED, image["id"], "category", 0)]
    place = draw(len(located) + 1, SEED, image["id"], "place", 0)
    located.insert(place, {"objective": "neg_pred", "category": category, "box": None})
    about = {"image": image["file_name"], "width": image["width"], "height": image["height"]}
    for objective, turns in (("loc_pred", located), ("rev_loc", reverse)):
        yield {"id": f"{image['id']}-{objective}", **about, "objective": objective, "turns": turns}


def _peer_spatial(image: dict[str, Any], unique: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The rules of the paper: three unique objects outside the middle fifth, not all on one side."""
    from locvlm.prompts import OPPOSITE, spatial_direct_question, spatial_icl_question

    sided = []
    for thing in unique:
        centre = 5 * (thing["box"][0] + thing["box"][2])  # ten times
        if centre < 4 * image["width"]:
            sided.append((thing, "left"))
        elif centre > 6 * image["width"]:
            sided.append((thing, "right"))
    pairs = [(a, b) for a, b in combinations(sided, 2) if a[1] != b[1]]
    if len(sided) < 3 or not pairs:
        return

    def area(pair: tuple[dict[str, Any], str]) -> float:
        x1, y1, x2, y2 = pair[0]["box"]
        return float((x2 - x1) * (y2 - y1))

    pair = max(pairs, key=lambda pair: area(pair[0]) + area(pair[1]))
    third = max((entry for entry in sided if entry not in pair), key=area)
    (first, word), (second, _) = pair if pair[0][1] != third[1] else pair[::-1]
    names = (first["category"], second["category"], third[0]["category"])
    prompt = spatial_icl_question(*names, word)
    asked = spatial_direct_question(names[2], names[0])
    turned = prompt.removesuffix(asked) + spatial_direct_question(names[0], names[2])
    orders = ((first, second, OPPOSITE[word], prompt), (second, first, word, turned))
    for number, (seen_from, located, side, icl_prompt) in enumerate(orders):
        yield {
            "id": f"{image['id']}-horizontal-{number}",
            "task": "coco-spatial",
            "image": image["file_name"],
            "width": image["width"],
            "height": image["height"],
            "prompt": spatial_direct_question(seen_from["category"], located["category"]),
            "reference": side,
            "icl_prompt": icl_prompt,
            "icl_reference": side,
            "subject": located,
            "object": seen_from,
            "third": third[0],
        }


def as_peer(folder: Path) -> Iterator[dict[str, Any]]:
    """The conversations that ours wrote, in the peer's form."""
    from locvlm.data.conversations import open_conversations

    for stored in open_conversations(folder):
        turns = [
            {"objective": turn.objective, "category": turn.category, "box": turn.box_xyxy and list(turn.box_xyxy)}
            for turn in stored.turns
        ]
        about = {"image": stored.image, "width": stored.width, "height": stored.height}
        yield {"id": stored.id, **about, "objective": stored.objective, "turns": turns}


def digests(records: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Number and fingerprint of the conversations and of the spatial questions, each in their order."""
    counts, values = Counter[str](), {"conversations": hashlib.sha256(), "questions": hashlib.sha256()}
    for record in records:
        kind = "conversations" if "turns" in record else "questions"
        counts[kind] += 1
        values[kind].update(json.dumps(record, sort_keys=True).encode())
    return {kind: [counts[kind], value.hexdigest()] for kind, value in values.items()}


def measure(side: str, path: Path, folder: Path) -> dict[str, Any]:
    """Run one side in this process."""
    import locvlm.data.conversations
    import locvlm.data.instruct
    import locvlm.data.spatial  # noqa: F401

    if side == "peer":
        import pycocotools.coco  # noqa: F401
    else:
        import pyarrow as pa

        pa.array(["x"])  # its first array makes pyarrow import pandas, where that is installed
    start, wall = time.process_time(), time.perf_counter()
    if side == "ours":
        ours(path, folder)
    else:
        Counter("turns" in record for record in peer(path))
    cpu, wall = time.process_time() - start, time.perf_counter() - wall
    return {"cpu": cpu, "wall": wall, "mib": peak_kib() / 1024}


def compare(side: str, path: Path, folder: Path) -> dict[str, Any]:
    """Run one side in this process for its records."""
    return digests(chain(ours(path, folder), as_peer(folder)) if side == "ours" else peer(path))


def peak_kib() -> int:
    """Peak resident memory of this program (ru_maxrss would begin with the parent's)."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=TRAIN2017_IMAGES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--run", choices=("measure", "compare"), help=argparse.SUPPRESS)
    parser.add_argument("--side", choices=("ours", "peer"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        run = {"measure": measure, "compare": compare}[args.run]
        print(json.dumps(run(args.side, args.folder / "instances.json", args.folder)))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "instances.json")
        generate(path, args.images)
        print(f"{args.images:,} images, {path.stat().st_size / 1e6:.0f} MB", flush=True)

        def child(run: str, side: str) -> Any:
            command = [sys.executable, __file__, "--run", run, "--side", side, "--folder", folder]
            return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

        found = [child("compare", side) for side in ("ours", "peer")]
        if found[0] != found[1]:
            sys.exit(f"the records differ, so the figures would mean nothing: {found[0]} and {found[1]}")
        print(", ".join(f"{n:,} {kind}" for kind, (n, _) in found[0].items()) + ", equal on both sides", flush=True)
        runs: dict[str, list[dict[str, Any]]] = {"ours": [], "peer": []}
        for _ in range(args.rounds):
            for side, done in runs.items():
                done.append(child("measure", side))
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
