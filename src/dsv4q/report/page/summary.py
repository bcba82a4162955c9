"""Bytes and tensors by class, before and after; which blocks lie in which shard."""

from __future__ import annotations

from dsv4q.report.page.inputs import ShardBytes
from dsv4q.report.page.record import Gap, Record, need
from dsv4q.report.page.wording import short_name


def class_sizes(report: Record) -> list[tuple[str, list[Record | None]]]:
    """Class of tensors, and its sizes in the source and in the artifact."""
    before, after = report["source"]["classes"], report["artifact"]["classes"]
    return [(name, [before.get(name), after.get(name)]) for name in dict.fromkeys([*after, *before])]


def block_order(report: Record) -> list[str]:
    """Blocks in the order in which the shards hold them."""
    planned = need(report["artifact"]["shards"], f"{report.name} has no shards")
    return need(list(dict.fromkeys(b for shard in planned for b in shard["blocks"])), "the shards hold no blocks")


def block_bytes(order: list[str], shards: ShardBytes | Gap) -> list[tuple[str, str, int]]:
    """Shard, block and bytes of every part of a block; nothing if the shards could not be read."""
    place = {block: number for number, block in enumerate(order)}
    return [
        (file, block, nbytes)
        for file, blocks in ({} if isinstance(shards, Gap) else shards).items()
        for block, nbytes in sorted(blocks.items(), key=lambda one: place.get(one[0], len(order)))
    ]


def shard_number(file: str) -> str:
    """`1` of `model-00001-of-00035.safetensors`; another name as it is."""
    parts = file.split("-")
    return str(int(parts[1])) if len(parts) == 4 and parts[1].isdecimal() else file


def span(blocks: list[str]) -> str:
    """`embed, 0–5`."""
    runs: list[list[str]] = []
    for name in map(short_name, blocks):
        if runs and name.isdecimal() and runs[-1][-1].isdecimal() and int(name) == int(runs[-1][-1]) + 1:
            runs[-1].append(name)
        else:
            runs.append([name])
    return ", ".join(run[0] if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)
