"""Numbers per sample, and what can be said about text like this: estimates with 95 % intervals.

Everything measured here is a function of sums over samples: a mean, a share, exp of a mean. The interval is the
percentile bootstrap: the samples are drawn again with replacement, `RESAMPLES` times, and the function of each draw's
sums is taken; the interval holds the middle 95 % of them. Whole samples are drawn, for tokens of one text depend on
each other. A difference of two models is computed within each draw, so it is paired: what makes a text hard for both
does not widen it. Source: Efron, Tibshirani, An Introduction to the Bootstrap, chapter 13.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

RESAMPLES = 2000
SEED = 0
METHOD = f"95 %, percentile bootstrap over samples, {RESAMPLES:,} draws, seed {SEED}; differences are paired"
_CHUNK = 1 << 24
"""Elements drawn at once."""


@dataclass(frozen=True)
class BootstrapEstimate:
    """A value and its interval; `low` and `high` are None where one sample cannot give one."""

    value: float | None
    """None: nothing to count."""
    low: float | None = None
    high: float | None = None

    def as_dict(self) -> dict[str, Any]:
        return {"value": self.value, "low": self.low, "high": self.high}


@torch.no_grad()
def estimate(columns: Tensor, function: Callable[[Tensor], Tensor]) -> BootstrapEstimate:
    """Value and interval of a function of sums over samples.

    Args:
        columns: F64 [samples, k], what each sample adds to k sums.
        function: sums F64 [..., k] -> values [...]; NaN where there is nothing to count.
    """
    samples = columns.shape[0]
    value = float(function(columns.sum(dim=0)))
    if value != value:
        return BootstrapEstimate(None)
    if samples < 2:
        return BootstrapEstimate(value)
    generator = torch.Generator().manual_seed(SEED)
    step = max(1, _CHUNK // columns.numel())
    found = []
    for start in range(0, RESAMPLES, step):
        drawn = torch.randint(samples, (min(step, RESAMPLES - start), samples), generator=generator)
        found.append(function(columns[drawn].sum(dim=1)))
    values = torch.cat(found)
    low, high = torch.nanquantile(values, torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()
    return BootstrapEstimate(value, low, high)


def mean(totals: Tensor, counts: Tensor) -> BootstrapEstimate:
    """Mean per token (or share): sums and counts, each [samples]."""
    return estimate(torch.stack([totals, counts], dim=1).to(torch.float64), lambda s: s[..., 0] / s[..., 1])


def exp_mean(totals: Tensor, counts: Tensor) -> BootstrapEstimate:
    """exp of the mean per token: a perplexity from negative log-likelihoods, or a ratio of two from differences."""
    return estimate(torch.stack([totals, counts], dim=1).to(torch.float64), lambda s: torch.exp(s[..., 0] / s[..., 1]))
