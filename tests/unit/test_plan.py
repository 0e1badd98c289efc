"""What a run will take: counted exactly where that is possible."""

import math
import os
import socket
import subprocess
import sys

import pytest
import torch

from locvlm.cli import main
from locvlm.errors import ConfigError
from locvlm.model.stages import parts
from locvlm.model.variants import LocVLM, architecture
from locvlm.model.variants import count_parameters as count_module
from locvlm.plan import count_parameters, flops_per_sample, make_plan, memory_gib
from locvlm.presets import PRESETS, preset

IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


@pytest.mark.parametrize("name", list(PRESETS))
def test_parameter_counts_equal_those_of_the_classes(name: str) -> None:
    config = preset(name)
    with torch.device("meta"):
        model = LocVLM(architecture(config.model, image_token_id=100, special_ids=IDS))
    built = {part: sum(count_module(module) for module in modules) for part, modules in parts(model).items()}
    assert count_parameters(config.model) == built


def test_a_trained_token_of_locvlm_b_costs_what_the_arithmetic_says() -> None:
    per_token = flops_per_sample(preset("locvlm-b").model, True, 256, 260, 1) / 516
    assert per_token == pytest.approx(40.3e9, rel=0.01)  # 6 x 6.61 G dense + attention + tower


def test_a_frozen_language_model_costs_two_thirds() -> None:
    model = preset("locvlm-b").model
    tower = flops_per_sample(model, False, 0, 0, 1)
    frozen, trained = (flops_per_sample(model, trains, 0, 300, 1) - tower for trains in (False, True))
    assert frozen / trained == pytest.approx(2 / 3)


def test_the_papers_steps_come_out() -> None:
    plan = make_plan(preset("locvlm-b"), 8, "a100-80g")
    assert {stage.stage: stage.steps for stage in plan.stages} == {
        "align": math.ceil(595_375 / 128),
        "instruct": math.ceil(10 * 191_798 / 64),
    }
    assert plan.gpu_hours == pytest.approx(sum(stage.gpu_hours for stage in plan.stages))
    assert all(stage.hours == pytest.approx(stage.gpu_hours / 8) for stage in plan.stages)


def test_zero_stages_need_less_memory_one_after_another_and_full_tuning_needs_sharding_on_80_gib() -> None:
    stage = make_plan(preset("locvlm-b"), 8, "a100-80g").stages[1]
    sizes = [stage.memory_gib[zero] for zero in "0123"]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 4
    assert "0" not in stage.fits  # 16 bytes a parameter are 100 GiB
    assert {"2", "3"} <= set(stage.fits)


SETTINGS = [
    "model.language.hidden_size=384",
    "model.language.n_layers=4",
    "model.language.ffn_size=1024",
    "model.language.n_heads=8",
    "model.language.vocab_size=8000",
    "stages.instruct.precision=fp32",
]
MEASURE = """
import os, sys
import numpy as np, torch
from locvlm.data.collate import collate
from locvlm.data.dataset import Branch, Sample
from locvlm.model.checkpoint import TINY_FOUNDATION, fresh, load
from locvlm.model.stages import set_trainable
from locvlm.presets import preset
from locvlm.training.stage import make_engine

torch.set_num_threads(1)
if "RANK" in os.environ:
    import deepspeed  # before the first look at the memory
    torch.distributed.init_process_group("gloo")
n_samples, *settings = sys.argv[1:]
config = preset("tiny", settings)
encoder = load(TINY_FOUNDATION).encoder
before = int(open("/proc/self/statm").read().split()[1]) * 4096
model = fresh(config, encoder, 0)
set_trainable(model, ("adapter", "language"))
engine = make_engine(model, config.stages.instruct, config.cluster, torch.device("cpu"))
del model
n = encoder.n_image_tokens
branch = Branch([5] * (511 - n), [place % 2 == 0 for place in range(511 - n)])
sample = Sample(np.zeros((48, 48, 3), np.uint8), [1] + [encoder.image_id] * n, (branch,))
samples = [sample] * int(n_samples)
batch = collate(samples, encoder.pad_id)
engine.rehearse(batch)
engine.accumulate(batch, 1.0, last=True)
engine.update(1e-4)
# not ru_maxrss: that counts the parent process too
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM:"))
print("measured", (int(peak.split()[1]) * 1024 - before) / 2**30, flush=True)
os._exit(0)
"""
# the allocator gives freed memory back
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}


