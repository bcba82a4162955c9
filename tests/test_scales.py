"""Scales that no consumer can use are found on the device, all linears at once."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from dsv4q.run.linears import unusable_scales


@given(st.lists(st.lists(st.integers(0, 255), min_size=3, max_size=3), min_size=1, max_size=4))
def test_an_e4m3_scale_is_usable_if_it_is_above_zero_and_a_number(codes: list[list[int]]) -> None:
    scale = torch.tensor(codes, dtype=torch.uint8).view(torch.float8_e4m3fn)
    value = scale.to(torch.float32)
    wanted = ~((value > 0) & torch.isfinite(value)).all(dim=1)
    assert torch.equal(unusable_scales({"weight_packed": torch.zeros(len(codes)), "weight_scale": scale}), wanted)


def test_each_stored_scale_of_a_linear_counts() -> None:
    good = {"weight_scale": torch.ones(3, 2, dtype=torch.bfloat16), "input_global_scale": torch.ones(3, 1)}
    assert not unusable_scales(good).any()
    for name in good:
        for bad in (0.0, -1.0, float("nan"), float("inf")):
            stored = {key: value.clone() for key, value in good.items()}
            stored[name][1, -1] = bad
            assert unusable_scales(stored).tolist() == [False, True, False]
