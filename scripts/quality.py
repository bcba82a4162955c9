"""What each config does to a model and to its draft: quantizes one checkpoint with all of them, and compares.

    python scripts/quality.py WORK [--checkpoint models/tiny] [--samples 64] [--length 512] [--device cpu]

For each config: `dsv4q quantize`, then `dsv4q eval` of the artifact against the checkpoint on its held-out text; then
the same of a BF16 copy of the artifact's decoded weights, whose inputs nothing rounds: what is left between the two is
due to the rounding of activations. At last min/max against exact, paired. Prints Markdown and writes it to
WORK/quality.md, with all numbers in WORK/quality.json. WORK keeps the artifacts; a second call takes them up.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from dsv4q.checkpoint.native import open_source
from dsv4q.config import Config, load_config
from dsv4q.console import Console, Mode
from dsv4q.errors import Dsv4qError
from dsv4q.evaluate import EvaluationRequest, evaluate
from dsv4q.evaluation.data import DEFAULTS, DataRequest
from dsv4q.evaluation.side import DRAFT, Side, open_side
from dsv4q.quantize import Job as QuantizeJob
from dsv4q.quantize import quantize

ROOT = Path(__file__).parent.parent
CONFIGS = {"exact": "nvfp4-fp8-mtp", "min/max": "nvfp4-fp8-mtp-minmax", "W4A16": "w4a16-fp8-mtp"}
"""Column of the table -> shipped config."""
PAIR = ("min/max", "exact")
"""Artifact and reference of the comparison of two artifacts."""
SHARDS = 4
QUIET = Console(Mode.QUIET)
Found = Mapping[str, Any]


# ------------------------------------------------------------------------------------------------ running


def sized(config: Config, samples: int, length: int) -> Config:
    """A shipped config that calibrates on the checkpoint's own conversations, with few shards."""
    changes: dict[str, Any] = {"output": config.output.model_copy(update={"shards": SHARDS})}
    if config.calibration is not None:
        local = {"dataset": "chat_samples.jsonl", "split": None, "samples": samples, "max_length": length}
        changes["calibration"] = config.calibration.model_copy(update=local)
    return config.model_copy(update=changes)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Everything that the tables show, and the whole results of all evaluations."""
    source, work = options.checkpoint.resolve(), options.work
    # Named, because an artifact has no held-out text of its own to be found.
    text = options.data or next((source / name for name in DEFAULTS if (source / name).is_file()), None)
    data = DataRequest(text, options.samples, options.length, options.micro_batch)
    found: dict[str, Any] = {}
    for label, name in CONFIGS.items():
        artifact, plain = work / name, work / f"{name}-weights"
        config = sized(
            load_config(ROOT / "src" / "dsv4q" / "configs" / f"{name}.yaml"),
            options.calibrate,
            options.calibrate_length,
        )
        report = quantize(QuantizeJob(source, artifact, config, device=options.device), QUIET)
        write_weights(artifact, plain)
        found[label] = {
            "config": name,
            "bytes": report["artifact"]["bytes"],
            "errors": report["errors"],
            "eval": evaluate(EvaluationRequest(artifact, source, data, options.device), QUIET),
            "weights_alone": evaluate(EvaluationRequest(plain, source, data, options.device), QUIET),
        }
        shutil.rmtree(plain)
    first, second = (work / CONFIGS[label] for label in PAIR)
    pair = evaluate(EvaluationRequest(first, second, data, options.device), QUIET)
    with open_source(source) as checkpoint:
        size = sum(entry.nbytes for entry in checkpoint.tensors.values())
    return {"source_bytes": size, "columns": found, "pair": pair}


def write_weights(artifact: Path, to: Path) -> None:
    """A BF16 checkpoint of the weights that an artifact decodes to, in one shard."""
    shutil.rmtree(to, ignore_errors=True)
    to.mkdir(parents=True)
    side = open_side("artifact", artifact, torch.device("cpu"))
    tensors = dict(_decoded(side))
    save_file(tensors, to / "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors")}
    (to / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {key: value for key, value in side.checkpoint.config.items() if key != "quantization_config"}
    (to / "config.json").write_text(json.dumps(config))
    side.checkpoint.close()


def _decoded(side: Side) -> Iterator[tuple[str, torch.Tensor]]:
    blocks = ["embed", *(f"layers.{i}" for i in range(side.dims.layers)), "head"]
    for block in blocks if side.no_draft else [*blocks, DRAFT]:
        for piece in side.pieces(block):
            for tensor, weight in zip(piece.tensors, piece.decoded(piece.load()), strict=True):
                yield tensor.spec.name, weight.clone()


# ------------------------------------------------------------------------------------------------ the tables


def excludes(found: Found, nothing: float) -> bool:
    """Whether a 95 % interval leaves out the value that means "no difference"."""
    low, high = found["low"], found["high"]
    return low is not None and (low > nothing or high < nothing)


def spread(found: Found, form: str, nothing: float | None = None) -> str:
    """`1.0004 (1.0001 to 1.0006)`, in bold if the interval leaves out `nothing`."""
    if found["value"] is None:
        return "none"
    text = format(found["value"], form)
    if found["low"] is not None:
        text += f" ({found['low']:{form}} to {found['high']:{form}})"
    return f"**{text}**" if nothing is not None and excludes(found, nothing) else text


def points(found: Found) -> str:
    """A difference of two shares in percentage points, in bold if its interval leaves out 0."""
    return spread({key: None if value is None else value * 100 for key, value in found.items()}, "+.2f", 0.0)


def own_acceptance(result: Found, side: str, step: str) -> str:
    """Acceptance of a checkpoint's own draft."""
    pairs = result["acceptance"]["pairs"]
    (found,) = [pair for pair in pairs if pair["main"] == side and pair["draft"] == side]
    return spread(found[step], ".2%")


