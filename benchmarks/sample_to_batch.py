"""From a stored conversation to a padded batch: ours against LLaVA's `LazySupervisedDataset` and its collator.

    python benchmarks/sample_to_batch.py --make-peer DIR [--images 128] [--rounds 3]
    python benchmarks/sample_to_batch.py --peer-python DIR/bin/python

The peer is LLaVA as it is on the package index (`llava-torch`), which needs old packages and so an environment of its
own: `--make-peer` makes it in a new folder, `--peer-python` names the Python of one that exists. Both sides read the
same generated JPEGs (640x480), the same Localize-Instruct conversations (about four questions each, LLaVA-1.5's
template) and the same LLaMA-like tokenizer (sentencepiece BPE; each side loads it as it would a real one), and make
the same batches of 16: images padded to a square and resized to 336 as LLaVA-1.5 does. Ours begins at the stored
objects and renders the text; the peer's JSON holds it rendered.

The results are compared first: equal token ids, equal labels, pixels within 1e-4; without that there is no figure. The
sides run alternately, each in its own process with one thread. Printed are the medians of CPU time and their ratios:
with images, without (text alone), and with the two conversations of an image behind one image prefix, which LLaVA
cannot do and so reads every image twice. Our batches hold bytes, which the device normalises; that is counted too,
where not said otherwise. Imports and the opening of the data are not counted.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

SEED = 0
WIDTH, HEIGHT, SIDE, PATCH = 640, 480, 336, 14
BATCH = 16
IMAGE_TOKEN = -200  # as LLaVA marks the place of an image
IGNORE = -100
CLOSE = 1e-4  # of pixels that are normalised
_NAMES = """
person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, bench, bird, cat, dog, horse, sheep, cow,
bear, zebra, giraffe, backpack, umbrella, handbag, tie, suitcase, frisbee, kite, skateboard, surfboard,
bottle, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot, pizza, donut, cake,
chair, couch, bed, toilet, laptop, mouse, remote, keyboard, microwave, oven, toaster, sink, refrigerator,
book, clock, vase, scissors, elephant, traffic light, fire hydrant, stop sign, tennis racket, wine glass,
potted plant, dining table, toothbrush
"""
THINGS = [name.strip() for name in _NAMES.split(",")]

# what llava-torch 1.2.2.post1 pins, as far as its data code needs it
PEER_PACKAGES = (
    "torch==2.13.0", "transformers==4.37.2", "tokenizers==0.15.1", "numpy<2", "pillow", "sentencepiece", "protobuf",
    "accelerate==0.27.2",
)  # fmt: skip
PEER = "llava-torch==1.2.2.post1"


def make_peer(folder: Path) -> Path:
    """A virtual environment with LLaVA; returns its Python."""
    python = folder / "bin" / "python"
    if not python.exists():
        print(f"making the peer's environment in {folder}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, *PEER_PACKAGES], check=True)
        subprocess.run([*pip, "--no-deps", PEER], check=True)
    return python


def generate(folder: Path, n_images: int) -> None:
    """Photographs, annotations, Localize-Instruct with its rendered twin for the peer, and a tokenizer."""
    from locvlm.data.conversations import llava_record, open_conversations

    make_data(folder, n_images, "conversation")
    renderer = _renderer()
    stored = open_conversations(folder / "conversation")
    rendered = {item.id: llava_record(item, renderer.turns(item)) for item in stored}
    data = open_ours(folder)
    order = [data.describe(index).rpartition(": ")[2] for index in range(len(data))]
    (folder / "conversations.json").write_text(json.dumps([rendered[key] for key in order]))


def make_data(folder: Path, n_images: int, *groupings: str) -> None:
    """`images/`, `instances.json`, Localize-Instruct in a folder a grouping, and a `tokenizer/` made for its text."""
    from locvlm.config import InstructConfig
    from locvlm.data.coco import read_instances
    from locvlm.data.conversations import open_conversations, write_conversations
    from locvlm.data.instruct import build_localize_instruct

    rng = np.random.default_rng(SEED)
    (folder / "images").mkdir(parents=True)
    for number in range(n_images):
        _photograph(rng, folder / "images" / _name(number))
    (folder / "instances.json").write_text(json.dumps(_annotations(rng, n_images)))
    instances = read_instances(folder / "instances.json")
    for grouping in groupings:
        (folder / grouping).mkdir()
        built = build_localize_instruct(instances, InstructConfig(grouping=grouping), SEED)
        write_conversations(folder / grouping, built)
    renderer = _renderer()
    pairs = [pair for item in open_conversations(folder / groupings[0]) for pair in renderer.turns(item)]
    train_tokenizer(folder / "tokenizer", [text for pair in pairs for text in pair])


def _name(number: int) -> str:
    return f"{number:012d}.jpg"


def _photograph(rng: np.random.Generator, path: Path) -> None:
    """Soft colours, edges and grain: about as many bytes as a photograph of COCO."""
    from PIL import Image

    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8)).resize(
        (WIDTH, HEIGHT), Image.Resampling.BICUBIC
    )
    pixels = np.asarray(coarse).astype(np.int16)
    for _ in range(12):
        x, y, w, h = (
            int(v * side) for v, side in zip(rng.random(4), (WIDTH, HEIGHT, WIDTH / 3, HEIGHT / 3), strict=True)
        )
        pixels[y : y + h, x : x + w] += rng.integers(-90, 91, 3, np.int16)
    pixels += rng.normal(0, 12, (HEIGHT, WIDTH, 1)).astype(np.int16)
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90)


def _annotations(rng: np.random.Generator, n_images: int) -> dict[str, Any]:
    """COCO's form; 4.2 objects an image (PRefCOCO: 402,686 over 95,899 images), each the only one of its category."""
    images, annotations = [], []
    for number in range(n_images):
        images.append({"id": number + 1, "file_name": _name(number), "width": WIDTH, "height": HEIGHT})
        for category in rng.choice(len(THINGS), 1 + rng.binomial(8, 0.4), replace=False).tolist():
            w, h = (round(float(v), 2) for v in rng.uniform(20, 300, 2))
            box = [round(float(rng.uniform(0, WIDTH - w)), 2), round(float(rng.uniform(0, HEIGHT - h)), 2), w, h]
            key = len(annotations) + 1
            annotations.append(
                {
                    "id": key,
                    "image_id": number + 1,
                    "category_id": category + 1,
                    "bbox": box,
                    "area": w * h,
                    "iscrowd": 0,
                }
            )
    categories = [{"id": number, "name": name} for number, name in enumerate(THINGS, 1)]
    return {"images": images, "annotations": annotations, "categories": categories}


