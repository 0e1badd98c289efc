"""Keys and values with room, against transformers' own growing cache."""

import torch
from transformers import DynamicCache

from locvlm.model.cache import with_room


def test_it_holds_what_a_growing_cache_holds_and_copies_nothing() -> None:
    generator = torch.Generator().manual_seed(0)

    def states(batch: int, length: int) -> torch.Tensor:
        return torch.randn(batch, 2, length, 4, generator=generator)

    grown = DynamicCache()
    for layer in range(3):
        grown.update(states(2, 5), states(2, 5), layer)
    rows = torch.tensor([1, 0, 1])
    roomy = with_room(grown, rows, room=4)
    grown.batch_select_indices(rows)
    where = [layer.keys.data_ptr() for layer in roomy.layers]
    for length in (3, 1):
        for layer in range(3):
            keys, values = states(3, length), states(3, length)
            for mine, theirs in zip(roomy.update(keys, values, layer), grown.update(keys, values, layer), strict=True):
                assert torch.equal(mine, theirs)
    assert roomy.get_seq_length() == grown.get_seq_length() == 9
    assert [layer.keys.data_ptr() for layer in roomy.layers] == where
