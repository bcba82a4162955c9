"""Which routed experts calibration reached: layers x experts."""

from __future__ import annotations

from statistics import median
from typing import Any

from dsv4q.report.page.charts import Axis, Figure
from dsv4q.report.page.heatmap import heat_map, ramp
from dsv4q.report.page.record import Gap, Record, layers_of

HASH_LAYERS = 3
"""`num_hash_layers` where config.json leaves it out, as for the model itself."""


def coverage(report: Record, config: Record | Gap) -> dict[str, Any]:
    """Heat map and table of the tokens that the router sent to each expert."""
    layers = [(name, block) for name, block in layers_of(report) if block.get("tokens_per_expert") is not None]
    if not layers:
        return {"chart": None}
    counts = [block["tokens_per_expert"] for _, block in layers]
    experts = len(counts[0])
    if not experts or any(len(row) != experts for row in counts):
        raise Gap(f"{report.name}: tokens_per_expert has not the same number of experts in every block")
    hashed = _hash_layers(config)
    routing = ["unknown" if hashed is None else "hash" if int(name) < hashed else "score" for name, _ in layers]
    marked = routing.count("hash")
    rows = [(name, kind, row) for (name, _), kind, row in zip(layers, routing, counts, strict=True)]
    fallback = [block.get("experts_without_tokens") or [] for _, block in layers]
    return {
        "chart": _chart(counts, marked, [_tip(*row) for row in rows]),
        "ramp": ramp(counts),
        "layers": len(layers),
        "experts": experts,
        "title": _title([value for row in counts for value in row]),
        "routing_known": hashed is not None,
        "rows": [[*_row(*row), f"{len(used):,}"] for row, used in zip(rows, fallback, strict=True)],
    }


def _title(counts: list[int]) -> str:
    if unreached := counts.count(0):
        return f"{unreached:,} of {len(counts):,} experts got no token"
    return f"All {len(counts):,} experts got tokens, the least of them {min(counts):,}"


def _hash_layers(config: Record | Gap) -> int | None:
    """How many layers route by hash, if config.json tells."""
    if isinstance(config, Gap):
        return None
    found = config.get("num_hash_layers")
    return HASH_LAYERS if found is None else found if isinstance(found, int) else None


def _chart(counts: list[list[int]], marked: int, tips: list[str]) -> Figure:
    layers, experts = len(counts), len(counts[0])
    ticks = range(experts) if experts <= 16 else [*(experts * part // 4 for part in range(4)), experts - 1]
    every = 1 if layers <= 12 else 10
    share = 100 * marked / layers
    return Figure(
        Axis(0.0, float(experts), tuple((e + 0.5, str(e)) for e in ticks), title="expert"),
        # rows go down from the top; those with the bar beside them have its label
        Axis(0.0, float(layers), tuple((layers - i - 0.5, str(i)) for i in range(marked, layers) if i % every == 0)),
        heat_map(counts, tips),
        height=f"{layers * max(8, min(24, 200 // layers))}px",
        classes="heat",
        bar=(f"{share:.2f}", f"{100 - share / 2:.2f}") if marked else None,
    )


def _tip(name: str, kind: str, counts: list[int]) -> str:
    zero = counts.count(0)
    text = (
        f"layers.{name}, routing by {kind}: {min(counts):,} (expert {counts.index(min(counts))}) to {max(counts):,} "
        f"tokens (expert {counts.index(max(counts))}), median {median(counts):,.0f}"
    )
    return f"{text}, {zero:,} without any" if zero else text


def _row(name: str, kind: str, counts: list[int]) -> list[str]:
    missing = [number for number, value in enumerate(counts) if value == 0]
    rest = len(missing) - 8
    which = (", ".join(map(str, missing[:8])) or "–") + (f" … {rest:,} more" if rest > 0 else "")
    return [f"layers.{name}", kind, f"{min(counts):,}", f"{median(counts):,.0f}", f"{max(counts):,}",
            f"{len(missing):,}", which]  # fmt: skip