def train_tokenizer(folder: Path, texts: list[str]) -> None:
    """LLaMA's kind of tokenizer with LLaMA's settings (BPE, single digits, bytes for the rest), made for `texts`."""
    import sentencepiece

    from locvlm.config import SYSTEM

    folder.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*texts, *[f"{SYSTEM} USER: ASSISTANT:"] * 100]),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=1200,
        hard_vocab_limit=False,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": True,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "add_bos_token": True,
        "model_max_length": 2048,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))


def _renderer(kind: str = "letterbox", side: int = SIDE) -> Any:
    from locvlm.config import CoordinateConfig, PromptConfig
    from locvlm.coordinates import make_location_format
    from locvlm.data.instruct import Renderer
    from locvlm.geometry import ImageGeometry

    location = make_location_format(CoordinateConfig(n_bins=side), ImageGeometry(kind, side))
    return Renderer(location, PromptConfig(), SEED)


def open_ours(
    folder: Path, grouping: str = "conversation", kind: str = "letterbox", side: int = SIDE, **stage: Any
) -> Any:
    """Our training data as `locvlm train` opens it; `stage` are settings of its StageConfig."""
    from locvlm.config import StageConfig
    from locvlm.data.conversations import open_conversations
    from locvlm.data.dataset import TrainingData
    from locvlm.geometry import ImageGeometry
    from locvlm.model.sources import read_tokenizer
    from locvlm.model.tokenizer import TextEncoder
    from locvlm.pixels import open_images
    from locvlm.prompts import IMAGE

    tokenizer = read_tokenizer(folder / "tokenizer")
    tokenizer.pad_token = tokenizer.unk_token
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    return TrainingData(
        StageConfig(trainable=("adapter", "language"), epochs=1, **{"global_batch": BATCH, **stage}),
        {"localize": open_conversations(folder / grouping)},
        open_images(folder / "images"),
        _renderer(kind, side),
        TextEncoder(tokenizer, (side // PATCH) ** 2),
        ImageGeometry(kind, side),
        max_length=2048,
        seed=SEED,
    )


def our_batches(folder: Path, *, images: bool, shared: bool = False) -> Iterator[Any]:
    """Batches in the order of the first epoch; the data is opened before the first `next` returns."""
    from locvlm.data.collate import collate
    from locvlm.data.frames import Seen

    data = open_ours(folder, conversations_per_image=2 if shared else 0)
    if not images:
        nothing = Seen(data.encoder.n_image_tokens, np.zeros((1, 1, 3), np.uint8))
        data._see = lambda entry, conversation: nothing
    yield None
    size = BATCH // 2 if shared else BATCH
    for start in range(0, len(data), size):
        yield collate([data.sample(i) for i in range(start, min(start + size, len(data)))], data.encoder.pad_id)


def peer_batches(folder: Path, *, images: bool) -> Iterator[Any]:
    """LLaVA's own, in the order of the list."""
    import copy
    from types import SimpleNamespace

    from llava import conversation
    from llava.train import train as llava
    from transformers import AutoTokenizer, CLIPImageProcessor

    tokenizer = AutoTokenizer.from_pretrained(
        folder / "tokenizer", model_max_length=2048, padding_side="right", use_fast=False
    )
    tokenizer.pad_token = tokenizer.unk_token
    conversation.default_conversation = conversation.conv_templates["vicuna_v1"]
    settings = SimpleNamespace(
        image_folder=str(folder / "images"),
        image_processor=CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}),
        image_aspect_ratio="pad",
        is_multimodal=True,
        mm_use_im_start_end=False,
    )

    class TextOnly(llava.LazySupervisedDataset):
        """`__getitem__` without what it does for the image."""

        def __getitem__(self, i: int) -> dict[str, Any]:
            sources = copy.deepcopy([self.list_data_dict[i]["conversations"]])
            sources = llava.preprocess_multimodal(sources, self.data_args)
            found = llava.preprocess(sources, self.tokenizer, has_image=True)
            return {"input_ids": found["input_ids"][0], "labels": found["labels"][0]}

    kind = llava.LazySupervisedDataset if images else TextOnly
    data = kind(str(folder / "conversations.json"), tokenizer, settings)
    collator = llava.DataCollatorForSupervisedDataset(tokenizer)
    yield None
    for start in range(0, len(data), BATCH):
        yield collator([data[i] for i in range(start, min(start + BATCH, len(data)))])


