"""Whether workers can talk to each other: a sum over all of them."""

from locvlm.doctor.check import Check
from locvlm.errors import LocVLMError


def check_workers(n_workers: int) -> Check:
    """An all-reduce on `n_workers` Ray workers: NCCL where each gets a GPU, else gloo. 0: not asked for."""
    name = "workers"
    if not n_workers:
        return Check(name, "not applicable", "not asked for: --workers 2 sums a number over two Ray workers")
    from locvlm.training.all_reduce import all_reduce

    try:
        backend, seconds = all_reduce(n_workers)
    except LocVLMError as fault:
        mend = "look at the network between the workers; for GPUs set NCCL_DEBUG=INFO and ask again"
        return Check(name, "failed", str(fault)[:600], mend)
    return Check(name, "ok", f"{n_workers} workers summed over {backend} in {1000 * seconds:.1f} ms")
