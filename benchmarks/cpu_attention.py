"""A training step of the tiny preset on one core: attention as two products (`locvlm/model/attention.py`) against
PyTorch's fused kernel, which transformers uses by default.

    python benchmarks/cpu_attention.py [--rounds 5]

The shipped foundation, one batch of 32 drawn scenes with 8 questions each, bf16, forward and backward. The losses are
compared first (bf16 rounds differently: within 0.1 %). The sides run alternately; printed are the medians of CPU time.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch

CLOSE = 1e-3


def make_batch(folder: Path) -> tuple[Any, Any]:
    """The foundation, and a batch of its stage 2."""
    from locvlm.coordinates import make_location_format
    from locvlm.data.coco import read_instances
    from locvlm.data.collate import collate
    from locvlm.data.conversations import open_conversations, write_conversations
    from locvlm.data.dataset import TrainingData
    from locvlm.data.generic import build_generic
    from locvlm.data.instruct import Renderer
    from locvlm.data.scenes import draw_scenes
    from locvlm.geometry import make_geometry
    from locvlm.model.checkpoint import start
    from locvlm.model.stages import set_trainable
    from locvlm.pixels import open_images
    from locvlm.presets import preset

    config = preset("tiny", ["stages.instruct.mixture=[]"])
    draw_scenes(folder / "scenes", seed=1, n_train=40, n_test=1)
    (folder / "generic").mkdir()
    instances = read_instances(folder / "scenes" / "instances_train.json")
    write_conversations(folder / "generic", build_generic(instances, None, 0, config.coordinates.n_bins))
    loaded = start(config, None)
    stage, geometry = config.stages.instruct, make_geometry(config.geometry)
    assert stage is not None
    set_trainable(loaded.model, stage.trainable, None, 0)
    data = TrainingData(
        stage,
        {"generic": open_conversations(folder / "generic")},
        open_images(folder / "scenes" / "images"),
        Renderer(make_location_format(config.coordinates, geometry), config.prompts, 0),
        loaded.encoder,
        geometry,
        config.model.language.max_length,
        0,
    )
    return loaded.model, collate([data.sample(i) for i in range(32)], loaded.encoder.pad_id)


def step(model: Any, inputs: dict[str, Any]) -> tuple[float, float]:
    """(loss, seconds of CPU) of one forward and backward."""
    began = time.process_time()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.sum_loss(**inputs)
    loss.backward()
    model.zero_grad()
    return loss.item(), time.process_time() - began


def main() -> int:
    """Compare the losses, then print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        model, batch = make_batch(Path(folder))
    inputs = batch.inputs(torch.device("cpu"))
    # users have no switch for it, so the other side is had by answering no
    fused = mock.patch("locvlm.model.attention.is_faster", return_value=False)
    seconds: dict[str, list[float]] = {"products": [], "fused": []}
    for number in range(rounds + 1):
        ours, took = step(model, inputs)
        with fused:
            theirs, took_fused = step(model, inputs)
        if number:  # the first of each warms up
            seconds["products"].append(took)
            seconds["fused"].append(took_fused)
    if abs(ours - theirs) > CLOSE * abs(theirs):
        print(f"the losses differ: {ours} and {theirs}", file=sys.stderr)
        return 1
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"tokens {batch.n_tokens}, loss {ours:.2f} (products), {theirs:.2f} (fused)")
    for name, value in medians.items():
        print(f"{name:<9} {1000 * value:6.0f} ms of CPU a step")
    print(f"products are {medians['fused'] / medians['products']:.2f} times faster")
    return 0


if __name__ == "__main__":
    sys.exit(main())
