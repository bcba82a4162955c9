"""Checkpoints served by stock vLLM, beside what `dsv4q eval` said of them offline. Needs a GPU and vLLM.

    python scripts/served.py ARTIFACT... --reference SOURCE [--data FILE] [--samples 64] [--length 512]
        [--answers 64] [--answer-tokens 128] [--at-once 64] [--drafts 0,1,2] [--tensor-parallel 1] [--eager]
        [--gpu-memory 0.8] [--cache-memory BYTES] [--python "COMMAND"] [--json FILE] [--beside FILE]

For SOURCE and each ARTIFACT: the negative log-likelihood of held-out text by vLLM's prompt log-probabilities, greedy
answers and how many are SOURCE's own, tokens/s without a draft and with 1 and 2 tokens drafted at a time, acceptance by
the engine's own counters. Checkpoints may be of any layout that vLLM reads: ours, ModelOpt's, native, BF16.

Texts and prompts are those of `dsv4q eval --answers`: `heldout.jsonl` of SOURCE unless --data names others, each
sample up to the assistant's first turn. `dsv4q eval ARTIFACT --reference SOURCE --answers 64 --save` writes
ARTIFACT/eval.json, from which the offline columns are taken; without it they are absent. --python is the command that
runs Python with vLLM, if that is another environment than the one with dsv4q. --json also has all answers. --beside
adds what an earlier call served to the tables, and does not serve it again. With --cache-memory vLLM takes that much
for keys and values without measuring what is free, so several calls can share a GPU, each with a small --gpu-memory;
their tokens/s are then those of a busy GPU.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench_tables import table
from dsv4q.checkpoint.folder import load_model_config
from dsv4q.console import bytes_of
from dsv4q.engines.compat import table as engines
from dsv4q.engines.compat import widths_without_kernels
from dsv4q.errors import DeviceError, Dsv4qError, SourceError
from dsv4q.evaluation.answers import AnswersRequest, prompts_of
from dsv4q.evaluation.data import DataRequest, load_data, turn_ids
from dsv4q.layout import DSPARK, MTP, Dims

ENGINE = Path(__file__).with_name("served_engine.py")
DRAFTED = (0, 1, 2)
"""Tokens drafted at a time that the tables have columns for."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifacts", type=Path, nargs="*")
    parser.add_argument("--reference", type=Path, required=True)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--answers", type=int, default=64, help="prompts that are answered")
    parser.add_argument("--answer-tokens", type=int, default=128)
    parser.add_argument("--at-once", type=int, default=64, help="requests that the engine works on together")
    parser.add_argument("--drafts", default="0,1,2", help="tokens drafted at a time; 0 is without a draft")
    parser.add_argument("--tensor-parallel", default="1", help="comma list of numbers of GPUs")
    parser.add_argument("--eager", action="store_true", help="without CUDA graphs")
    parser.add_argument("--gpu-memory", type=float, default=0.8, help="share of a GPU for weights and cache")
    parser.add_argument("--cache-memory", type=bytes_of, help="size of the key-value cache, such as 4GB")
    parser.add_argument("--python", default=shlex.quote(sys.executable), help="command that runs Python with vLLM")
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--beside", type=Path, action="append", default=[], help="--json of an earlier call, for one table"
    )
    options = parser.parse_args()
    if options.answers < 1:
        parser.error("--answers takes at least 1: speed and acceptance are those of answers")
    for name in ("drafts", "tensor_parallel"):
        try:
            setattr(options, name, [int(n) for n in getattr(options, name).split(",")])
        except ValueError:
            parser.error(f"--{name.replace('_', '-')} takes numbers with commas between them")
    return options


# ------------------------------------------------------------------------------------------ what vLLM can build


