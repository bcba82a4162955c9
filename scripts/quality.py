"""What each config does to a model and to its draft: quantizes checkpoints with all of them, and compares.

    python scripts/quality.py WORK [--models models/tiny,MORE] [--answers 32] [--device cpu]

For each model and config: `dsv4q quantize`, then `dsv4q eval` of the artifact against the model on its held-out text,
three times: with the inputs rounded that kernels round on SM 10.0 and later, those on SM 9.0, and none, which leaves
what is due to the weights. With the first go greedy answers, and the drafts accepted on them. Then min/max against
exact, paired, and the exact config with wider ranges of the activations. Prints Markdown, all of docs/quality.md's
tables, and writes it to WORK/quality.md, with all numbers in WORK/quality.json. WORK keeps the artifacts; a second call
takes them up.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

os.environ["LLM_COMPRESSOR_LOG_DISABLED"] = "true"  # it logs to stdout from its import on

from dsv4q.checkpoint.native import open_source
from dsv4q.config import Activations, Config, load_config
from dsv4q.console import Console, Mode
from dsv4q.errors import Dsv4qError
from dsv4q.evaluate import EvaluationRequest, evaluate
from dsv4q.evaluation.answers import AnswersRequest
from dsv4q.evaluation.data import DEFAULTS, DataRequest
from dsv4q.evaluation.metrics import estimate
from dsv4q.evaluation.rounding import Emulation
from dsv4q.quantize import Job as QuantizeJob
from dsv4q.quantize import quantize
from dsv4q.verify.schemes import NVFP4

ROOT = Path(__file__).parent.parent
CONFIGS = {"exact": "nvfp4-fp8-mtp", "min/max": "nvfp4-fp8-mtp-minmax", "W4A16": "w4a16-fp8-mtp"}
"""Column of the table -> shipped config."""
PAIR = ("min/max", "exact")
"""Artifact and reference of the comparison of two artifacts."""
RANGES = {
    "headroom 1": Activations(),
    "headroom 2": Activations(headroom=2.0),
    "headroom 4": Activations(headroom=4.0),
    "bound": Activations(scales="bound"),
}
"""Column of the table -> `activations` of the exact config; the first one is what the others are compared with."""
SHARDS = 4
QUIET = Console(Mode.QUIET)
Found = Mapping[str, Any]


# ------------------------------------------------------------------------------------------------ running


def sized(name: str, options: argparse.Namespace, activations: Activations | None = None) -> Config:
    """A shipped config that calibrates on the checkpoint's own conversations, with few shards."""
    config = load_config(ROOT / "src" / "dsv4q" / "configs" / f"{name}.yaml")
    changes: dict[str, Any] = {"output": config.output.model_copy(update={"shards": SHARDS})}
    if config.calibration is not None:
        local = {
            "dataset": "chat_samples.jsonl",
            "split": None,
            "samples": options.calibrate,
            "max_length": options.calibrate_length,
        }
        changes["calibration"] = config.calibration.model_copy(update=local)
    if activations is not None:
        changes["activations"] = activations
    return config.model_copy(update=changes)


