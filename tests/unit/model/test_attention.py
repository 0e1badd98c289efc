"""Attention as two products: the same answers as PyTorch's, and used in training on a CPU in bf16 alone."""

import pytest
import torch

from locvlm.data.collate import collate
from locvlm.data.dataset import Branch, Sample
from locvlm.model import attention
from locvlm.model.checkpoint import load
from tests.tiny import build_world


def test_products_are_attention() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, 7, 8, generator=generator) for _ in range(3))
    sees = torch.ones(2, 1, 7, 7, dtype=torch.bool).tril()
    sees[1, 0, 5:, 2:4] = False
    bias = attention.additive(sees, 3).float()
    ours, _ = attention.products(torch.nn.Identity(), query, key, value, bias[None], 8**-0.5)
    theirs = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=sees)
    assert torch.allclose(ours, theirs.transpose(1, 2), atol=1e-6)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    return load(build_world(tmp_path_factory.mktemp("world")).foundation)


def test_the_loss_of_packed_conversations_is_that_of_the_other_attention(
    loaded,
    monkeypatch: pytest.MonkeyPatch,  # type: ignore[no-untyped-def]
) -> None:
    model, encoder = loaded.model, loaded.encoder
    side = loaded.config.model.vision.image_side
    pixels = torch.arange(side * side * 3, dtype=torch.uint8).reshape(side, side, 3).numpy()
    prefix = [*[encoder.image_id] * encoder.n_image_tokens, 40]
    branches = tuple(Branch([50 + n, 60 + n, 70 + n], [False, True, True]) for n in range(3))
    batch = collate([Sample(pixels, prefix, branches), Sample(pixels, prefix, branches[:2])], encoder.pad_id)
    used = []
    monkeypatch.setattr(attention, "additive", _watched(attention.additive, used))
    losses = []
    for is_faster in (attention.is_faster, lambda device: False):
        monkeypatch.setattr(attention, "is_faster", is_faster)
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(model.sum_loss(**batch.inputs(torch.device("cpu"))))
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=2e-3)
    assert len(used) == 1  # the second was computed the other way
    model.sum_loss(**batch.inputs(torch.device("cpu")))  # fp32
    assert len(used) == 1
    assert model.model.language_model.config._attn_implementation != attention.PRODUCTS


def _watched(function, calls):  # type: ignore[no-untyped-def]
    def call(*arguments):  # type: ignore[no-untyped-def]
        calls.append(arguments)
        return function(*arguments)

    return call