def refuse_unbuildable(folder: Path, config: Mapping[str, Any]) -> None:
    """
    Raises:
        SourceError: a width for which vLLM has no kernel; all of them are named.
    """
    newest = next(engine for engine in engines()["engines"] if engine["name"] == "vLLM")
    wrong = widths_without_kernels(newest, config)
    if wrong:
        raise SourceError(
            f"vLLM {newest['version']} has no kernels for a model of these widths",
            where=folder / "config.json",
            expected=", ".join(f"{key} {words}" for key, words, _ in wrong),
            found=", ".join(f"{key} {value}" for key, _, value in wrong),
            hint="models/tiny is one that it can build, and what `dsv4q toy --for-vllm` makes",
        )


def require_vllm(command: str) -> None:
    """
    Raises:
        DeviceError: the command starts no Python that has vLLM.
    """
    look = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
    try:
        found = subprocess.run([*shlex.split(command), "-c", look], stdout=2).returncode == 0
    except OSError:
        found = False
    if not found:
        raise DeviceError(
            "This starts no Python that has vLLM",
            where=f"--python {shlex.quote(command)}",
            hint="`pip install vllm` into an environment on the GPU machine, and name its Python",
        )


def speculation(config: Mapping[str, Any], folder: Path, tokens: int) -> dict[str, Any] | None:
    """vLLM's speculative config for so many tokens at a time, 0 for none; DSpark proposes its whole block."""
    draft = Dims.from_config(config, folder / "config.json").draft
    if not tokens:
        return None
    if draft.kind == DSPARK:
        return {"method": DSPARK, "num_speculative_tokens": draft.block_size}
    return {"method": MTP, "num_speculative_tokens": tokens}


# ------------------------------------------------------------------------------------------ texts and prompts


def texts_of(options: argparse.Namespace, vocab_size: int) -> list[list[int]]:
    """The samples that `dsv4q eval` reads."""
    wanted = DataRequest(options.data, options.samples, options.length, micro_batch=1)
    data = load_data(wanted, options.reference, options.reference, vocab_size)
    return [row.tolist() for batch in data.batches for row in batch]


def prompts(options: argparse.Namespace, texts: Sequence[Sequence[int]]) -> list[list[int]]:
    """The prompts that `dsv4q eval --answers` takes from these texts."""
    begin, _ = turn_ids(options.reference)
    asked = prompts_of([torch.tensor(texts)], AnswersRequest(options.answers, options.answer_tokens), begin)
    return [answer.prompt.tolist() for answer in asked]


# ------------------------------------------------------------------------------------------ engines


class Engines:
    """Engines one after another, each in a process of its own; the next one imports vLLM while this one works."""

    def __init__(self, command: str) -> None:
        self._command = [*shlex.split(command), str(ENGINE)]
        self._started: list[subprocess.Popen[str]] = []
        self._next: subprocess.Popen[str] | None = None

    def __enter__(self) -> Engines:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._started:  # an engine must not outlive an interrupted table; most have ended
            process.kill()
            process.wait()

    def _start(self) -> subprocess.Popen[str]:
        environment = {"VLLM_LOGGING_LEVEL": "WARNING", **os.environ}
        process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=2, env=environment, text=True)
        self._started.append(process)
        return process

    def serve(self, job: Mapping[str, Any], more: bool) -> dict[str, Any]:
        """What the engine of this job found; `more` says that another job follows.

        Raises:
            subprocess.CalledProcessError: it failed, and has said why on stderr.
        """
        process = self._next or self._start()
        self._next = self._start() if more else None
        with tempfile.TemporaryDirectory() as folder:
            answered = Path(folder) / "result.json"
            process.communicate(json.dumps({**job, "result": str(answered)}) + "\n")
            if process.returncode:
                raise subprocess.CalledProcessError(process.returncode, self._command)
            found: dict[str, Any] = json.loads(answered.read_text())
        return found


