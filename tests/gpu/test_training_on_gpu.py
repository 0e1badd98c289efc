"""What only a GPU can show: flex attention's backward pass, bf16, page-locked batches, ZeRO on a device, the table."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from locvlm.config import StageConfig
from locvlm.data.collate import Batch, collate
from locvlm.data.dataset import Branch, Sample
from locvlm.model.checkpoint import start
from locvlm.model.stages import set_trainable
from locvlm.presets import preset
from locvlm.training.stage import make_engine
from tests.conftest import REPOSITORY

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here"),
]


def samples(n: int, branches: int) -> list[Sample]:
    """Of the tiny preset's form, with random content."""
    config, rng = preset("tiny"), torch.Generator().manual_seed(0)
    loaded = start(config, None)

    def ids(count: int) -> list[int]:
        return torch.randint(300, 400, (count,), generator=rng).tolist()

    prefix = [1, *[loaded.encoder.image_id] * config.model.vision.n_tokens, 5]
    side = config.model.vision.image_side
    return [
        Sample(
            torch.randint(0, 256, (side, side, 3), generator=rng, dtype=torch.uint8).numpy(),
            prefix,
            tuple(Branch(ids(9 + number), [False] * 4 + [True] * (5 + number)) for number in range(branches)),
        )
        for _ in range(n)
    ]


def gradients(kind: str, batches: list[Batch], *, packed: bool) -> tuple[float, torch.Tensor]:
    """Loss sum and the gradient of the adapter after `batches`, in fp32."""
    config = preset("tiny", [f"stages.instruct.conversations_per_image={8 if packed else 0}"])
    stage = config.stages.instruct.model_copy(update={"precision": "fp32"})
    loaded = start(config, None)
    set_trainable(loaded.model, stage.trainable)
    engine = make_engine(loaded.model, stage, config.cluster, torch.device(kind))
    losses = [float(engine.accumulate(batch, 1.0, last=batch is batches[-1])) for batch in batches]
    weight = next(loaded.model.adapter.parameters())
    assert weight.grad is not None
    return sum(losses), weight.grad.cpu()


def test_flex_attention_trains_packed_conversations_as_if_each_were_alone() -> None:
    together = samples(3, 4)
    alone = [dataclasses.replace(sample, branches=(branch,)) for sample in together for branch in sample.branches]
    packed = gradients("cuda", [collate(together, 3)], packed=True)
    single = gradients("cpu", [collate(alone, 3)], packed=False)
    assert packed[0] == pytest.approx(single[0], rel=1e-4)
    torch.testing.assert_close(packed[1], single[1], rtol=1e-2, atol=1e-3)


def test_a_page_locked_batch_is_the_same_batch() -> None:
    batch = collate(samples(2, 3), 3)
    pinned = batch.pinned()
    assert pinned.input_ids.is_pinned()
    assert pinned.n_targets == batch.n_targets
    found, wanted = pinned.inputs(torch.device("cuda")), batch.inputs(torch.device("cpu"))
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name].cpu(), value)


def test_bf16_on_the_gpu_is_close_to_fp32_on_the_cpu() -> None:
    config = preset("tiny")
    stage: StageConfig = config.stages.instruct.model_copy(update={"conversations_per_image": 0})
    batch = collate(samples(4, 1), 3)
    loaded = start(config, None)
    set_trainable(loaded.model, stage.trainable)
    engine = make_engine(loaded.model, stage, config.cluster, torch.device("cuda"))
    loss = float(engine.accumulate(batch, 1.0, last=True))
    wanted, _ = gradients("cpu", [batch], packed=False)
    assert loss == pytest.approx(wanted, rel=2e-2)


@pytest.mark.slow
def test_the_check_makes_a_table_of_every_engine(tmp_path: Path) -> None:
    page = tmp_path / "gpu.md"
    command = [sys.executable, "benchmarks/gpu_check.py", "--preset", "tiny", "--steps", "3", "--output", str(page)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [line for line in page.read_text().splitlines() if line.startswith("| tiny")]
    assert len(rows) == 3 * (1 + 4) + 2, json.dumps(rows, indent=1)
    for row in rows:
        tokens = row.split("|")[7].strip()
        assert tokens.replace(",", "").isdigit(), row
