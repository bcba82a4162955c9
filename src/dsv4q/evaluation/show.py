"""The result for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dsv4q.console import Console, human_bytes, human_seconds
from dsv4q.evaluation.rounding import Emulation


def show_evaluation(result: Mapping[str, Any], console: Console) -> None:
    """Tables of an evaluation; nothing in json and quiet mode."""
    console.table(
        "Quality",
        ["measure", "value", "95 % from", "to"],
        [
            ["perplexity, reference", *_numbers(result["perplexity"]["reference"])],
            ["perplexity, artifact", *_numbers(result["perplexity"]["artifact"])],
            ["perplexity ratio", *_numbers(result["perplexity"]["ratio"])],
            ["KL divergence, nats per token", *_numbers(result["kl_divergence"])],
            ["same most likely token", *_shares(result["top1_agreement"])],
        ],
    )
    console.table("Residual streams after each block", ["block", "relative error"], _residual(result))
    _show_acceptance(result["acceptance"], console)
    _show_answers(result["answers"], console)
    _show_clipping(result["clipping"]["classes"], console)
    data, memory = result["data"], result["peak_memory"]
    console.print(f"data       {data['samples']} samples of {data['length']} tokens from {data['source']}")
    console.print(f"intervals  {result['intervals']}")
    for side in ("reference", "artifact"):
        console.print(f"{side:<10} {result[side]['form']}, {result[side]['path']}")
    console.print(f"emulated   {_linears(result['emulated']) or 'nothing: weights and inputs are BF16'}")
    if result["emulated"]:
        what = f"{result['activations']}: {Emulation(result['activations']).meaning}"
        console.print(f"rounded    {_linears(result['rounded_inputs']) or 'no input'} ({what})")
    gpu = f", {human_bytes(memory['gpu'])} GPU" if "gpu" in memory else ""
    console.print(f"took       {human_seconds(result['seconds'])}, {human_bytes(memory['host'])} host{gpu}")


def _show_acceptance(acceptance: Mapping[str, Any], console: Console) -> None:
    for side, reason in acceptance["without_draft"].items():
        console.print(f"draft of the {side}: {reason}")
    if len(acceptance["without_draft"]) == 2:
        return
    console.table(
        "MTP draft acceptance",
        ["main model", "draft", "step 1", "step 2", "tokens per step"],
        [
            [pair["main"], pair["draft"], *(_spread(pair[key]) for key in ("step_1", "step_2", "tokens_per_step"))]
            for pair in acceptance["pairs"]
        ],
    )
    for what, found in acceptance["differences"].items():
        changes = ", ".join(f"{key.replace('_', ' ')} {_spread(found[key], '+')}" for key in ("step_1", "step_2"))
        console.print(f"{what}: {changes}")


def _show_answers(answers: Mapping[str, Any] | None, console: Console) -> None:
    if answers is None:
        return
    sides = ("reference", "artifact")
    rates = ("acceptance", "position_1", "position_2", "mean_accepted_length")
    console.table(
        "Draft acceptance as a server counts it, on each model's own greedy answers"
        if answers["source"] == "the text"
        else f"Draft acceptance as a server counts it, on the answers of {answers['source']}",
        ["checkpoint", "k = 1", "k = 2", "position 1", "position 2", "accepted length", "drafts at k = 1"],
        [
            [
                side, _spread(found["k_1"]["acceptance"]),
                *(_spread(found["k_2"][key]) for key in rates),
                f"{found['counts']['drafts_1']:,}",
            ]
            for side, found in ((side, answers[side]) for side in sides)
        ],
    )  # fmt: skip
    for rate, found in answers["differences"].items():
        if rate.endswith(" acceptance"):
            name = rate.removesuffix(" acceptance").replace("_", " = ")
            console.print(f"artifact minus reference, {name}: {_spread(found, '+')}")
    own = ", ".join(f"{answers[side]['own_choice']:.2%} of the {side}" for side in sides)
    tokens = sum(map(len, answers["artifact"]["answers"]))
    console.print(
        f"answers    {len(answers['prompts'])}, {answers['equal']} of them the same tokens from both; "
        f"{tokens:,} tokens of the artifact's; greedy choice of their own model: {own}"
    )


def _show_clipping(classes: Mapping[str, Mapping[str, float]], console: Console) -> None:
    if classes:
        console.table(
            "Activations beyond the calibrated range",
            ["inputs of", "share of values", "inputs with one", "largest / range"],
            [
                [name, f"{found['clipped_values']:.2e}", f"{found['clipped_inputs']:.2e}", f"{found['largest']:.3f}"]
                for name, found in classes.items()
            ],
        )


def _linears(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} linears as {form}" for form, count in counts.items())


def _residual(result: Mapping[str, Any]) -> list[list[str]]:
    return [[error["block"], f"{error['relative_error']:.3%}"] for error in result["residual"]]


def _numbers(found: Mapping[str, float | None]) -> list[str]:
    return ["none" if (x := found[key]) is None else f"{x:.5g}" for key in ("value", "low", "high")]


def _shares(found: Mapping[str, float | None]) -> list[str]:
    return ["none" if (x := found[key]) is None else f"{x:.2%}" for key in ("value", "low", "high")]


def _spread(found: Mapping[str, float | None], sign: str = "") -> str:
    """`0.812 (0.79 to 0.83)`."""
    value, low, high = found["value"], found["low"], found["high"]
    if value is None:
        return "none"
    if low is None or high is None:
        return f"{value:{sign}.4f}"
    return f"{value:{sign}.4f} ({low:{sign}.4f} to {high:{sign}.4f})"