def runs(options: argparse.Namespace, before: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Every engine of the table that did not run before; the text is read by the first one of a checkpoint."""
    served = {engine_of(run): "nll" in run for run in before if "checkpoint" in run and "failed" not in run}
    checkpoints = [options.reference, *options.artifacts]
    configs = {folder: load_model_config(folder) for folder in checkpoints}
    for folder, config in configs.items():
        refuse_unbuildable(folder, config)
    every = itertools.product(options.tensor_parallel, checkpoints, options.drafts)
    wanted = [(gpus, folder, tokens) for gpus, folder, tokens in every if (str(folder), gpus, tokens) not in served]
    if wanted:
        require_vllm(options.python)
    texts = texts_of(options, configs[options.reference]["vocab_size"])
    asked = prompts(options, texts)
    have_read = {(name, gpus) for (name, gpus, _), has_read in served.items() if has_read}
    with Engines(options.python) as engines_of_vllm:
        for number, (gpus, folder, tokens) in enumerate(wanted, 1):
            job = {
                "model": str(folder.resolve()),
                "speculation": speculation(configs[folder], folder, tokens),
                "tensor_parallel": gpus,
                "eager": options.eager,
                "gpu_memory": options.gpu_memory,
                "cache_memory": options.cache_memory,
                "texts": [] if (str(folder), gpus) in have_read else texts,
                "prompts": asked,
                "answer_tokens": options.answer_tokens,
                "at_once": options.at_once,
            }
            named = {"checkpoint": str(folder), "gpus": gpus, "drafted": tokens, "speculation": job["speculation"]}
            try:
                yield named | engines_of_vllm.serve(job, more=number < len(wanted))
                have_read.add((str(folder), gpus))
            except subprocess.CalledProcessError as error:
                yield named | {"failed": error.returncode}
    yield {"prompts": asked}


def engine_of(run: Mapping[str, Any]) -> tuple[str, int, int]:
    return run["checkpoint"], run["gpus"], run["drafted"]


# ------------------------------------------------------------------------------------------ the table


def acceptance(run: Mapping[str, Any]) -> float | None:
    """Accepted draft tokens / draft tokens, by the engine's counters."""
    counted = run.get("counters", {})
    drafted = counted.get("draft_tokens", 0)
    return counted["accepted_tokens"] / drafted if drafted else None


def offline(folder: Path) -> dict[str, Any] | None:
    """What `dsv4q eval --save` left beside an artifact."""
    file = folder / "eval.json"
    return json.loads(file.read_text()) if file.is_file() else None


def equal(answers: Sequence[Sequence[int]], others: Sequence[Sequence[int]]) -> str:
    """How many answers to the same prompts are equal, in words."""
    same = sum(a == b for a, b in zip(answers, others, strict=True))
    return f"{same} of {len(answers)}"


def row_of(name: str, of: Sequence[Mapping[str, Any]], reference: Sequence[Mapping[str, Any]]) -> list[object]:
    """One checkpoint on so many GPUs."""
    by_draft = {run["drafted"]: run for run in of if "failed" not in run}
    base = {run["drafted"]: run for run in reference if "failed" not in run}
    first = next((run for run in by_draft.values() if "nll" in run), {})
    # Greedy answers do not depend on the draft but for sums of another order: those of the same number are compared.
    both = min(by_draft.keys() & base.keys(), default=None)
    cells: list[object] = [name, f"{first['nll']:.6f}" if first else "failed"]
    cells.append(None if both is None else equal(by_draft[both]["answers"], base[both]["answers"]))
    for tokens in DRAFTED:
        run = by_draft.get(tokens, {})
        accepted = acceptance(run)
        if tokens:
            cells.append(None if accepted is None else f"{100 * accepted:.2f} %")
        cells.append(round(run["tokens"] / run["seconds"]) if run else None)
    return cells


def wavering(reference: Sequence[Mapping[str, Any]]) -> list[str]:
    """How many of SOURCE's own answers a draft changes, which it should not: the noise in the table's third column."""
    by_draft = {run["drafted"]: run["answers"] for run in reference if "failed" not in run}
    plain = by_draft.pop(0, None)
    if not plain or not by_draft:
        return []
    parts = [f"{equal(answers, plain)} with {tokens} drafted" for tokens, answers in sorted(by_draft.items())]
    return [f"SOURCE's own answers that are as those without a draft: {', '.join(parts)}."]


def show(found: Sequence[Mapping[str, Any]], options: argparse.Namespace) -> str:
    """Markdown: a table for each number of GPUs, SOURCE first, and what was said offline."""
    parts = []
    served = [run for run in found if "checkpoint" in run]
    machine = next((run for run in served if "gpu" in run), {})
    parts.append(
        f"vLLM {machine.get('vllm')}, torch {machine.get('torch')}, {machine.get('gpu')}, "
        f"CUDA graphs {'off' if options.eager else 'on'}; {options.samples} x {options.length} tokens read, "
        f"{options.answers} prompts answered with at most {options.answer_tokens} tokens, {options.at_once} at once."
    )
    head = ["checkpoint", "NLL", "answers as SOURCE's", "tokens/s, no draft", "accepted, 1 drafted", "tokens/s",
            "accepted, 2 drafted", "tokens/s"]  # fmt: skip
    for gpus in sorted({run["gpus"] for run in served}):
        here = [run for run in served if run["gpus"] == gpus]
        reference = [run for run in here if run["checkpoint"] == str(options.reference)]
        names = dict.fromkeys(run["checkpoint"] for run in here)
        rows = [row_of(name, [run for run in here if run["checkpoint"] == name], reference) for name in names]
        parts.append(f"Tensor parallel {gpus}:\n\n{table(head, rows)}")
        parts += wavering(reference)
    rows = offline_rows(options)
    if rows:
        head = ["checkpoint", "NLL", "the text's, step 1", "own answers, 1 drafted", "2 drafted", "activations"]
        parts.append(
            f"Offline, `dsv4q eval`; acceptance on the text and on the model's own answers:\n\n{table(head, rows)}"
        )
    return "\n\n".join(parts)


def offline_rows(options: argparse.Namespace) -> list[list[object]]:
    """What was said of SOURCE and of each artifact that has an eval.json."""
    said = {folder: result for folder in options.artifacts if (result := offline(folder)) is not None}
    rows = [offline_row(folder, "artifact", result) for folder, result in said.items()]
    if said:
        rows.insert(0, offline_row(options.reference, "reference", next(iter(said.values()))))
    return rows


def offline_row(folder: Path, side: str, result: Mapping[str, Any]) -> list[object]:
    pairs = {(pair["main"], pair["draft"]): pair for pair in result["acceptance"]["pairs"]}
    answers = (result.get("answers") or {}).get(side) or {}
    rates = [pairs[side, side].get("step_1"), *(answers.get(k, {}).get("acceptance") for k in ("k_1", "k_2"))]
    shares = [None if rate is None else f"{100 * rate['value']:.2f} %" for rate in rates]
    rounded = result.get("activations") if side == "artifact" else None
    return [str(folder), f"{math.log(result['perplexity'][side]['value']):.6f}", *shares, rounded]


def main() -> None:
    options = parse()
    found: list[dict[str, Any]] = [run for file in options.beside for run in json.loads(file.read_text())["runs"]]
    try:
        for run in runs(options, tuple(found)):
            found.append(run)
            short = {k: v for k, v in run.items() if k not in ("answers", "prompts")}
            print(json.dumps(short), file=sys.stderr, flush=True)
            if options.json:
                options.json.write_text(
                    json.dumps({"options": {k: str(v) for k, v in vars(options).items()}, "runs": found})
                )
    except Dsv4qError as error:
        sys.exit(f"error: {error.text()}")
    print(show(found, options))
    failed = [f"{run['checkpoint']}, {run['drafted']} drafted" for run in found if "failed" in run]
    if failed:
        sys.exit(f"failed: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
