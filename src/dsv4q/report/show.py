"""Plans and verdicts as text for people."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv4q.checkpoint.headers import few
from dsv4q.console import Console, Mode, human_bytes
from dsv4q.host import stoppable
from dsv4q.plan.needs import CUDA_BYTES, GpuUse
from dsv4q.plan.plan import Plan

if TYPE_CHECKING:
    from dsv4q.checkpoint.pin import Pin
    from dsv4q.verify.judge import VerifyResult

_DRAFTS = {
    "none": "no draft",
    "mtp": "a multi-token-prediction block",
    "dspark": "a DSpark draft",
    "unknown": "something under mtp. that is neither MTP nor DSpark",
}

_LAYOUTS = {
    "bf16": "BF16",
    "native": "DeepSeek's own layout, read as the BF16 that it stands for",
    "assumed native": "DeepSeek's own layout, by config.json alone",
    "assumed bf16": "BF16 is assumed, for there are no weights here",
}

SHOWN = 20
"""Differences and problems printed in full; `--json` has all of them."""


def show_plan(plan: Plan, console: Console, gpu_memory: int | None = None, ranks: int = 1) -> None:
    """Counts, shards, needs and problems of a plan. Nothing in json mode: the plan's own object has all of it.

    Args:
        gpu_memory: bytes of a GPU that may be used, if the user has said.
        ranks: each of which has such a GPU.
    """
    if console.mode == Mode.JSON:
        return
    facts = plan.as_dict()
    source, artifact, needs = facts["source"], facts["artifact"], facts["needs"]
    console.table(
        "Tensors",
        ["class", "source tensors", "source bytes", "artifact tensors", "artifact bytes"],
        [
            [name, f"{here['tensors']:,}", human_bytes(here["bytes"]), *_there(artifact["classes"].get(name))]
            for name, here in source["classes"].items()
        ],
    )
    console.table(
        "Shards",
        ["file", "tensors", "bytes", "blocks"],
        [[s["file"], f"{s['tensors']:,}", human_bytes(s["bytes"]), _span(s["blocks"])] for s in artifact["shards"]],
    )
    console.print(
        f"source     {source['tensors']:,} tensors, {human_bytes(source['bytes'])}; {_LAYOUTS[source['layout']]}"
        + (f" ({_forms(source['forms'])})" if "native" in source["layout"] else "")
    )
    console.print(f"release    {_release(source)}")
    console.print(
        f"artifact   {artifact['tensors']:,} tensors, {human_bytes(artifact['bytes'])}, "
        f"in {len(artifact['shards'])} shards"
    )
    console.print(
        f"draft      {_DRAFTS[source['draft']]} in the source; {artifact['mtp_tensors']:,} mtp.* tensors "
        f"({human_bytes(artifact['mtp_bytes'])}) in the artifact{_form(artifact['draft'])}"
    )
    free = needs["free_disk_bytes"]
    console.print(
        f"needs      host memory {human_bytes(needs['host_bytes'])}, GPU memory {human_bytes(needs['gpu_bytes'])} "
        f"(if one is used; {human_bytes(needs['least_gpu_bytes'])} do), disk {human_bytes(needs['disk_bytes'])}"
        + ("" if free is None else f" ({human_bytes(free)} free here)")
    )
    if gpu_memory is not None:
        use = plan.estimate.on_gpu(gpu_memory - CUDA_BYTES, ranks)
        console.print(f"GPU        of {human_bytes(gpu_memory)}: {_gpu_use(use, plan)}")
    streams = (
        f"; residual streams {human_bytes(needs['streams_bytes'])}, "
        f"kept on the GPU if it has the room, else {needs['streams_elsewhere']}"
    )
    console.print(
        f"data       {needs['calibration_tokens']:,} calibration tokens{streams if needs['streams_bytes'] else ''}"
    )
    for warning in plan.warnings:
        console.warn(warning)
    if not plan.problems:
        console.print("problems   none")
    for problem in plan.problems[:SHOWN]:
        console.error(problem)
    if len(plan.problems) > SHOWN:
        console.warn(f"{len(plan.problems) - SHOWN} more problems; --json lists them all")


def _gpu_use(use: GpuUse | None, plan: Plan) -> str:
    """What a run does with a GPU."""
    if use is None:
        return f"too small; {human_bytes(plan.estimate.gpu_least + CUDA_BYTES)} would do"
    whole = use.experts == plan.dims.experts
    parts = ["every block is loaded while the one before is worked on"]
    if use.memories == 1 and not (whole and plan.experts_packed):
        parts = ["every block is loaded while the one before is encoded"]
    if plan.experts_packed:
        parts.append(f"{'all' if whole else use.experts} experts at a time are decoded from their packed form")
    if plan.estimate.streams:
        parts.append(f"residual streams {'stay there' if use.keeps_streams else plan.estimate.streams_elsewhere}")
    return f"{human_bytes(use.nbytes + CUDA_BYTES)} used; " + ", ".join(parts)


def show_ranks(shares: Sequence[Mapping[str, Any]], console: Console) -> None:
    """What each of several ranks reads, computes and writes."""
    console.table(
        "Ranks",
        ["rank", "reads", "micro-batches", "encodes linears", "writes"],
        [
            [str(s["rank"]), human_bytes(s["read_bytes"]), str(s["micro_batches"]), f"{s['encoded_linears']:,}",
             human_bytes(s["write_bytes"])]
            for s in shares
        ],
    )  # fmt: skip


def _release(source: Mapping[str, Any]) -> str:
    """Which release the source is, and what is missing or extra."""
    release, model = source["release"], source["model"]
    as_bf16 = f"as a BF16 model {model['tensors']:,} tensors, {human_bytes(model['bytes'])}"
    if release is None:
        return f"none that is known; {as_bf16}"
    if release["complete"] is None:
        whole = f"{release['tensors']:,} tensors, {human_bytes(release['bytes'])} as released"
        return f"{release['name']}, by config.json alone; {whole}, {as_bf16}"
    faults = [
        f"{release[kind]:,} tensors {word} ({few(release[f'{kind}_names'])})"
        for kind, word in (("missing", "missing"), ("extra", "too many"))
        if release[kind]
    ]
    wrong = "; ".join(faults) or "tensors of other sizes"
    return f"{release['name']}, {'complete' if release['complete'] else wrong}; {as_bf16}"


def _form(draft: Mapping[str, Any]) -> str:
    """In which form the draft is in the artifact, and how it is served."""
    served = draft["speculative_config"]
    if served is None:
        return ""
    stored = f"experts {draft['experts']}, linears {draft['linears']}"
    return f": {stored}; served with method {served['method']}, {served['num_speculative_tokens']} tokens"


def _forms(forms: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {form}" for form, count in forms.items())


def _there(entry: dict[str, int] | None) -> list[str]:
    return ["-", "-"] if entry is None else [f"{entry['tensors']:,}", human_bytes(entry["bytes"])]


def _span(blocks: list[str]) -> str:
    return blocks[0] if len(blocks) == 1 else f"{blocks[0]} … {blocks[-1]}"


@contextmanager
def verifying(console: Console, artifact: Path, *, reads: bool) -> Iterator[Callable[[str, int, int], None]]:
    """Progress of a verification: call with a label, bytes done and bytes in all.

    Args:
        reads: the data is read, not only headers.
    """
    nbytes = sum(p.stat().st_size for p in artifact.glob("*.safetensors")) if reads and artifact.is_dir() else 0
    with stoppable(still_beginning=True) as check_stop, console.progress("verifying", nbytes) as bar:

        def progress(label: str, now: int, total: int) -> None:
            check_stop()
            bar.total = total
            bar.describe(label)
            bar.advance(now - bar.done)

        yield progress


def show_verification(result: VerifyResult, console: Console, pin: Pin | None = None) -> None:
    """What was examined, every difference up to `SHOWN`, and the verdict; with `pin` the source that it was held to."""
    console.table("Checks", ["check", "examined"], [[name, f"{n:,}"] for name, n in result.checks.items()])
    for role, errors in result.errors.items():
        console.print(f"{role}: {exactness(errors)}{_inexactness(errors)}")
    in_all = result.exactness()
    if in_all is not None:
        console.print(f"in all: {exactness(in_all)}")
    for note in result.notes:
        console.print(note)
    show_differences([difference.as_dict() for difference in result.differences], console)
    kind = {"plain": "BF16 checkpoint, ", "modelopt": "ModelOpt's layout, "}.get(result.kind, "")
    verdict = "as it must be" if result.ok else f"{len(result.differences):,} difference(s)"
    console.print(
        f"{result.artifact}: {kind}{result.tensors:,} tensors, {result.mtp_tensors} of them mtp.*, "
        f"in {result.shards} shards, {human_bytes(result.bytes)}: {verdict}{_speed(result)}"
        + ("" if pin is None else f"; against {pin.text()}")
    )


def _speed(result: VerifyResult) -> str:
    if not result.bytes_read:
        return ""
    return f"; {human_bytes(result.bytes_read)} read at {result.bytes_read / result.seconds / 1e9:.2f} GB/s"


def show_differences(differences: Sequence[Mapping[str, str | None]], console: Console) -> None:
    """Place, expectation and finding of each, up to `SHOWN`."""
    for one in differences[:SHOWN]:
        place = " in ".join(part for part in (one["tensor"], one["file"]) if part)
        console.print(f"DIFFERENCE {one['check']}: {place}")
        console.print(f"  expected: {one['expected']}")
        console.print(f"  found: {one['found']}")
    if len(differences) > SHOWN:
        console.print(f"… and {len(differences) - SHOWN:,} more; --json lists them all")


def exactness(errors: Mapping[str, Any]) -> str:
    """Of one class of tensors, or of several together."""
    return f"{errors['exact']:,} of {errors['tensors']:,} tensors exact, max abs error {errors['max_abs_error']:.4g}"


def _inexactness(errors: Mapping[str, Any]) -> str:
    if errors["exact"] == errors["tensors"]:
        return ""
    could = errors.get("could_be_exact")
    more = f"; {could:,} more could be under other scales" if could else ""
    sqnr = errors["min_sqnr_db"]
    return more + (
        f"; relative error {errors['mean_relative_error']:.4g} on average, at most {errors['max_relative_error']:.4g} "
        f"({errors['worst']})" + ("" if sqnr is None else f", SQNR at least {sqnr:.1f} dB")
    )
