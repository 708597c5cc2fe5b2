from __future__ import annotations

import pytest
import torch

from lifelong_ens.layers.bits import pack, unpack


@pytest.mark.parametrize("shape", [(1,), (8,), (9,), (3, 20), (2, 0), (0, 5)])
def test_what_is_packed_comes_back(shape: tuple[int, ...]) -> None:
    mask = torch.rand(shape) < 0.5
    bits = pack(mask)
    assert (bits.dtype, bits.shape) == (torch.uint8, (*shape[:-1], -(-shape[-1] // 8)))
    assert torch.equal(unpack(bits, shape[-1]), mask)


def test_the_first_is_the_lowest_bit() -> None:
    mask = torch.tensor([True, False, True] + [False] * 5 + [True])
    assert pack(mask).tolist() == [5, 1]
