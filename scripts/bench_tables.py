"""What bench_layer.py measured, as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Found = Mapping[str, Any]

STAGES = ("read", "exchange", "forward", "statistics", "encode", "sync")


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; floats with three significant digits."""
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    lines += ["| " + " | ".join(_cell(value) for value in row) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
    return "" if value is None else str(value)


def steady(values: Sequence[float]) -> float:
    """Mean without the first, in which kernels are compiled and memory is first taken."""
    kept = values[1:] or values
    return sum(kept) / len(kept)


def layers_of(run: Found) -> list[dict[str, float]]:
    """Seconds of each layer by stage, with `wall`: from the end of the block before to its own, if both are known."""
    found, before = [], None
    for block in run["blocks"]:
        seconds = dict(block["seconds"])
        done = seconds.pop("done_at", None)
        parts = sum(value for stage, value in seconds.items() if stage != "sync")
        seconds["wall"] = parts if done is None or before is None else done - before
        before = done
        if block["block"].startswith("layers."):
            found.append(seconds)
    return found


def per_layer(run: Found) -> float:
    """Seconds of wall time of a steady layer."""
    return steady([layer["wall"] for layer in layers_of(run)])


def tables(found: Found) -> str:
    """The whole report of a run of bench_layer.py; parts that were not run are absent."""
    parts = [
        "\n".join(f"- {name}: {found[name]}" for name in ("date", "command", "machine", "versions")),
        f"{found['layers']} layers, {found['samples']} samples of {found['length']} tokens, micro-batch "
        f"{found['micro_batch']}. Seconds per layer are means without the first layer.",
    ]
    if "ceilings" in found:
        parts.append(table(["ceiling", "GB/s"], found["ceilings"].items()))
    if stock_runs(found):
        parts.append(stock_table(stock_runs(found)))
    names = [name for name in found if name.partition(" ")[0] in ("sink", "files", "double")]
    parts += [stage_table(name, found[name]) for name in names]
    if counts_of(found) != [1]:
        parts.append(ranks_table(found))
    runs = {name: found[name] for name in ("sink", "files") if name in found}
    if runs:
        parts.append(summary_table(found, runs))
    if "twin" in found and "files" in found:
        same = found["twin"]["digests"] == found["files"]["digests"]
        parts.append(
            f"Experts as modules under llmcompressor's hooks: {per_layer(found['twin']):.2f} s per layer; "
            f"{len(found['twin']['digests'])} blocks, the bytes are {'the same' if same else 'NOT THE SAME'}."
        )
    if "profile" in found:
        parts.append(profile_table(found["profile"]))
    if "verified" in found:
        result = found["verified"]
        parts.append(f"Verified in {result['seconds']:.1f} s: {len(result['differences'])} differences.")
        parts += result["differences"][:5]
    return "\n\n".join(parts) + "\n"


def stock_runs(found: Found) -> list[Found]:
    """Runs of stock llmcompressor, one per batch size."""
    return [run for name, run in found.items() if name.startswith("stock ")]


def stock_table(runs: Sequence[Found]) -> str:
    """Stock llmcompressor by batch size."""
    rows = [[f"stock, batch {run['batch']}", len(run["layers"]), *stock_seconds(run).values(), *_peaks(run)]
            for run in runs]  # fmt: skip
    head = ["s per layer", "layers", *stock_seconds(runs[0]), "host peak GB", "GPU peak GB", "GPU reserved GB"]
    return table(head, rows)


def stock_seconds(run: Found) -> dict[str, float]:
    """Seconds per layer of each step; save and fsync are of the whole model, so the first layer counts there."""
    found = {step: steady([layer[step] for layer in run["layers"]]) for step in ("calibrate", "propagate", "compress")}
    found["without writing"] = sum(found.values())
    for step in ("save", "fsync"):
        found[step] = run[step] / len(run["layers"])
    found["all"] = found["without writing"] + found["save"]
    return found


def stage_table(name: str, run: Found) -> str:
    """Seconds of each layer by stage of dsv4q; stages overlap, so that they can add up to more than `wall`."""
    layers = layers_of(run)
    stages = sorted({stage for layer in layers for stage in layer} - {"wall"})
    rows: list[list[object]] = [
        [f"layers.{i}", *(layer.get(stage, 0.0) for stage in stages), layer["wall"]] for i, layer in enumerate(layers)
    ]
    rows.append(["steady", *(steady([layer.get(s, 0.0) for layer in layers]) for s in stages), per_layer(run)])
    host, gpu, reserved = _peaks(run)
    memory = f"host {host:.1f} GB" + ("" if gpu is None else f", GPU {gpu:.1f} GB, reserved {reserved:.1f} GB")
    exact = "; ".join(f"{e['exact']} of {e['tensors']} {role}s exact" for role, e in run["errors"].items())
    return (
        f"dsv4q, {name}, {len(layers)} layers, s:\n\n{table([name, *stages, 'wall'], rows)}\n\nPeak {memory}. {exact}."
    )


def counts_of(found: Found) -> list[int]:
    """Numbers of ranks that were measured."""
    names = (name.partition(" x")[2] for name in found if name.partition(" ")[0] in ("sink", "files"))
    return sorted({int(count or 1) for count in names}) or [1]


def ranks_table(found: Found) -> str:
    """By number of ranks: seconds of a steady layer, efficiency against one rank, stages of the slowest rank."""
    speeds = ["exchange GB/s", "write GB/s", "GPU peak GB", "host peak GB"]
    head = ["ranks", "mode", "s per layer", "efficiency", *STAGES, *speeds]
    rows: list[list[object]] = []
    digests = []
    for mode in ("sink", "files"):
        first = None
        for count in counts_of(found):
            run = found.get(f"{mode} x{count}" if count > 1 else mode)
            if run is None:
                continue
            seconds = per_layer(run)
            first = first or (count, seconds)
            stages = slowest(run)
            layers = len(layers_of(run))
            received = (run.get("received_bytes") or 0) / layers / 1e9
            rows.append([
                count, mode, seconds, first[0] * first[1] / (count * seconds), *(stages.get(stage) for stage in STAGES),
                received / stages["exchange"] if received and stages.get("exchange") else None,
                run["layer"]["bytes_out"] / 1e9 / seconds if mode == "files" else None,
                *(max((rank["peak_memory"].get(kind, 0) for rank in run["ranks"]), default=0) / 1e9 or None
                  for kind in ("gpu", "host")),
            ])  # fmt: skip
            if mode == "files":
                digests.append(run["digests"])
    text = table(head, rows)
    text += "\n\nStages: the slowest rank's, without the first layer; exchange includes waiting for the others."
    if len(digests) > 1:
        same = all(one == digests[0] for one in digests)
        text += f" {len(digests[0])} blocks, the bytes are {'the same for all' if same else 'NOT THE SAME'}."
    ceilings = {k: v for name, c in found.items() if name.startswith("ceilings of ranks") for k, v in c.items()}
    return text + ("\n\n" + table(["ceiling", "GB/s"], ceilings.items()) if ceilings else "")


def slowest(run: Found) -> dict[str, float]:
    """Seconds of each stage of a steady layer, on the rank that takes longest for it."""
    layers = [block["ranks"] for block in run["blocks"] if block["block"].startswith("layers.")]
    return {
        stage: max(steady([ranks[rank].get(stage, 0.0) for ranks in layers]) for rank in range(len(layers[0])))
        for stage in STAGES
    }


def _peaks(run: Found) -> list[float | None]:
    peaks = run["peak_memory"]
    return [peaks[name] / 1e9 if name in peaks else None for name in ("host", "gpu", "gpu_reserved")]


def floor(ceilings: Mapping[str, float], work: Mapping[str, float]) -> dict[str, float]:
    """Seconds that each part of a layer takes at the ceiling; what was not measured is left out."""
    best = {what: _best(ceilings, what) for what in ("read", "write", "pinned host", "device to pinned", "BF16 matmul")}
    need = {
        "read": work["bytes_in"] / 1e9, "write": work["bytes_out"] / 1e9, "pinned host": work["bytes_in"] / 1e9,
        "device to pinned": work["bytes_out"] / 1e9, "BF16 matmul": work["operations"] / 1e12,
    }  # fmt: skip
    return {what: need[what] / speed for what, speed in best.items() if speed}


def _best(ceilings: Mapping[str, float], what: str) -> float:
    return max((speed for name, speed in ceilings.items() if name.startswith(what)), default=0.0)


def summary_table(found: Found, runs: Mapping[str, Found]) -> str:
    """The ratios that the targets are stated in."""
    rows: list[list[object]] = []
    for name, run in runs.items():
        seconds, work = per_layer(run), run["layer"]
        rows.append([f"dsv4q, {name}, s per layer", seconds])
        for other in stock_runs(found):
            whole = stock_seconds(other)["without writing" if name == "sink" else "all"]
            rows.append([f"stock, batch {other['batch']} / dsv4q, {name}", whole / seconds])
        if "ceilings" in found:
            parts = floor(found["ceilings"], work)
            counted = {what: s for what, s in parts.items() if name == "files" or what != "write"}
            wall = max(counted, key=lambda what: counted[what])
            rows.append([f"floor of {name}, s per layer ({wall})", counted[wall]])
            rows.append([f"floor / dsv4q, {name}", counted[wall] / seconds])
        if name == "files":
            rows.append(["written, GB/s", work["bytes_out"] / 1e9 / seconds])
        if name == "files" and "ceilings" in found:
            speed = work["bytes_out"] / 1e9 / seconds / _best(found["ceilings"], "write")
            rows.append(["written / write ceiling", speed])
    work = next(iter(runs.values()))["layer"]
    note = (f"A layer: {work['bytes_in'] / 1e9:.3g} GB in, {work['bytes_out'] / 1e9:.3g} GB out, "
            f"{work['operations'] / 1e12:.3g} TFLOP (2 per weight and token; w1 and w3 of the routed experts on every "
            "token if the config says so, their w2 on the routed tokens; attention scores not counted).")  # fmt: skip
    if "ceilings" in found:
        spent = "; ".join(f"{what} {s:.3g}" for what, s in floor(found["ceilings"], work).items())
        note += f" At the ceilings, s: {spent}."
    return f"{note}\n\n{table(['', 'measured'], rows)}"


def profile_table(profile: Found) -> str:
    """Kernels of one steady layer by time, and how long the GPU was idle."""
    if not profile:
        return "No profile: the layer was not seen."
    rows = [[f"`{k['name'][:90].replace('|', '/')}`", k["calls"], k["seconds"] * 1000] for k in profile["kernels"]]
    text = table(["kernel", "calls", "ms"], rows)
    if "window" in profile:
        window = profile["window"]
        busy, computing = profile["busy"] / window, profile["computing"] / window
        text += f"\n\nOf {window:.2f} s the GPU computes {computing:.0%}; idle, no copy either, {1 - busy:.0%}."
    return text
