"""In what numbers a stage computes."""

import logging

import torch

log = logging.getLogger(__name__)


def has_bf16(device: torch.device) -> bool:
    """Whether `device` multiplies bf16 itself: all devices but a processor without AVX512-BF16 and AMX. PyTorch
    imitates it there, and a step of the tiny preset takes nine times as long as in fp32."""
    if device.type != "cpu":
        return True
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def computed_in(device: torch.device, precision: str) -> str:
    """bf16 where `precision` says so and the device has it, else fp32, which differs from it by rounding alone."""
    return "bf16" if precision == "bf16" and has_bf16(device) else "fp32"


def autocast(device: torch.device, precision: str = "bf16") -> torch.autocast:
    """The context to compute in with weights in fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=computed_in(device, precision) == "bf16")


def say(device: torch.device, precision: str) -> None:
    """Tell it where a stage computes otherwise than its configuration says."""
    if computed_in(device, precision) != precision:
        log.warning("precision: this processor has no bf16 instructions; computing in fp32")