def measure(side: str, folder: Path) -> dict[str, float]:
    """CPU seconds a conversation: with images, without, and (ours) with both conversations of an image in a sample, and
    without the normalising of the pixels."""
    import torch

    cpu = torch.device("cpu")
    torch.set_num_threads(1)
    runs: dict[str, Iterator[Any]] = {
        "image": (our_batches if side == "ours" else peer_batches)(folder, images=True),
        "text": (our_batches if side == "ours" else peer_batches)(folder, images=False),
    }
    if side == "ours":
        runs["shared"] = our_batches(folder, images=True, shared=True)
        runs["uint8"] = our_batches(folder, images=True)
    found = {}
    for name, batches in runs.items():
        next(batches)
        next(batches)  # the first batch pays for what is loaded lazily
        n, start = 0, time.process_time()
        for batch in batches:
            if name in ("image", "shared") and side == "ours":
                batch.inputs(cpu)  # normalises, as the peer's collation ends with
            n += batch.n_conversations if side == "ours" else len(batch["input_ids"])
        found[name] = (time.process_time() - start) / n
    return found


def compare(side: str, folder: Path) -> dict[str, Any]:
    """Token ids and labels of every sample, as LLaVA has them; pixels of the first batch go to a file."""
    import torch

    batches = (our_batches if side == "ours" else peer_batches)(folder, images=True)
    next(batches)
    rows: list[tuple[list[int], list[int]]] = []
    for number, batch in enumerate(batches):
        rows += _our_rows(batch) if side == "ours" else _peer_rows(batch)
        if number == 0:
            np.save(
                folder / f"{side}.npy",
                (batch.inputs(torch.device("cpu"))["pixel_values"] if side == "ours" else batch["images"]).numpy(),
            )
    return {"ids": [ids for ids, _ in rows], "labels": [labels for _, labels in rows]}


