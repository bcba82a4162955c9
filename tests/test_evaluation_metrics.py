"""Estimates and intervals: paired differences, shares without a case, one sample."""

from __future__ import annotations

import math

import pytest
import torch

from dsv4q.evaluation.drafts import Acceptance, difference, step_1, step_2
from dsv4q.evaluation.metrics import BootstrapEstimate, estimate, exp_mean, mean
from dsv4q.evaluation.scores import ResidualError, greedy_ids


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_a_mean_weighs_samples_by_their_tokens() -> None:
    assert mean(column(1, 9), column(1, 3)).value == 2.5


def test_perplexity_is_exp_of_the_mean() -> None:
    found = exp_mean(column(2, 4), column(2, 2))
    assert found.value == pytest.approx(math.exp(1.5))
    assert (found.low, found.high) == (pytest.approx(math.e), pytest.approx(math.exp(2)))


def test_equal_samples_leave_no_doubt() -> None:
    assert mean(torch.ones(20, dtype=torch.float64), torch.ones(20, dtype=torch.float64)) == BootstrapEstimate(
        1.0, 1.0, 1.0
    )


def test_one_sample_has_no_interval() -> None:
    assert mean(column(3), column(2)) == BootstrapEstimate(1.5)


def test_nothing_to_count_is_none() -> None:
    assert mean(column(0, 0), column(0, 0)) == BootstrapEstimate(None)


def test_draws_without_a_case_are_left_out_of_the_interval() -> None:
    found = mean(column(1, 0), column(2, 0))
    assert (found.value, found.low, found.high) == (0.5, 0.5, 0.5)


def test_the_interval_is_as_wide_as_the_normal_one_where_that_holds() -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found = mean(values, torch.ones(400, dtype=torch.float64))
    half = 1.96 * float(values.std()) / 20
    assert found.low == pytest.approx(float(values.mean()) - half, abs=0.1 * half)
    assert found.high == pytest.approx(float(values.mean()) + half, abs=0.1 * half)


def test_the_same_numbers_give_the_same_interval_every_time() -> None:
    columns = torch.rand(30, 2, dtype=torch.float64)
    assert estimate(columns, step_1) == estimate(columns, step_1)


def acceptance(hits: torch.Tensor) -> Acceptance:
    zeros = torch.zeros_like(hits)
    return Acceptance("a", "b", [torch.stack([zeros + 100, hits, zeros, zeros, zeros + 99, zeros], dim=1)])


def test_a_paired_difference_is_sharper_than_either_share() -> None:
    hits = torch.randint(20, 90, (50,), generator=torch.Generator().manual_seed(4)).double()
    one, other = acceptance(hits), acceptance(hits - 5)
    found = difference(other, one, step_1)
    assert found["low"] == pytest.approx(-0.05) and found["high"] == pytest.approx(-0.05)
    spread = one.as_dict()["step_1"]
    assert spread["high"] - spread["low"] > 0.05


def test_a_second_step_that_never_came_is_none() -> None:
    found = acceptance(column(1, 2, 3))
    assert found.as_dict()["step_2"]["value"] is None
    assert difference(found, found, step_2)["value"] is None


def test_proposals_are_held_against_the_choice_at_the_position_before_them() -> None:
    text, greedy = torch.tensor([[5, 6, 7, 8, 9]]), torch.tensor([[6, 7, 8, 9, 0]])
    found = Acceptance("a", "b")
    # first[t] is the token after t + 1, second[t] the one after that
    found.add(torch.tensor([[7, 8, 1, 0]]), torch.tensor([[8, 1, 0, 1]]), greedy, text)
    assert found.counts[0].tolist() == [[4, 3, 2, 1, 3, 2]]


def test_the_error_of_streams_is_measured_as_a_whole_and_by_token() -> None:
    true = torch.tensor([[[[3.0, 0.0]], [[0.0, 100.0]]]])
    error = ResidualError("layers.0")
    error.add(true, true + torch.tensor([[[[0.0, 3.0]], [[0.0, 0.0]]]]))
    found = error.as_dict()
    assert found["token_relative_error"] == pytest.approx(0.5)
    assert found["relative_error"] == pytest.approx(3 / math.hypot(3, 100))


def test_greedy_tokens_do_not_depend_on_the_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    head = torch.nn.Linear(8, 40, bias=False)
    hidden = torch.randn(3, 7, 8)
    monkeypatch.setattr("dsv4q.evaluation.scores.CHUNK", 80)
    assert torch.equal(greedy_ids(head, hidden, 40), head(hidden).argmax(dim=-1))
