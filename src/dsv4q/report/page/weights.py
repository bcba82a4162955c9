"""Error of the stored weights by layer and class, and the range that the input scales leave."""

from __future__ import annotations

import math

from dsv4q.report.page.charts import Frame, Line, line_chart, linear_axis, log_axis, names_axis
from dsv4q.report.page.markup import Column, Html, el, join, numbers, percent, short, table
from dsv4q.report.page.node import Gap, Node
from dsv4q.report.page.parts import and_list, layers_of

_WORST = 12
"""Tensors that the table of the worst ones lists."""
_NVFP4_RANGE = 448.0 * 6.0
"""input_global_scale times the amax that it stands for."""


def weight_totals(report: Node) -> list[Html]:
    """Table of the classes."""
    rows: list[list[str | None]] = []
    for name, found in report.get("errors").items():
        noise = found.maybe("sqnr_db")
        exact, tensors = found.integer("exact"), found.integer("tensors")
        rows.append(
            [name, percent(found.number("relative_error")), f"{exact:,}", f"{tensors:,}",
             "–" if noise is None else f"{noise.as_number():.1f}", percent(found.number("worst")),
             short(found.number("max_abs_error"))]
        )  # fmt: skip
    if not rows:
        raise Gap(f"{report.place} has no errors of weights: nothing was quantized")
    columns = [Column("class", False), Column("relative error"), Column("exact"), Column("tensors"),
               Column("SQNR, dB"), Column("worst tensor"), Column("largest error of a value")]  # fmt: skip
    note = (
        "Error of the stored weights against the source: norm of the difference over norm of the weight. Exact means "
        "that every value decodes to the source's, bit for bit."
    )
    return [el("p", {"class": "soft"}, note), table("Quantized weights by class", columns, rows)]


def weight_chart(report: Node) -> list[Html]:
    """Relative error of each layer and class."""
    layers = [(name, block) for name, block in layers_of(report) if block.maybe("errors") is not None]
    roles = list(dict.fromkeys(role for _, block in layers for role, _ in block.get("errors").items()))
    lines, rows = [], []
    for colour, role in enumerate(roles):
        points, band = [], []
        for column, (_, block) in enumerate(layers):
            found = block.get("errors").maybe(role)
            if found is None:
                continue
            error, worst = found.number("relative_error"), found.number("worst")
            points.append((column + 0.5, error))
            if math.isfinite(error) and math.isfinite(worst):
                band.append((column + 0.5, error, worst))
        lines.append(Line(role, points, colour % 8, band))
    for name, block in layers:
        cells: list[str | None] = [f"layers.{name}"]
        for role in roles:
            found = block.get("errors").maybe(role)
            cells += ["–"] * 3 if found is None else [
                f"{found.integer('exact'):,} of {found.integer('tensors'):,}", percent(found.number("relative_error")),
                percent(found.number("worst")),
            ]  # fmt: skip
        rows.append(cells)
    if not lines:
        raise Gap(f"{report.place} has no errors of weights by block")
    return [_error_figure(report, lines, layers), _error_table(roles, rows)]


def _error_figure(report: Node, lines: list[Line], layers: list[tuple[str, Node]]) -> Html:
    totals = dict(report.get("errors").items())
    exact = sum(found.integer("exact") for found in totals.values())
    tensors = sum(found.integer("tensors") for found in totals.values())
    if exact == tensors:
        text = f"All {tensors:,} quantized linears are stored without any error, in every layer."
        return el("p", {"class": "good"}, text)
    worst = [w for line in lines for _, _, w in line.band] + [p for line in lines for _, p in line.points]
    top = max((value for value in worst if math.isfinite(value)), default=0.0)
    found = and_list([f"{role} {percent(one.number('relative_error'))}" for role, one in totals.items()])
    titles = [
        (float(i), i + 1.0, f"layers.{name}: " + "; ".join(
            f"{role} {percent(one.number('relative_error'))}, worst {percent(one.number('worst'))}"
            for role, one in block.get("errors").items()))
        for i, (name, block) in enumerate(layers)
    ]  # fmt: skip
    frame = Frame(
        f"Relative error over all layers: {found}",
        "Line: all tensors of a layer and class together. Band: up to the worst tensor among them. Relative error, "
        "per cent.",
        f"Line chart of the relative error of quantized weights by layer; in all {found}. The table below has the "
        "values.",
        names_axis([name for name, _ in layers], "layer"),
        linear_axis(top, _axis_percent, "relative error"),
    )
    return line_chart(frame, lines, titles)


def _error_table(roles: list[str], rows: list[list[str | None]]) -> Html:
    heads = [Column(f"{role}: {what}") for role in roles for what in ("exact", "error", "worst")]
    return numbers("weight error by layer", [Column("block", False), *heads], rows)


def _axis_percent(value: float) -> str:
    return f"{value * 100:.3g} %"