def changed_acceptance(result: Found, step: str) -> str:
    found = result["acceptance"]["differences"].get("artifact as a whole")
    return "none" if found is None else points(found[step])


QUALITY: dict[str, Callable[[Found], str]] = {
    "perplexity, of BF16's": lambda r: spread(r["perplexity"]["ratio"], ".5f", 1.0),
    "KL divergence from BF16, 1/1000 nats": lambda r: spread(
        {key: None if value is None else value * 1000 for key, value in r["kl_divergence"].items()}, ".3f"
    ),
    "same most likely token as BF16": lambda r: spread(r["top1_agreement"], ".2%"),
    "acceptance, step 1, minus BF16's, points": lambda r: changed_acceptance(r, "step_1"),
    "acceptance, step 2, minus BF16's, points": lambda r: changed_acceptance(r, "step_2"),
}
"""Rows that compare with the reference."""


def tables(found: Found) -> str:
    """Markdown: artifacts as they are served, their weights alone, and two artifacts held against each other."""
    columns: Mapping[str, Any] = found["columns"]
    base = columns["exact"]["eval"]
    served = [
        ["size, MB", f"{found['source_bytes'] / 1e6:.2f}", *(f"{c['bytes'] / 1e6:.2f}" for c in columns.values())],
        *(_error_row(role, columns) for role in columns["exact"]["errors"]),
        ["perplexity", spread(base["perplexity"]["reference"], ".4f"),
         *(spread(c["eval"]["perplexity"]["artifact"], ".4f") for c in columns.values())],
        *([f"draft acceptance, {step.replace('_', ' ')}", own_acceptance(base, "reference", step),
           *(own_acceptance(c["eval"], "artifact", step) for c in columns.values())] for step in ("step_1", "step_2")),
        *([row, "", *(cell(c["eval"]) for c in columns.values())] for row, cell in QUALITY.items()),
    ]  # fmt: skip
    alone = [[row, *(cell(c["weights_alone"]) for c in columns.values())] for row, cell in QUALITY.items()]
    pair = [[row.replace("BF16", PAIR[1]), cell(found["pair"])] for row, cell in QUALITY.items()]
    parts = [
        ("As served: weights and rounded activations", ["", "BF16", *columns], served),
        ("Weights alone: nothing rounds activations", ["", *columns], alone),
        (f"{PAIR[0]} against {PAIR[1]}, as served", ["", PAIR[0]], pair),
    ]
    return "\n\n".join(f"**{title}**\n\n{markdown(head, rows)}" for title, head, rows in parts) + "\n"


def _error_row(role: str, columns: Found) -> list[str]:
    cells = []
    for column in columns.values():
        error = column["errors"][role]
        cells.append(f"{error['relative_error']:.2%}, {error['exact']:,} of {error['tensors']:,} exact")
    return [f"weight error, {role}s", "", *cells]


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, metavar="WORK")
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "models" / "tiny")
    parser.add_argument("--data", type=Path, help="the checkpoint's held-out text if left out")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--calibrate", type=int, default=64, help="samples of calibration")
    parser.add_argument("--calibrate-length", type=int, default=512)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    try:
        found = measure(options)
    except Dsv4qError as error:
        sys.exit(f"error: {error.text()}")
    base = found["columns"]["exact"]["eval"]
    about = (
        f"{datetime.now(UTC):%Y-%m-%d}, {options.device}, {torch.get_num_threads()} threads of {os.cpu_count()} cores, "
        f"torch {torch.__version__}; {base['data']['tokens']:,} tokens of {Path(base['data']['source']).name}. "
        "Brackets: 95 % intervals. Bold: the interval of the paired difference leaves out 0 (of a ratio: 1)."
    )
    text = f"{about}\n\n{tables(found)}"
    (options.work / "quality.json").write_text(json.dumps(found, indent=1) + "\n")
    (options.work / "quality.md").write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main()
