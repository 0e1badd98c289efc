"""In what numbers a stage computes on which processor."""

import logging

import pytest
import torch

from locvlm.training.precision import autocast, computed_in, has_bf16, say

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("avx512_bf16", "amx", "expected"), [(True, False, True), (False, True, True), (False, False, False)]
)
def test_bf16_only_where_the_processor_has_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, avx512_bf16: bool, amx: bool, expected: bool
) -> None:
    """What computes is asked of PyTorch itself: the type that a product comes out in."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert has_bf16(CPU) is expected
    assert computed_in(CPU, "bf16") == ("bf16" if expected else "fp32")
    assert computed_in(CPU, "fp32") == "fp32"
    with autocast(CPU, "bf16"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == (torch.bfloat16 if expected else torch.float32)
    with autocast(CPU, "fp32"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
    with caplog.at_level(logging.WARNING):
        say(CPU, "fp32")
        assert not caplog.text
        say(CPU, "bf16")
    assert ("computing in fp32" in caplog.text) is not expected


def test_a_gpu_is_taken_at_its_word() -> None:
    assert has_bf16(torch.device("cuda"))