def _peer_rows(batch: dict[str, Any]) -> list[tuple[list[int], list[int]]]:
    return [
        (ids[mask].tolist(), labels[mask].tolist())
        for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True)
    ]


def _our_rows(batch: Any) -> list[tuple[list[int], list[int]]]:
    ids = batch.input_ids
    labels = np.full(ids.numel() + 1, IGNORE)
    labels[batch.sources.numpy() + 1] = batch.targets.numpy()  # the state at a source predicts the token after it
    labels = labels[:-1].reshape(ids.shape)
    n_visual = (SIDE // PATCH) ** 2
    rows = []
    for row, found in zip(ids.tolist(), labels.tolist(), strict=True):
        image_id = next(a for a, b in pairwise(row) if a == b)
        at = row.index(image_id)
        end = len(row)
        while row[end - 1] == 0:  # unk: padding
            end -= 1
        rest = slice(at + n_visual, end)
        rows.append(([*row[:at], IMAGE_TOKEN, *row[rest]], [*found[: at + 1], *found[rest]]))
    return rows


def refuse_differences(ours: dict[str, Any], peer: dict[str, Any], folder: Path) -> str:
    """What is equal, in words; ends the program when something is not."""
    for key in ("ids", "labels"):
        for number, (a, b) in enumerate(zip(ours[key], peer[key], strict=True)):
            if a != b:
                at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
                sys.exit(
                    f"the {key} of sample {number} differ from place {at} on: {a[at : at + 12]} and {b[at : at + 12]}"
                )
    gap = float(np.abs(np.load(folder / "ours.npy") - np.load(folder / "peer.npy")).max())
    if not gap <= CLOSE:
        sys.exit(f"the pixels differ by up to {gap:g}")
    n_tokens = statistics.mean(map(len, ours["ids"]))
    n_targets = statistics.mean(sum(label != IGNORE for label in row) for row in ours["labels"])
    return (
        f"{len(ours['ids'])} samples of {n_tokens:.0f} text tokens ({n_targets:.0f} supervised): equal ids and labels, "
        f"pixels within {gap:.0e}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--make-peer", type=Path, metavar="DIR", help="where to make the peer's environment, once")
    parser.add_argument("--peer-python", type=Path, metavar="FILE", help="the Python of an environment that has LLaVA")
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--run", choices=("measure", "compare"), help=argparse.SUPPRESS)
    parser.add_argument("--side", choices=("ours", "peer"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        print(json.dumps({"measure": measure, "compare": compare}[args.run](args.side, args.folder)))
        return
    if args.make_peer is None and args.peer_python is None:
        print("sample_to_batch: skipped, LLaVA needs its own environment; give --make-peer DIR or --peer-python FILE")
        return
    peer_python = args.peer_python or make_peer(args.make_peer.absolute())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        generate(folder, args.images)
        pythons = {"ours": sys.executable, "peer": str(peer_python)}

        def child(run: str, side: str) -> Any:
            command = [pythons[side], __file__, "--run", run, "--side", side, "--folder", name]
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            if done.returncode:
                sys.exit(f"{side}: {run} failed\n{done.stderr[-2000:]}")
            return json.loads(done.stdout.splitlines()[-1])

        print(refuse_differences(child("compare", "ours"), child("compare", "peer"), folder), flush=True)
        runs: dict[str, list[dict[str, float]]] = {"ours": [], "peer": []}
        for _ in range(args.rounds):
            for side, done in runs.items():
                done.append(child("measure", side))
    medians = {
        side: {key: statistics.median(run[key] for run in done) for key in done[0]} for side, done in runs.items()
    }
    for key, base, words in (
        ("image", "image", "with images"),
        ("uint8", "image", "with images, ours normalised by the GPU (not counted)"),
        ("text", "text", "text alone"),
        ("shared", "image", "with images, ours both conversations of an image in one sample"),
    ):
        ours, peer = medians["ours"][key], medians["peer"][base]
        print(f"{words}: locvlm {1 / ours:.0f}, LLaVA {1 / peer:.0f} conversations/s of CPU; {peer / ours:.1f}x")


if __name__ == "__main__":
    main()
