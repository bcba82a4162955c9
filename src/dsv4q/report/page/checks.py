"""What the independent judge says, and what an evaluation found, if there was one."""

from __future__ import annotations

import math
from typing import Any

from markupsafe import Markup

from dsv4q.console import human_bytes, human_seconds
from dsv4q.report.page.charts import Line, line_chart, linear_axis, names_axis
from dsv4q.report.page.record import Gap, Record
from dsv4q.report.page.wording import axis_percent, counted, percent, short, short_name

SHOWN = 50
"""Differences that the page lists."""
_KEYS = ("tensor", "file", "expected", "found")


def verification(found: Record, what: str) -> dict[str, Any]:
    """Verdict, counts and differences of one verification."""
    wrong, listed, errors = found["difference_count"], found["differences"][:SHOWN], found["errors"]
    cut = f"The first {len(listed)} of {wrong:,} differences" if wrong > len(listed) else "Differences"
    return {
        "wrong": counted(wrong) if wrong else None,
        "text": f"{what}: {found['tensors']:,} tensors, {found['mtp_tensors']:,} of them mtp.*, in "
        f"{found['shards']:,} shards, {human_bytes(found['bytes'])}; took {human_seconds(found['seconds'])}.",
        "listed": cut,
        "differences": [
            [one["check"], *("–" if one.get(key) is None else one[key] for key in _KEYS)] for one in listed
        ],
        "checks": [[name, f"{count:,.0f}"] for name, count in found["checks"].items()],
        "errors": [
            [role, f"{one['tensors']:,}", f"{one['exact']:,}", percent(one["mean_relative_error"]),
             percent(one["max_relative_error"]), short(one["max_abs_error"])]
            for role, one in errors.items()
        ],
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------ evaluation


def evaluation(found: Record) -> dict[str, Any]:
    """Data and quality measures of eval.json, with intervals."""
    data, perplexity = found["data"], found["perplexity"]
    return {
        "text": f"{data['samples']:,} samples of {data['length']:,} tokens, {data['source']}",
        "path": found["reference"]["path"],
        "form": found["reference"]["form"],
        "artifact": found["artifact"]["form"],
        "intervals": found["intervals"],
        "rows": [
            ["perplexity, reference", *_estimate(perplexity["reference"])],
            ["perplexity, artifact", *_estimate(perplexity["artifact"])],
            ["perplexity, ratio", *_estimate(perplexity["ratio"])],
            ["KL divergence, nats per token", *_estimate(found["kl_divergence"])],
            ["same most likely token", *_estimate(found["top1_agreement"], share=True)],
        ],
    }


def acceptance(found: Record) -> dict[str, Any]:
    """How often the main model would accept the draft's proposals."""
    accepted = found["acceptance"]
    steps = ("step_1", "step_2")
    return {
        "rows": [
            [f"{pair['main']} / {pair['draft']}", *(_spread(pair[step], "share") for step in steps),
             _spread(pair["tokens_per_step"], "tokens")]
            for pair in accepted["pairs"]
        ],
        "changes": [
            [what, *(_spread(one[step], "points") for step in steps)]
            for what, one in accepted["differences"].items()
        ],
        "without": list((accepted.get("without_draft") or {}).items()),
    }  # fmt: skip


def residual(found: Record) -> dict[str, Any]:
    """How far the residual streams drift from the reference's."""
    each = [(one["block"], one["relative_error"]) for one in found["residual"]]
    if not each or not all(0 <= error < math.inf for _, error in each):
        raise Gap(f"{found.name}: residual is empty or not finite")
    lines = [Line("artifact against reference", [(i + 0.5, error) for i, (_, error) in enumerate(each)], 0)]
    x = names_axis([short_name(name) for name, _ in each], "after block")
    y = linear_axis(max(error for _, error in each), axis_percent, "relative error")
    tips = [(i, f"{name}: {percent(error)}") for i, (name, error) in enumerate(each, 1)]
    last, error = each[-1]
    return {
        "title": f"{percent(error)} after {last}",
        "chart": line_chart(x, y, lines, tips),
        "rows": [[name, percent(error)] for name, error in each],
    }


def _estimate(found: Record, *, share: bool = False) -> list[str]:
    shown = percent if share else _five
    return ["none" if found.get(key) is None else shown(found[key]) for key in ("value", "low", "high")]


def _five(value: float) -> str:
    return f"{value:,.5g}" if abs(value) < 1e5 else short(value)


_SPREADS = {"share": (100, ".2f", " %"), "points": (100, "+.2f", ""), "tokens": (1, ".3f", "")}
"""Factor, form and unit of what has an interval."""


def _spread(found: Record, kind: str) -> str:
    """`81.20 %` and below it `79.00 to 83.10`."""
    factor, form, unit = _SPREADS[kind]
    value, low, high = (
        None if found.get(key) is None else format(found[key] * factor, form).replace("-", "\N{MINUS SIGN}")
        for key in ("value", "low", "high")
    )
    if value is None:
        return "none"
    interval = "" if low is None or high is None else Markup("<small>{} to {}</small>").format(low, high)
    return Markup("{}{}{}").format(value, unit, interval)
