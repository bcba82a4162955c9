"""Which block lies in which shard, and how large the shards are."""

from __future__ import annotations

from collections.abc import Sequence

from dsv4q.console import human_bytes
from dsv4q.report.page.inputs import ShardBytes
from dsv4q.report.page.markup import Column, Html, Unit, el, numbers, table
from dsv4q.report.page.node import Gap, Node
from dsv4q.report.page.parts import short_name


def shard_map(report: Node, found: ShardBytes | Gap) -> list[Html]:
    """A row for each shard with a strip of the blocks it holds."""
    planned = list(report.get("artifact").get("shards"))
    order = _order([shard.texts("blocks") for shard in planned])
    sizes = [shard.integer("bytes") for shard in planned]
    if not sizes:
        raise Gap(f"{report.place} has no shards")
    unit = Unit.for_bytes(max(sizes))
    rows: list[list[str | None]] = []
    for shard in planned:
        file, blocks = shard.text("file"), shard.texts("blocks")
        there = found.get(file) if isinstance(found, dict) else None
        rows.append(
            [_number(file), _strip(order, blocks, there), unit.of(shard.integer("bytes")), _span(blocks),
             f"{shard.integer('tensors'):,}"]
        )  # fmt: skip
    columns = [Column("shard", False), Column(f"{order[0]} … {order[-1]}", False), Column(unit.name),
               Column("blocks", False), Column("tensors")]  # fmt: skip
    spread = f"{human_bytes(min(sizes))} to {human_bytes(max(sizes))}"
    files = "shard" if len(planned) == 1 else "shards"
    shown = [
        el("p", None, f"{len(planned)} {files} of {spread}. Each strip runs over the blocks in order; what is filled "
           "lies in the shard."),
        table("Blocks by shard", columns, rows),
    ]  # fmt: skip
    if isinstance(found, Gap):
        return [*shown, el("p", {"class": "gap"}, el("b", None, "Not shown: "), f"bytes by block; {found}.")]
    return [*shown, _table(found, order)]


def _number(file: str) -> str:
    """`00001` of `model-00001-of-00035.safetensors`; another name as it is."""
    parts = file.split("-")
    return str(int(parts[1])) if len(parts) == 4 and parts[1].isdecimal() else file


def _order(shards: Sequence[Sequence[str]]) -> list[str]:
    order = list(dict.fromkeys(block for blocks in shards for block in blocks))
    if not order:
        raise Gap("the shards hold no blocks")
    return order


def _span(blocks: Sequence[str]) -> str:
    """`layers 3–5`, or names."""
    names = [short_name(block) for block in blocks]
    runs: list[list[str]] = []
    for name in names:
        if runs and name.isdecimal() and runs[-1][-1].isdecimal() and int(name) == int(runs[-1][-1]) + 1:
            runs[-1].append(name)
        else:
            runs.append([name])
    return ", ".join(run[0] if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)


def _strip(order: Sequence[str], blocks: Sequence[str], there: dict[str, int] | None) -> Html:
    """One cell for each block in order, filled where the shard has some of it."""
    cells = []
    for column, block in enumerate(order):
        if block not in blocks:
            continue
        text = f"{block}: {human_bytes(there[block])}" if there and block in there else block
        cells.append(el("rect", {"x": column, "width": 0.92, "height": 1, "class": "fill"}, el("title", None, text)))
    lines = "".join(f"M{column} 1h.92" for column in range(len(order)))
    return el(
        "svg",
        {"class": "map", "viewBox": f"0 0 {len(order)} 1", "preserveAspectRatio": "none", "role": "img",
         "aria-label": f"holds {_span(blocks)}"},
        el("path", {"class": "grid", "d": lines}),
        el("g", {"class": "c0"}, *cells),
    )  # fmt: skip


def _table(found: ShardBytes, order: Sequence[str]) -> Html:
    rows: list[list[str | None]] = [
        [el("code", None, file), block, f"{nbytes:,}"]
        for file, blocks in found.items()
        for block, nbytes in sorted(blocks.items(), key=lambda item: order.index(item[0]) if item[0] in order else 1e9)
    ]
    columns = [Column("shard", False), Column("block", False), Column("bytes of tensors")]
    return numbers("bytes by shard and block, from the headers on disk", columns, rows)