def start_measuring(n_samples: int, settings: list[str], **environment: str) -> "subprocess.Popen[str]":
    """A process that makes a step and prints what it took, in GiB."""
    return subprocess.Popen(
        [sys.executable, "-c", MEASURE, str(n_samples), *settings],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **ENVIRONMENT, **environment},
    )


def measured(process: "subprocess.Popen[str]") -> float:
    """What it printed."""
    out, fault = process.communicate(timeout=200)
    assert process.returncode == 0, fault[-2000:]
    return float(out.split("measured ")[-1].split()[0])


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [True, False])
def test_the_memory_figure_is_that_of_real_allocations_and_not_below_them(recompute: bool) -> None:
    """14 M parameters, four samples of 512 tokens, on a CPU."""
    settings = [*SETTINGS, f"cluster.recompute={str(recompute).lower()}"]
    found = measured(start_measuring(4, settings))
    config = preset("tiny", settings)
    planned = memory_gib(config.model, config.stages.instruct, 512, 4, 1, 0, recompute=recompute)
    assert 0.95 * found < planned < 1.35 * found


@pytest.mark.slow
@pytest.mark.parametrize("zero", [2, 3])
def test_the_memory_figure_of_zero_is_that_of_two_ranks(zero: int) -> None:
    """14 M parameters, a sample of 512 tokens a rank, bf16: mostly states, some of them DeepSpeed's own."""
    settings = [*SETTINGS[:-1], "stages.instruct.precision=bf16", f"cluster.engine=zero{zero}"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "DS_ACCELERATOR": "cpu"}
    ranks = [start_measuring(1, settings, RANK=str(rank), LOCAL_RANK=str(rank), **group) for rank in range(2)]
    found = max([measured(rank) for rank in ranks])
    config = preset("tiny", settings)
    planned = memory_gib(config.model, config.stages.instruct, 512, 1, 2, zero, recompute=config.cluster.recompute)
    assert 0.8 * found < planned < 1.3 * found


def test_zero_2_in_bf16_keeps_no_fp32_weights_but_its_share() -> None:
    """LocVLM-B's 6.7 G trained parameters on 8 GPUs: 2 bytes each whole, 18 spread, 2 GB of buffers."""
    config = preset("locvlm-b")
    states = memory_gib(config.model, config.stages.instruct, 0, 1, 8, 2, images=0) * 2**30
    parts = count_parameters(config.model)
    trained = parts["adapter"] + parts["language"]
    assert states == pytest.approx(2 * sum(parts.values()) + 18 * trained / 8 + 2e9)


def test_states_of_zero_0_are_16_bytes_a_trained_parameter_beside_the_activations() -> None:
    config = preset("locvlm-b", ["stages.instruct.precision=fp32"])
    none = memory_gib(config.model, config.stages.instruct, 0, 1, 1, 0, images=0)
    parts_ = count_parameters(config.model)
    trained = parts_["adapter"] + parts_["language"]
    assert none * 2**30 == pytest.approx(4 * sum(parts_.values()) + 12 * trained)


def test_video_adds_a_token_a_frame_and_the_towers_work() -> None:
    stages = {s.stage: s for s in make_plan(preset("locvlm-vid-b"), 8, "h200").stages}
    assert stages["video"].tokens_per_sample - 160 == 356
    few = {s.stage: s for s in make_plan(preset("locvlm-vid-b-plus"), 8, "h200").stages}
    assert few["video"].tokens_per_sample - 160 == 264


def test_cost_is_hours_times_price_and_sizes_can_be_given() -> None:
    plan = make_plan(preset("locvlm-b"), 4, "h200", ["instruct=6400"], 0.5, 3.0)
    assert plan.cost == pytest.approx(3.0 * plan.gpu_hours)
    assert plan.stages[1].steps == 1000


def test_all_faults_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        make_plan(preset("locvlm-b"), 7, "gtx", ["video=3", "align=many"], 2.0, -1)
    text = str(error.value)
    for part in ("gtx", "video=3", "align=many", "--mfu 2.0", "--price -1", "global_batch 64 needs one of [1, 2, 4"):
        assert part in text


def test_the_verb_prints_a_table_or_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--preset", "locvlm-l", "--gpus", "8", "--gpu-type", "a100-80g", "--price", "2"]) == 0
    out = capsys.readouterr().out
    assert "instruct" in out
    assert "ZeRO-3" in out
    assert "GPU hours" in out
    assert main(["plan", "--preset", "tiny", "--gpus", "2", "--json"]) == 0
    assert '"gpu_hours"' in capsys.readouterr().out
    assert main(["plan", "--preset", "tiny", "--gpus", "3"]) == 2
