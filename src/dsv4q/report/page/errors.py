"""Errors by layer: of the stored weights, of the residual streams; and the range that the input scales leave."""

from __future__ import annotations

import math
from typing import NamedTuple

from dsv4q.report.page.charts import Chart, Line, linear_axis, log_axis, names_axis
from dsv4q.report.page.record import Gap, Record, blocks_of, layers_of, need
from dsv4q.report.page.wording import and_list, axis_percent, percent, short_name

_NVFP4_RANGE = 448.0 * 6.0
"""input_global_scale times the amax that it stands for."""

Layers = list[tuple[str, Record]]


def error_layers(report: Record) -> tuple[Layers, list[str]]:
    """Layers and stages of the draft that have errors of weights, and the classes of tensors that they are of."""
    layers = blocks_of(report, "errors")
    roles = list(dict.fromkeys(role for _, block in layers for role in block["errors"]))
    return layers, need(roles, f"{report.name} has no errors of weights by block")


def error_chart(layers: Layers, roles: list[str]) -> Chart:
    """Relative error of each layer and class."""
    lines = [_error_line(role, colour % 8, layers) for colour, role in enumerate(roles)]
    top = [w for line in lines for _, _, w in line.band] + [p for line in lines for _, p in line.points]
    tips = [
        (i, f"{name}: " + "; ".join(
            f"{role} {percent(one['relative_error'])}, worst {percent(one['worst'])}"
            for role, one in block["errors"].items()))
        for i, (name, block) in enumerate(layers, 1)
    ]  # fmt: skip
    y = linear_axis(max(filter(math.isfinite, top), default=0.0), axis_percent, "relative error")
    return Chart(names_axis([short_name(name) for name, _ in layers], "layer"), y, tips, lines=lines)


def _error_line(role: str, colour: int, layers: Layers) -> Line:
    """Error of all tensors of a layer together; the band is up to the worst of them."""
    found = [(i + 0.5, block["errors"].get(role)) for i, (_, block) in enumerate(layers)]
    errors = [(x, one["relative_error"], one["worst"]) for x, one in found if one is not None]
    band = [one for one in errors if math.isfinite(one[1]) and math.isfinite(one[2])]
    return Line(role, [(x, error) for x, error, _ in errors], colour, band)


def wrong_tensors(report: Record) -> list[tuple[str, Record]]:
    """The tensors that have errors, the largest first."""
    each = [one for _, block in blocks_of(report, "tensors") for one in block["tensors"].items()]
    wrong = [(name, one) for name, one in each if one["relative_error"] > 0]
    return sorted(wrong, key=lambda item: (-item[1]["relative_error"], item[0]))


# ------------------------------------------------------------------------------------------------ input scales


class Amax(NamedTuple):
    """Largest input that a scale covers, headroom included, and the analytic bound of it."""

    used: float
    bound: float

    @property
    def share(self) -> float:
        return self.used / self.bound


def input_amax(report: Record) -> tuple[Layers, dict[str, list[Amax]]]:
    """Layers that have calibrated input scales, and what these cover, by projection and layer."""
    layers = layers_of(report, "input_amax")
    projections = sorted({name for _, block in layers for name in block["input_amax"]})
    stored = [name for _, block in layers_of(report, "scales") for name in block["scales"]]
    if not projections and any(name.endswith(".input_global_scale") for name in stored):
        raise Gap(f"{report.name} has input scales, but not what they cover (blocks[].input_amax)")
    return layers, {p: [_amax(block["input_amax"][p]) for _, block in layers] for p in projections}


def _amax(found: Record) -> Amax:
    used, bound = found["used"], found["bound"]
    if not (_is_magnitude(used) and _is_magnitude(bound)):
        raise Gap(f"{found.place} is not positive and of a size that a float32 can have")
    return Amax(used, bound)


def _is_magnitude(value: float) -> bool:
    return 1e-45 < value < 1e39


def scale_chart(layers: Layers, amax: dict[str, list[Amax]]) -> Chart:
    """What the scales of each projection cover, as a share of the bound; projections that are alike are one line."""
    alike: dict[tuple[float, ...], list[str]] = {}
    for projection, found in amax.items():
        alike.setdefault(tuple(one.share for one in found), []).append(projection)
    lines = [
        Line(and_list(names), [(i + 0.5, share) for i, share in enumerate(shares)], colour,
             _expert_range(names[0], layers, amax[names[0]]))
        for colour, (shares, names) in enumerate(alike.items())
    ]  # fmt: skip
    low = min(value for line in lines for value in (*(y for _, y in line.points), *(y for _, y, _ in line.band)))
    tips = [
        (
            i + 1,
            f"layers.{name}: {'; '.join(f'{p} {percent(found[i].share)}' for p, found in amax.items())} of the bound",
        )
        for i, (name, _) in enumerate(layers)
    ]
    x, y = names_axis([name for name, _ in layers], "layer"), log_axis(low, 1.0, axis_percent, "share of the bound")
    return Chart(x, y, tips, lines=lines)


def _expert_range(projection: str, layers: Layers, amax: list[Amax]) -> list[tuple[float, float, float]]:
    """From the smallest to the largest amax of the experts of each layer, as shares of the bound."""
    found = []
    for column, ((_, block), one) in enumerate(zip(layers, amax, strict=True)):
        scale = (block.get("scales") or {}).get(f"{projection}.input_global_scale")
        if scale is None or not _is_magnitude(scale["max"]):
            return []
        found.append((column + 0.5, min(_NVFP4_RANGE / scale["max"], one.used) / one.bound, one.share))
    return found


# ------------------------------------------------------------------------------------------------ residual streams


def residual_chart(found: Record) -> Chart:
    """How far the residual streams of an evaluation drift from the reference's."""
    each = [(one["block"], one["relative_error"]) for one in found["residual"]]
    if not each or not all(0 <= error < math.inf for _, error in each):
        raise Gap(f"{found.name}: residual is empty or not finite")
    line = Line("artifact against reference", [(i + 0.5, error) for i, (_, error) in enumerate(each)], 0)
    tips = [(i, f"{name}: {percent(error)}") for i, (name, error) in enumerate(each, 1)]
    y = linear_axis(max(error for _, error in each), axis_percent, "relative error")
    return Chart(names_axis([short_name(name) for name, _ in each], "after block"), y, tips, lines=[line])