def measure(source: Path, work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Everything that the tables of one model show, and the whole results of all evaluations."""
    # Named, because an artifact has no held-out text of its own to be found.
    text = options.data or next((source / name for name in DEFAULTS if (source / name).is_file()), None)
    data = DataRequest(text, options.samples, options.length, options.micro_batch)

    def made(artifact: Path, config: Config) -> dict[str, Any]:
        say(f"quantize {source.name} to {artifact.name}")
        return quantize(QuantizeJob(source, artifact, config, device=options.device), QUIET)

    def judged(artifact: Path, reference: Path = source, **how: Any) -> dict[str, Any]:
        say(f"eval {artifact.name} against {reference.name}, {how.get('activations', Emulation.KERNELS)}")
        return evaluate(EvaluationRequest(artifact, reference, data, options.device, **how), QUIET)

    columns: dict[str, Any] = {}
    for label, name in CONFIGS.items():
        artifact = work / name
        report = made(artifact, sized(name, options))
        served = judged(artifact, answers=AnswersRequest(options.answers, options.answer_tokens))
        # Where no input of an NVFP4 linear is rounded there is nothing to leave out.
        weight_only = served if NVFP4 not in served["rounded_inputs"] else None
        columns[label] = {
            "config": name,
            "bytes": report["artifact"]["bytes"],
            "errors": report["errors"],
            "eval": served,
            "sm90": weight_only or judged(artifact, activations=Emulation.WEIGHT_ONLY_NVFP4),
            "weights_alone": judged(artifact, activations=Emulation.NONE),
        }
    pair = judged(*(work / CONFIGS[label] for label in PAIR))
    ranges: dict[str, Any] = {}
    for label, activations in RANGES.items():
        config = sized(CONFIGS["exact"], options, activations)
        if config == sized(CONFIGS["exact"], options):
            ranges[label] = columns["exact"]["eval"]
            continue
        artifact = work / f"{CONFIGS['exact']}-{label.replace(' ', '-')}"
        made(artifact, config)
        ranges[label] = judged(artifact)
    with open_source(source) as checkpoint:
        size = sum(entry.nbytes for entry in checkpoint.tensors.values())
    return {"source_bytes": size, "columns": columns, "pair": pair, "ranges": ranges}


def say(text: str) -> None:
    print(f"{datetime.now(UTC):%H:%M:%S} {text}", file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------------ two results, paired


def paired(one: Found, other: Found, sums: Callable[[Found], Sequence[Sequence[float]]], how: str) -> Found:
    """A difference of two artifacts that were compared with one reference on one text, sample by sample.

    Args:
        sums: what each sample of a result adds to a numerator and a denominator.
        how: `difference` of the two quotients, or exp of it (`ratio`).
    """
    assert one["data"]["digest"] == other["data"]["digest"], "two texts"
    columns = torch.tensor([[*a, *b] for a, b in zip(sums(one), sums(other), strict=True)], dtype=torch.float64)

    def change(s: torch.Tensor) -> torch.Tensor:
        found = s[..., 0] / s[..., 1] - s[..., 2] / s[..., 3]
        return torch.exp(found) if how == "ratio" else found

    return estimate(columns, change).as_dict()


def of_samples(key: str) -> Callable[[Found], list[tuple[float, float]]]:
    """`kl_divergence` or `top1_agreement`, over all tokens; `nll` of the artifact, over those that are predicted."""

    def sums(result: Found) -> list[tuple[float, float]]:
        samples = result["per_sample"]
        if key == "nll":
            return [(a, n - 1) for a, n in zip(samples["nll"]["artifact"], samples["tokens"], strict=True)]
        return list(zip(samples[key], samples["tokens"], strict=True))

    return sums


def of_drafts(step: int) -> Callable[[Found], list[tuple[float, float]]]:
    """Accepted and judged proposals of a step."""
    at = 2 * (step - 1)
    return lambda result: [(row[at + 1], row[at]) for row in result["per_sample"]["drafts"].get("artifact", [[0] * 6])]


# ------------------------------------------------------------------------------------------------ cells


@dataclass(frozen=True)
class Measure:
    """A row: something of a result, as it is written."""

    name: str
    of: Callable[[Found], Found | None]
    """None: an empty cell."""
    form: str
    factor: float = 1.0
    nothing: float | None = None
    """The value, before `factor`, that means "no difference"; None: this is no difference."""

    def cell(self, result: Found) -> str:
        found = self.of(result)
        if found is None:
            return ""
        scaled = {key: None if value is None else value * self.factor for key, value in found.items()}
        return spread(scaled, self.form, None if self.nothing is None else self.nothing * self.factor)

    def tokens(self, result: Found, seen: int | None = None) -> str:
        """`12,000`: on how many tokens a difference of this size is significant, if they are such as those seen."""
        assert self.nothing is not None
        found = self.of(result)
        if found is None:
            return ""
        needed = tokens_needed(found, self.nothing, result["data"]["tokens"] if seen is None else seen)
        return "–" if needed is None else f"{needed:,}"


def tokens_needed(found: Found, nothing: float, tokens: int) -> int | None:
    """Tokens at which the interval of a difference would end at `nothing`: its width goes with 1 / sqrt(tokens)."""
    value, low, high = found["value"], found["low"], found["high"]
    if value is None or low is None or value == nothing:
        return None
    half = value - low if value > nothing else high - value
    return int(float(f"{tokens * (half / (value - nothing)) ** 2:.2g}"))


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


def points(name: str, of: Callable[[Found], Found | None]) -> Measure:
    """A difference of two shares, in percentage points."""
    return Measure(f"{name}, points", of, "+.2f", 100.0, 0.0)


NONE = {"value": None, "low": None, "high": None}
"""Of a draft that is not there."""


def changed_acceptance(result: Found, step: str) -> Found:
    return result["acceptance"]["differences"].get("artifact as a whole", {}).get(step, NONE)


def own_acceptance(side: str, step: str) -> Callable[[Found], Found]:
    """Acceptance of a checkpoint's own draft on the given text."""

    def of(result: Found) -> Found:
        (found,) = [p for p in result["acceptance"]["pairs"] if p["main"] == side and p["draft"] == side]
        return found[step]

    return of


def served(side: str, rate: str) -> Callable[[Found], Found]:
    """A rate of a checkpoint's own answers."""
    k, _, name = rate.partition(" ")
    return lambda result: result["answers"][side][k][name]


def against(base: str) -> list[Measure]:
    """What of a result compares the artifact with its reference."""
    return [
        Measure(f"perplexity, of {base}'s", lambda r: r["perplexity"]["ratio"], ".5f", nothing=1.0),
        Measure(f"KL divergence from {base}, 1/1000 nats", lambda r: r["kl_divergence"], ".3f", 1000.0),
        Measure(f"same most likely token as {base}", lambda r: r["top1_agreement"], ".2%"),
        points(f"acceptance, step 1, minus {base}'s", lambda r: changed_acceptance(r, "step_1")),
        points(f"acceptance, step 2, minus {base}'s", lambda r: changed_acceptance(r, "step_2")),
    ]


def against_result(base: str, other: Found) -> list[Measure]:
    """What compares a result with another one of the same reference and text."""

    def of(sums: Callable[[Found], Sequence[Sequence[float]]], how: str) -> Callable[[Found], Found | None]:
        return lambda result: None if result is other else paired(result, other, sums, how)

    return [
        Measure(f"perplexity, of {base}'s", of(of_samples("nll"), "ratio"), ".5f", nothing=1.0),
        Measure(f"KL divergence, minus {base}'s, 1/1000 nats", of(of_samples("kl_divergence"), "difference"),
                "+.3f", 1000.0, 0.0),
        points(f"same most likely token as BF16, minus {base}'s", of(of_samples("top1_agreement"), "difference")),
        points(f"acceptance, step 1, minus {base}'s", of(of_drafts(1), "difference")),
        points(f"acceptance, step 2, minus {base}'s", of(of_drafts(2), "difference")),
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------ tables


def tables(found: Found) -> str:
    """Markdown of one model."""
    parts = [
        served_table(found),
        plain_table("As served on SM 9.0: NVFP4 experts weight-only", found["columns"], "sm90"),
        plain_table("Weights alone: nothing rounds activations", found["columns"], "weights_alone"),
        rows_table(f"{PAIR[0]} against {PAIR[1]}, as served on SM 10.0 and later", {PAIR[0]: found["pair"]},
                   against(PAIR[1])),
        ranges_table(found["ranges"]),
        *answers_table(found["columns"]),
    ]  # fmt: skip
    return "\n\n".join(f"### {title}\n\n{markdown(head, rows)}" for title, head, rows in parts) + "\n"


Table = tuple[str, list[str], list[list[str]]]
"""Title, head, rows."""


def served_table(found: Found) -> Table:
    columns: Mapping[str, Any] = found["columns"]
    base = columns["exact"]["eval"]
    rows = [
        ["size, MB", f"{found['source_bytes'] / 1e6:.2f}", *(f"{c['bytes'] / 1e6:.2f}" for c in columns.values())],
        *(_error_row(role, columns) for role in columns["exact"]["errors"]),
        ["perplexity", spread(base["perplexity"]["reference"], ".4f"),
         *(spread(c["eval"]["perplexity"]["artifact"], ".4f") for c in columns.values())],
        *([f"draft acceptance, {step.replace('_', ' ')}", spread(own_acceptance("reference", step)(base), ".2%"),
           *(spread(own_acceptance("artifact", step)(c["eval"]), ".2%") for c in columns.values())]
          for step in ("step_1", "step_2")),
    ]  # fmt: skip
    title, head, compared = plain_table("As served on SM 10.0 and later", columns, "eval")
    return title, ["", "BF16", *head[1:]], rows + [[name, "", *cells] for name, *cells in compared]


def plain_table(title: str, columns: Found, key: str) -> Table:
    return rows_table(title, {label: column[key] for label, column in columns.items()}, against("BF16"))


def rows_table(title: str, results: Found, measures: Sequence[Measure]) -> Table:
    """Each measure of each result; behind a difference, the tokens that would show it."""
    rows = []
    for one in measures:
        rows.append([one.name, *(one.cell(result) for result in results.values())])
        if one.nothing is not None:
            rows.append(["– significant from, tokens", *(one.tokens(result) for result in results.values())])
    return title, ["", *results], rows


def ranges_table(ranges: Found) -> Table:
    base, other = next(iter(ranges.items()))
    classes = other["clipping"]["classes"]
    rows = [
        [f"{what}, {name}", *(format(r["clipping"]["classes"][name][key], form) for r in ranges.values())]
        for name in classes
        for what, key, form in (
            ("values beyond the range", "clipped_values", ".1e"),
            ("inputs with one", "clipped_inputs", ".1e"),
            ("largest, of the range", "largest", ".3f"),
        )
    ]
    measures = [*against("BF16")[:3], *against_result(base, other)]
    _, head, compared = rows_table("", ranges, measures)
    return "Ranges of the activations (exact), as served on SM 10.0 and later", head, rows + compared


def answers_table(columns: Found) -> Iterator[Table]:
    results = {label: column["eval"] for label, column in columns.items()}
    base = results["exact"]
    if base["answers"] is None:
        return
    rates = {"k_1 acceptance": "k = 1, accepted", "k_2 acceptance": "k = 2, accepted",
             "k_2 position_1": "k = 2, first place", "k_2 position_2": "k = 2, second place"}  # fmt: skip
    rows = [
        ["given text, step 1", spread(own_acceptance("reference", "step_1")(base), ".2%"),
         *(spread(own_acceptance("artifact", "step_1")(r), ".2%") for r in results.values())],
    ]  # fmt: skip
    for rate, name in rates.items():
        cells = (spread(served("artifact", rate)(r), ".2%") for r in results.values())
        rows.append([f"own answers, {name}", spread(served("reference", rate)(base), ".2%"), *cells])
        change = points("", lambda r, rate=rate: r["answers"]["differences"].get(rate, NONE))
        rows.append(["– minus BF16's, points", "", *(change.cell(r) for r in results.values())])
        seen = (r["answers"]["artifact"]["counts"]["tokens"] for r in results.values())
        needed = (change.tokens(r, tokens) for r, tokens in zip(results.values(), seen, strict=True))
        rows.append(["– significant from, tokens of answers", "", *needed])
    counts = (base["answers"]["reference"], *(r["answers"]["artifact"] for r in results.values()))
    rows.append(["tokens of own answers", *(f"{one['counts']['tokens']:,}" for one in counts)])
    length = "k_2 mean_accepted_length"
    rows.append(["own answers, k = 2, accepted length", spread(served("reference", length)(base), ".3f"),
                 *(spread(served("artifact", length)(r), ".3f") for r in results.values())])  # fmt: skip
    asked = len(base["answers"]["prompts"])
    rows.append(["same answers as BF16", "", *(f"{r['answers']['equal']} of {asked}" for r in results.values())])
    title = (
        f"Drafts accepted on each model's own greedy answers ({asked} of at most {base['answers']['tokens']} tokens)"
    )
    yield title, ["", "BF16", *results], rows


def _error_row(role: str, columns: Found) -> list[str]:
    cells = []
    for column in columns.values():
        error = column["errors"][role]
        cells.append(f"{error['relative_error']:.2%}, {error['exact']:,} of {error['tensors']:,} exact")
    return [f"weight error, {role}s", "", *cells]


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def about(found: Found, options: argparse.Namespace) -> str:
    """Where the numbers come from."""
    base = found["columns"]["exact"]["eval"]
    where = torch.cuda.get_device_name() if base["device"].startswith("cuda") else f"{os.cpu_count()} CPU cores"
    data = base["data"]
    return (
        f"{datetime.now(UTC):%Y-%m-%d}, {where}, torch {torch.__version__}; {data['samples']} samples of "
        f"{data['length']} tokens ({data['tokens']:,}) of {Path(data['source']).name}; calibrated on "
        f"{options.calibrate} of {options.calibrate_length}. Brackets: 95 % intervals. Bold: the interval of the "
        'paired difference leaves out 0 (of a ratio: 1). "Significant from": the number of tokens at which the '
        "interval, whose width goes with 1 / sqrt(tokens), would end there."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, metavar="WORK")
    parser.add_argument("--models", default=str(ROOT / "models" / "tiny"), help="folders, with commas between them")
    parser.add_argument("--data", type=Path, help="each model's own held-out text if left out")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--calibrate", type=int, default=64, help="samples of calibration")
    parser.add_argument("--calibrate-length", type=int, default=512)
    parser.add_argument("--answers", type=int, default=32, help="prompts that are answered; 0: none")
    parser.add_argument("--answer-tokens", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    models = [Path(name).resolve() for name in options.models.split(",")]
    if len({model.name for model in models}) < len(models):
        parser.error("--models: two folders of one name")
    found: dict[str, Any] = {}
    text = ""
    try:
        for model in models:
            work = options.work / model.name
            work.mkdir(parents=True, exist_ok=True)
            found[model.name] = measure(model, work, options)
            part = f"## {model.name}\n\n{about(found[model.name], options)}\n\n{tables(found[model.name])}"
            print(part, flush=True)
            text += part + "\n"
            (options.work / "quality.json").write_text(json.dumps(found, indent=1) + "\n")
            (options.work / "quality.md").write_text(text)
    except Dsv4qError as error:
        sys.exit(f"error: {error.text()}")


if __name__ == "__main__":
    main()
