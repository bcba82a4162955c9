"""Which routed experts calibration reached: layers x experts."""

from __future__ import annotations

from statistics import median

from dsv4q.report.page.charts import Axis, Frame
from dsv4q.report.page.heatmap import heat_map, ramp, rows_axis
from dsv4q.report.page.markup import Column, Html, el, numbers
from dsv4q.report.page.node import Gap, Node
from dsv4q.report.page.parts import layers_of


def coverage(report: Node, config: Node | Gap) -> list[Html]:
    """Heat map and table of the tokens that the router sent to each expert."""
    layers = [(name, block) for name, block in layers_of(report) if block.maybe("tokens_per_expert") is not None]
    if not layers:
        return [el("p", None, "No data went through the model, so no expert was reached or missed.")]
    counts = [block.integers("tokens_per_expert") for _, block in layers]
    experts = len(counts[0])
    if not experts or any(len(row) != experts for row in counts):
        raise Gap(f"{report.place}: tokens_per_expert has not the same number of experts in every block")
    hashed = _hash_layers(config)
    names = [name for name, _ in layers]
    routing = ["unknown" if hashed is None else "hash" if int(name) < hashed else "score" for name in names]
    marked = sum(kind == "hash" for kind in routing)
    frame = _frame(counts, len(layers), experts, marked)
    rows = [_row(name, kind, row) for name, kind, row in zip(names, routing, counts, strict=True)]
    shown = [heat_map(frame, counts, rows, _bracket(marked, len(layers))), ramp(counts, "tokens")]
    if isinstance(config, Gap) or hashed is None:
        shown.append(el("p", {"class": "gap"}, el("b", None, "Not shown: "), "which layers route by hash; config.json "
                        "does not tell."))  # fmt: skip
    return [*shown, _table(layers, routing, counts)]


def _hash_layers(config: Node | Gap) -> int | None:
    """`num_hash_layers` of config.json, 3 where it is left out, as for the model itself."""
    if isinstance(config, Gap):
        return None
    found = config.maybe("num_hash_layers")
    return 3 if found is None else config.integer("num_hash_layers")


def _frame(counts: list[list[int]], layers: int, experts: int, marked: int) -> Frame:
    unreached = sum(value == 0 for row in counts for value in row)
    least = min(value for row in counts for value in row)
    if unreached:
        title = f"{unreached:,} of {layers * experts:,} experts got no token"
    else:
        title = f"All {layers * experts:,} experts got tokens, the least of them {least:,}"
    by_hash = "The bar at the left marks layers that route by hash. " if marked else ""
    return Frame(
        title,
        "Tokens that the router sent to each expert while calibrating. A row is a layer, a column an expert. "
        + by_hash,
        f"Heat map of {layers} layers by {experts} experts, coloured by tokens. {title}. The table below has the "
        "least, median and most tokens of every layer.",
        Axis(0.0, float(experts), tuple((e + 0.5, str(e)) for e in _expert_ticks(experts)), title="expert"),
        rows_axis(layers, marked),
        height=f"{layers * max(8, min(24, 200 // layers))}px",
        classes="heat",
    )


def _expert_ticks(experts: int) -> list[int]:
    if experts <= 16:
        return list(range(experts))
    return [experts * part // 4 for part in range(4)] + [experts - 1]


def _bracket(marked: int, layers: int) -> Html | None:
    """A bar beside the rows of the layers that route by hash."""
    if not marked:
        return None
    share = 100 * marked / layers
    bar = el("div", {"class": "hash", "style": f"top:0;height:{share:.2f}%"})
    label = el("span", {"style": f"bottom:{100 - share / 2:.2f}%;right:.15rem"}, "hash")
    return Html(bar + label)


def _row(name: str, kind: str, counts: list[int]) -> str:
    fewest = counts.index(min(counts))
    zero = sum(value == 0 for value in counts)
    text = (
        f"layers.{name}, routing by {kind}: {min(counts):,} (expert {fewest}) to {max(counts):,} tokens (expert "
        f"{counts.index(max(counts))}), median {median(counts):,.0f}"
    )
    return f"{text}, {zero:,} without any" if zero else text


def _table(layers: list[tuple[str, Node]], routing: list[str], counts: list[list[int]]) -> Html:
    rows: list[list[str | None]] = []
    for (name, block), kind, row in zip(layers, routing, counts, strict=True):
        missing = [number for number, value in enumerate(row) if value == 0]
        fallback = block.integers("experts_without_tokens") if block.maybe("experts_without_tokens") else []
        rows.append(
            [f"layers.{name}", kind, f"{min(row):,}", f"{median(row):,.0f}", f"{max(row):,}", f"{len(missing):,}",
             _few(missing), f"{len(fallback):,}"]
        )  # fmt: skip
    columns = [Column("block", False), Column("routing", False), Column("least"), Column("median"), Column("most"),
               Column("without"), Column("which", False), Column("fallback used")]  # fmt: skip
    return numbers("tokens per expert by layer", columns, rows)


def _few(missing: list[int]) -> str:
    rest = len(missing) - 8
    return (", ".join(map(str, missing[:8])) or "–") + (f" … {rest:,} more" if rest > 0 else "")
