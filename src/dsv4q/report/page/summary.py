"""The run in short: what was made of what, how large, how long, with which settings."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from dsv4q.console import human_bytes, human_seconds
from dsv4q.report.page.charts import block_strip, pair_of_bars
from dsv4q.report.page.inputs import Inputs, ShardBytes
from dsv4q.report.page.record import Gap, Record, shown_or_gap
from dsv4q.report.page.wording import Unit, and_list, counted, short, short_name

Tile = tuple[str, str | None]
"""The figure, and a line below it."""


def tiles(report: Record, inputs: Inputs) -> dict[str, Any]:
    """The figures to know first. One that is not there says so in its tile."""
    wanted: dict[str, Callable[[Record], Tile]] = {
        "size": _size, "tensors": _tensors, "quantized linears exact": _exact, "shards": _shards, "time": _time,
        "peak memory": _memory, "experts without tokens": _unreached,
    }  # fmt: skip
    judged, when = (inputs.saved, "saved result") if inputs.saved is not None else (inputs.checked, "of this page")
    verdict = _tile(_verdict, judged, when) if isinstance(judged, Record) else ("not done", "see Verification")
    return {
        "tiles": [(name, *_tile(tell, report)) for name, tell in wanted.items()],
        "verdict": verdict,
        "mood": {"not done": "", "–": "", "good": "good"}.get(verdict[0], "bad"),
    }


def _tile(tell: Callable[..., Tile], record: Record, *more: object) -> Tile:
    try:
        return shown_or_gap(tell, record, *more)
    except Gap as gap:
        return "–", f"not shown: {gap}"


def _size(report: Record) -> Tile:
    return human_bytes(report["artifact"]["bytes"]), f"from {human_bytes(report['source']['bytes'])}"


def _tensors(report: Record) -> Tile:
    artifact = report["artifact"]
    return f"{artifact['tensors']:,}", f"{artifact['mtp_tensors']:,} of them mtp.*"


def _exact(report: Record) -> Tile:
    found = report["errors"].values()
    return f"{sum(one['exact'] for one in found):,}", f"of {sum(one['tensors'] for one in found):,}"


def _shards(report: Record) -> Tile:
    return f"{len(report['artifact']['shards']):,}", None


def _time(report: Record) -> Tile:
    count = len(report.get("ranks") or [None])
    more = "the last process of the run" if count <= 1 else f"the last start of the run, {count} ranks"
    return human_seconds(report["seconds"]["this_process"]), more


def _memory(report: Record) -> Tile:
    peak = report["peak_memory"]
    gpu = f"host; {human_bytes(peak['gpu'])} GPU" if peak.get("gpu") is not None else "host; no GPU"
    return human_bytes(peak["host"]), gpu


def _unreached(report: Record) -> Tile:
    found = report["coverage"].values()
    if not found:
        return "–", "no data was used"
    return f"{sum(one['unreached'] for one in found):,}", f"in {len(found)} layers"


def _verdict(judged: Record, when: str) -> Tile:
    wrong = judged["difference_count"]
    depth = "every value" if judged["checks"].get("scales") is not None else "headers"
    return counted(wrong) if wrong else "good", f"{depth}; {when}"


# ------------------------------------------------------------------------------------------------ what of what


def origin(report: Record) -> dict[str, Any]:
    """Source, draft, data and activations."""
    source, artifact = report["source"], report["artifact"]
    forms = ", ".join(f"{count:,} {form}" for form, count in source["forms"].items())
    linears = [f"{count:,} linears as {group}" for group, count in artifact["quantized_linears"].items()]
    draft = f"{artifact['mtp_tensors']:,} tensors, {human_bytes(artifact['mtp_bytes'])}"
    return {
        "path": source["path"],
        "layout": f"{source['layout']}: {source['tensors']:,} tensors ({forms}), {human_bytes(source['bytes'])}",
        "draft": draft if artifact["mtp_tensors"] else "left out",
        "quantized": and_list(linears),
        "calibration": _calibration(report),
        "activations": _activations(report["activations"]),
    }


def _calibration(report: Record) -> str:
    if report.get("calibration") is None:
        return "none was needed"
    found = report["calibration"]
    return (
        f"{found['tokens']:,} tokens: {found['samples']:,} samples of {found['max_length']:,}, "
        f"micro-batches of {found['micro_batch']:,}, from {found['source']}"
    )


def _activations(found: Record) -> str:
    """What the config says about input scales, in a sentence."""
    parts = [f"scales {found['scales']}", f"tokens of {found['experts']} experts"]
    if found.get("fallback") is not None:
        parts.append(f"fallback {found['fallback']}")
    return ", ".join([*parts, f"headroom {short(found['headroom'])}"])


def settings(report: Record) -> dict[str, Any]:
    """Versions, machine and the config that decided the bytes."""
    identity = report["identity"]
    versions = [f"{name} {json.dumps(version).strip(chr(34))}" for name, version in identity["versions"].items()]
    return {
        "versions": ", ".join(versions),
        "device": identity["device"],
        "threads": f"{identity['threads']}",
        "digest": identity["data"]["digest"] if identity.get("data") is not None else None,
        "config": json.dumps(identity["config"], indent=1, ensure_ascii=False),
    }


# ------------------------------------------------------------------------------------------------ sizes


def sizes(report: Record) -> dict[str, Any]:
    """Tensors and bytes by class, before and after."""
    before, after = report["source"]["classes"], report["artifact"]["classes"]
    whole = max([1, *(found["bytes"] for found in (*before.values(), *after.values()))])
    unit = Unit.for_bytes(whole / 1000)
    rows = []
    for name in dict.fromkeys([*after, *before]):
        both = [side.get(name) for side in (before, after)]
        shares = [0.0 if found is None else found["bytes"] / whole for found in both]
        nbytes = [unit.of(found and found["bytes"]) for found in both]
        rows.append(
            [name, *nbytes, pair_of_bars(*shares), *("–" if one is None else f"{one['tensors']:,}" for one in both)]
        )
    return {"rows": rows, "unit": unit.name}


def shards(report: Record, found: ShardBytes | Gap) -> dict[str, Any]:
    """A row for each shard with a strip of the blocks it holds."""
    planned = report["artifact"]["shards"]
    order = list(dict.fromkeys(block for shard in planned for block in shard["blocks"]))
    if not order:
        raise Gap("the shards hold no blocks" if planned else f"{report.name} has no shards")
    nbytes = [shard["bytes"] for shard in planned]
    unit = Unit.for_bytes(max(nbytes))
    there = {} if isinstance(found, Gap) else found
    rows = []
    for shard in planned:
        span = _span(shard["blocks"])
        strip = block_strip(len(order), _held(order, shard["blocks"], there.get(shard["file"], {})), f"holds {span}")
        rows.append([_number(shard["file"]), strip, unit.of(shard["bytes"]), span, f"{shard['tensors']:,}"])
    by_block = [
        [file, block, f"{size:,}"]
        for file, blocks in there.items()
        for block, size in sorted(blocks.items(), key=lambda one: order.index(one[0]) if one[0] in order else 1e9)
    ]
    return {
        "spread": f"{human_bytes(min(nbytes))} to {human_bytes(max(nbytes))}",
        "heads": ["shard", f"{order[0]} … {order[-1]}", unit.name, "blocks", "tensors"],
        "rows": rows,
        "by_block": by_block,
        "unread": str(found) if isinstance(found, Gap) else None,
    }


def _number(file: str) -> str:
    """`1` of `model-00001-of-00035.safetensors`; another name as it is."""
    parts = file.split("-")
    return str(int(parts[1])) if len(parts) == 4 and parts[1].isdecimal() else file


def _span(blocks: list[str]) -> str:
    """`embed, 0–5`."""
    runs: list[list[str]] = []
    for name in map(short_name, blocks):
        if runs and name.isdecimal() and runs[-1][-1].isdecimal() and int(name) == int(runs[-1][-1]) + 1:
            runs[-1].append(name)
        else:
            runs.append([name])
    return ", ".join(run[0] if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)


def _held(order: list[str], blocks: list[str], there: dict[str, int]) -> list[tuple[int, str]]:
    """Column and tooltip of each block that the shard has some of."""
    return [
        (column, f"{block}: {human_bytes(there[block])}" if block in there else block)
        for column, block in enumerate(order)
        if block in blocks
    ]
