"""What the GPU check counts, and that it says so where there is no GPU."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.gpu_check import Case, Grouped, RandomData, page, row, sample_flops
from locvlm.data.dataset import Branch, Sample
from locvlm.plan import flops_per_sample
from tests.conftest import REPOSITORY

CASE = Case("locvlm-b", "instruct", "zero2", recompute=False, shared=True, micro_batch=16, device="cpu", steps=4)


def sample(prefix: int, *branches: int) -> Sample:
    return Sample(np.zeros((1, 1, 3), np.uint8), [1] * prefix, tuple(Branch([5] * n, [True] * n) for n in branches))


def test_a_lone_conversation_costs_what_the_plan_counts() -> None:
    config = CASE.config()
    whole = flops_per_sample(config.model, True, 256, 260, 1)
    assert sample_flops(config, True, sample(300, 216)) == pytest.approx(whole, rel=1e-12)


def test_branches_pay_for_the_prefix_once_and_not_for_each_other() -> None:
    config = CASE.config()
    language = config.model.language
    apart = sample_flops(config, True, sample(300, 50, 50))
    whole = sample_flops(config, True, sample(300, 100))
    unseen = 50 * 50  # pairs of a query and a key in another conversation
    assert whole - apart == pytest.approx(3 * 4 * unseen * language.hidden_size * language.n_layers)


def test_the_random_samples_have_the_lengths_of_the_real_ones() -> None:
    config = CASE.config()
    shared = RandomData(config, config.stages.instruct).sample(3)
    assert len(shared.prefix) == 256 + 42 + 1
    assert [len(branch.ids) for branch in shared.branches] == [52] * 8
    stage = config.stages.instruct.model_copy(update={"conversations_per_image": 0})
    lengths = [len(RandomData(config, stage).sample(i).branches[0].ids) for i in range(400)]
    assert np.mean(lengths) == pytest.approx(4.2 * 52, rel=0.05)
    data = Grouped(config, stage)
    batches = [[len(data.sample(64 * step + i).branches[0].ids) for i in range(64)] for step in range(16)]
    assert np.mean([np.std(batch) for batch in batches]) < 0.2 * np.std(lengths)
    assert np.mean(batches) == pytest.approx(np.mean(lengths), rel=0.05)


def test_the_table_tells_what_failed_and_how_it_was_made() -> None:
    figures: dict[str, Any] = {"tokens": 12000.4, "questions": 41.26, "tflops": 495.0, "mfu": 0.5004, "gib": 120.04}
    rows = [row(CASE, {**figures, "finite": True}), row(CASE, {"fault": "out of memory", "too_large": True})]
    text = page(rows, "NVIDIA H200", "python benchmarks/gpu_check.py")
    assert "| locvlm-b | instruct | zero2 | no | yes | 16 | 12,000 | 41.3 | 50.0% | 120.0 |" in text
    assert "| out of memory |  |  |  |" in text
    assert "python benchmarks/gpu_check.py" in text
    assert "loss not finite" in row(CASE, {**figures, "finite": False})[6]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_nothing_is_measured_and_nothing_fails(tmp_path: Path) -> None:
    page_path = tmp_path / "gpu.md"
    command = [sys.executable, "benchmarks/gpu_check.py", "--output", str(page_path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "skipped, there is no GPU here" in done.stdout
    assert not page_path.exists()