def worst_tensors(report: Node) -> list[Html]:
    """The tensors with the largest errors, if any has one."""
    found = [
        (one.number("relative_error"), name, one)
        for _, block in layers_of(report)
        if (tensors := block.maybe("tensors")) is not None
        for name, one in tensors.items()
    ]
    found = sorted((item for item in found if item[0] > 0), key=lambda item: (-item[0], item[1]))[:_WORST]
    if not found:
        return []
    rows: list[list[str | None]] = [
        [el("code", None, name), percent(error), percent(one.number("exact_fraction")),
         short(one.number("max_abs_error"))]
        for error, name, one in found
    ]  # fmt: skip
    columns = [Column("tensor", False), Column("relative error"), Column("values exact"), Column("largest error")]
    return [numbers(f"the {len(rows)} tensors with the largest errors", columns, rows)]


# ------------------------------------------------------------------------------------------------ input scales


def input_scales(report: Node) -> list[Html]:
    """How far the largest input that each scale allows lies below the largest possible one."""
    layers = [(name, block) for name, block in layers_of(report) if block.maybe("input_amax") is not None]
    projections = sorted({p for _, block in layers for p, _ in block.get("input_amax").items()})
    if not projections:
        if any(name.endswith(".input_global_scale") for name in _stored_scales(report)):
            raise Gap(f"{report.place} has input scales, but not what they cover (blocks[].input_amax)")
        return [el("p", None, "The recipe has no calibrated input scales.")]
    series: dict[str, list[tuple[float, float]]] = {p: [] for p in projections}
    rows: list[list[str | None]] = []
    titles = []
    for column, (name, block) in enumerate(layers):
        cells: list[str | None] = [f"layers.{name}"]
        for projection in projections:
            used, bound = _used_and_bound(block, projection)
            series[projection].append((column + 0.5, used / bound))
            cells += [short(used), short(bound), f"{bound / used:.3g}"]
        rows.append(cells)
        title = "; ".join(f"{p} {percent(series[p][-1][1])}" for p in projections)
        titles.append((float(column), column + 1.0, f"layers.{name}: {title} of the bound"))
    heads = [Column(f"{p}: {what}") for p in projections for what in ("amax", "bound", "times")]
    shown = numbers("input scales by layer", [Column("block", False), *heads], rows)
    if report.get("activations").text("scales") == "bound":
        text = "Input scales are the analytic bounds: no input can leave their range, and no data was needed."
        return [el("p", None, text), shown]
    return [_scale_figure(series, layers, titles), shown]


def _used_and_bound(block: Node, projection: str) -> tuple[float, float]:
    found = block.get("input_amax").get(projection)
    used, bound = found.number("used"), found.number("bound")
    if not (_is_magnitude(used) and _is_magnitude(bound)):
        raise Gap(f"{found.place} is not positive and of a size that a float32 can have")
    return used, bound


def _stored_scales(report: Node) -> list[str]:
    found = [block.maybe("scales") for _, block in layers_of(report)]
    return [name for scales in found if scales is not None for name, _ in scales.items()]


def _is_magnitude(value: float) -> bool:
    return 1e-45 < value < 1e39


def _scale_figure(
    series: dict[str, list[tuple[float, float]]], layers: list[tuple[str, Node]], titles: list[tuple[float, float, str]]
) -> Html:
    alike: dict[tuple[float, ...], list[str]] = {}
    for projection, points in series.items():
        alike.setdefault(tuple(y for _, y in points), []).append(projection)
    lines = []
    for colour, names in enumerate(alike.values()):
        lines.append(Line(and_list(names), series[names[0]], colour, _spread(layers, names)))
    shares = [y for points in series.values() for _, y in points]
    low = min([*shares, *(least for line in lines for _, least, _ in line.band)])
    times = f"{1 / max(shares):.3g} to {1 / min(shares):.3g} times"
    frame = Frame(
        f"The largest possible input is {times} what the scales were made for",
        "Line: the amax that a layer's input scales cover, headroom included, as a share of the analytic bound. Band: "
        "down to the expert with the smallest. Per cent, logarithmic. Inputs above the line would be clipped; none can "
        "be above 100 %.",
        f"Line chart by layer of the activation range covered, relative to its bound; the bound is {times} larger. The "
        "table below has the values.",
        names_axis([name for name, _ in layers], "layer"),
        log_axis(low, 1.0, _axis_percent, "share of the bound"),
    )
    return line_chart(frame, lines, titles)


def _spread(layers: list[tuple[str, Node]], names: list[str]) -> list[tuple[float, float, float]]:
    """From the smallest to the largest amax of the experts of each layer, as shares of the bound."""
    found = []
    for column, (_, block) in enumerate(layers):
        used, bound = _used_and_bound(block, names[0])
        scales = block.maybe("scales")
        scale = None if scales is None else scales.maybe(f"{names[0]}.input_global_scale")
        largest = None if scale is None else scale.number("max")
        if largest is None or not _is_magnitude(largest):
            return []
        found.append((column + 0.5, min(_NVFP4_RANGE / largest, used) / bound, used / bound))
    return found


def activation_settings(report: Node) -> Html:
    """What the config says about input scales, in a sentence."""
    found = report.get("activations")
    parts = [f"scales {found.text('scales')}", f"tokens of {found.text('experts')} experts"]
    fallback = found.maybe("fallback")
    if fallback is not None and isinstance(fallback.value, str):
        parts.append(f"fallback {fallback.value}")
    return join(", ".join([*parts, f"headroom {short(found.number('headroom'))}"]))
