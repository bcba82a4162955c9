"""Error of the stored weights by layer and class, and the range that the input scales leave."""

from __future__ import annotations

import math
from typing import Any

from dsv4q.report.page.charts import Figure, Line, line_chart, linear_axis, log_axis, names_axis
from dsv4q.report.page.record import Gap, Record, layers_of
from dsv4q.report.page.wording import and_list, axis_percent, percent, short

WORST = 12
"""Tensors that the table of the worst ones lists."""
_NVFP4_RANGE = 448.0 * 6.0
"""input_global_scale times the amax that it stands for."""

Layers = list[tuple[str, Record]]


def weight_totals(report: Record) -> dict[str, Any]:
    """Table of the classes."""
    if not report["errors"]:
        raise Gap(f"{report.name} has no errors of weights: nothing was quantized")
    return {"rows": [
        [name, percent(found["relative_error"]), f"{found['exact']:,}", f"{found['tensors']:,}",
         "–" if found.get("sqnr_db") is None else f"{found['sqnr_db']:.1f}", percent(found["worst"]),
         short(found["max_abs_error"])]
        for name, found in report["errors"].items()
    ]}  # fmt: skip


def weight_chart(report: Record) -> dict[str, Any]:
    """Relative error of each layer and class."""
    layers = [(name, block) for name, block in layers_of(report) if block.get("errors") is not None]
    roles = list(dict.fromkeys(role for _, block in layers for role in block["errors"]))
    if not roles:
        raise Gap(f"{report.name} has no errors of weights by block")
    totals = report["errors"]
    tensors = sum(found["tensors"] for found in totals.values())
    whole = sum(found["exact"] for found in totals.values()) == tensors
    return {
        "all_exact": f"{tensors:,}" if whole else None,
        "chart": None if whole else _error_chart(layers, roles),
        "found": and_list([f"{role} {percent(found['relative_error'])}" for role, found in totals.items()]),
        "heads": [f"{role}: {what}" for role in roles for what in ("exact", "error", "worst")],
        "rows": [[f"layers.{name}", *_error_cells(block["errors"], roles)] for name, block in layers],
    }


def _error_cells(errors: Record, roles: list[str]) -> list[str]:
    cells = []
    for found in map(errors.get, roles):
        cells += ["–"] * 3 if found is None else [
            f"{found['exact']:,} of {found['tensors']:,}", percent(found["relative_error"]), percent(found["worst"])
        ]  # fmt: skip
    return cells


def _error_chart(layers: Layers, roles: list[str]) -> Figure:
    lines = []
    for colour, role in enumerate(roles):
        points, band = [], []
        for column, (_, block) in enumerate(layers):
            if (found := block["errors"].get(role)) is None:
                continue
            error, worst = found["relative_error"], found["worst"]
            points.append((column + 0.5, error))
            if math.isfinite(error) and math.isfinite(worst):
                band.append((column + 0.5, error, worst))
        lines.append(Line(role, points, colour % 8, band))
    top = [w for line in lines for _, _, w in line.band] + [p for line in lines for _, p in line.points]
    tips = [
        (i, f"layers.{name}: " + "; ".join(
            f"{role} {percent(one['relative_error'])}, worst {percent(one['worst'])}"
            for role, one in block["errors"].items()))
        for i, (name, block) in enumerate(layers, 1)
    ]  # fmt: skip
    y = linear_axis(max(filter(math.isfinite, top), default=0.0), axis_percent, "relative error")
    return line_chart(names_axis([name for name, _ in layers], "layer"), y, lines, tips)


def worst_tensors(report: Record) -> dict[str, Any] | None:
    """The tensors with the largest errors, if any has one."""
    each = [one for _, block in layers_of(report) for one in (block.get("tensors") or {}).items()]
    wrong = [(name, one) for name, one in each if one["relative_error"] > 0]
    if not wrong:
        return None
    wrong.sort(key=lambda item: (-item[1]["relative_error"], item[0]))
    return {"rows": [
        [name, percent(one["relative_error"]), percent(one["exact_fraction"]), short(one["max_abs_error"])]
        for name, one in wrong[:WORST]
    ]}  # fmt: skip


# ------------------------------------------------------------------------------------------------ input scales


def input_scales(report: Record) -> dict[str, Any]:
    """How far the largest input that each scale allows lies below the largest possible one."""
    layers = [(name, block) for name, block in layers_of(report) if block.get("input_amax") is not None]
    projections = sorted({name for _, block in layers for name in block["input_amax"]})
    if not projections:
        stored = [name for _, block in layers_of(report) for name in block.get("scales") or {}]
        if any(name.endswith(".input_global_scale") for name in stored):
            raise Gap(f"{report.name} has input scales, but not what they cover (blocks[].input_amax)")
        return {"rows": None}
    amax = {p: [_used_and_bound(block["input_amax"][p]) for _, block in layers] for p in projections}
    shares = {p: [used / bound for used, bound in found] for p, found in amax.items()}
    rows = [[f"layers.{name}"] for name, _ in layers]
    for found in amax.values():
        for row, (used, bound) in zip(rows, found, strict=True):
            row += [short(used), short(bound), f"{bound / used:.3g}"]
    observed = report["activations"]["scales"] != "bound"
    each = [share for found in shares.values() for share in found]
    return {
        "heads": [f"{p}: {what}" for p in projections for what in ("amax", "bound", "times")],
        "rows": rows,
        "times": f"{1 / max(each):.3g} to {1 / min(each):.3g} times",
        "chart": _scale_chart(layers, shares) if observed else None,
    }


def _used_and_bound(found: Record) -> tuple[float, float]:
    used, bound = found["used"], found["bound"]
    if not (_is_magnitude(used) and _is_magnitude(bound)):
        raise Gap(f"{found.place} is not positive and of a size that a float32 can have")
    return used, bound


def _is_magnitude(value: float) -> bool:
    return 1e-45 < value < 1e39


def _scale_chart(layers: Layers, shares: dict[str, list[float]]) -> Figure:
    alike: dict[tuple[float, ...], list[str]] = {}
    for projection, found in shares.items():
        alike.setdefault(tuple(found), []).append(projection)
    lines = []
    for colour, names in enumerate(alike.values()):
        points = [(column + 0.5, share) for column, share in enumerate(shares[names[0]])]
        lines.append(Line(and_list(names), points, colour, _expert_range(layers, names[0])))
    low = min(value for line in lines for value in (*(y for _, y in line.points), *(y for _, y, _ in line.band)))
    y = log_axis(low, 1.0, axis_percent, "share of the bound")
    tips = [
        (i + 1, f"layers.{name}: {'; '.join(f'{p} {percent(found[i])}' for p, found in shares.items())} of the bound")
        for i, (name, _) in enumerate(layers)
    ]
    return line_chart(names_axis([name for name, _ in layers], "layer"), y, lines, tips)


def _expert_range(layers: Layers, projection: str) -> list[tuple[float, float, float]]:
    """From the smallest to the largest amax of the experts of each layer, as shares of the bound."""
    found = []
    for column, (_, block) in enumerate(layers):
        used, bound = _used_and_bound(block["input_amax"][projection])
        scale = (block.get("scales") or {}).get(f"{projection}.input_global_scale")
        if scale is None or not _is_magnitude(scale["max"]):
            return []
        found.append((column + 0.5, min(_NVFP4_RANGE / scale["max"], used) / bound, used / bound))
    return found
