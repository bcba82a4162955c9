"""One vLLM engine for served.py: reads texts, answers prompts, says what its counters say. Nothing of dsv4q is needed.

    python scripts/served_engine.py < JOB.json

It imports vLLM, then reads its job, one line of JSON: so it can be started before it is needed; without a line it ends.
A job has `result` (the file to write), `model`, `speculation` (vLLM's speculative config or null), `tensor_parallel`,
`eager`, `gpu_memory` (a share), `cache_memory` (bytes or null: what the share leaves), `texts` and `prompts` (lists of
token ids), `answer_tokens` and `at_once`. One engine a process: vLLM gives a GPU's memory back at its end.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

COUNTERS = "vllm:spec_decode_num_"
TIMES = 5
"""How often the prompts are answered after the first call: the fastest time counts, the first answers."""


def engine(job: dict[str, Any]) -> Any:
    """vllm.LLM for a job: greedy, by token ids, no prefix cache, so that every prompt is computed."""
    from vllm import LLM

    longest = max(map(len, [*job["texts"], *job["prompts"]])) + job["answer_tokens"] + 1
    drafts = {} if job["speculation"] is None else {"speculative_config": job["speculation"]}
    return LLM(
        model=job["model"],
        skip_tokenizer_init=True,
        kv_cache_dtype="fp8",
        tensor_parallel_size=job["tensor_parallel"],
        enforce_eager=job["eager"],
        max_model_len=longest,
        max_num_seqs=job["at_once"],
        max_num_batched_tokens=max(2048, longest),
        gpu_memory_utilization=job["gpu_memory"],
        kv_cache_memory_bytes=job["cache_memory"],
        enable_prefix_caching=False,
        disable_log_stats=False,
        seed=0,
        **drafts,
    )


def counters(llm: Any) -> dict[str, Any]:
    """vLLM's counters of speculative decoding so far, without their common prefix."""
    found = {}
    for metric in llm.get_metrics():
        if metric.name.startswith(COUNTERS):
            value = metric.value if hasattr(metric, "value") else list(metric.values)
            found[metric.name.removeprefix(COUNTERS)] = value
    return found


def less(now: Any, before: Any) -> Any:
    """What was counted since."""
    if isinstance(now, list):
        return [a - b for a, b in zip(now, before or [0] * len(now), strict=True)]
    return now - (before or 0)


def answered(llm: Any, prompts: list[Any], params: Any) -> dict[str, Any]:
    """Answers, what became of the draft's tokens, and the time that all took together."""
    before, begin = counters(llm), time.perf_counter()
    outputs = [output.outputs[0] for output in llm.generate(prompts, params, use_tqdm=False)]
    seconds = time.perf_counter() - begin
    return {
        "seconds": seconds,
        "tokens": sum(len(output.token_ids) for output in outputs),
        "answers": [list(output.token_ids) for output in outputs],
        "cut_off": sum(output.finish_reason == "length" for output in outputs),
        "counters": {name: less(value, before.get(name)) for name, value in counters(llm).items()},
    }


def answer(llm: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Greedy answers, what became of the draft's tokens, and the best speed. The first call, uncounted, compiles."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=job["answer_tokens"], detokenize=False)
    prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
    llm.generate(prompts, params, use_tqdm=False)
    rounds = [answered(llm, prompts, params) for _ in range(TIMES)]
    best = min(rounds, key=lambda one: one["seconds"])
    speed = {"seconds": best["seconds"], "tokens": best["tokens"], "every_time": [one["seconds"] for one in rounds]}
    return rounds[0] | speed


def read(llm: Any, texts: list[list[int]]) -> dict[str, Any]:
    """Mean negative log-likelihood of tokens 1, 2, … of each text, in nats."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=1, detokenize=False, prompt_logprobs=0)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in texts], params, use_tqdm=False)
    logs = [
        at[token].logprob
        for ids, output in zip(texts, outputs, strict=True)
        for token, at in zip(ids[1:], output.prompt_logprobs[1:], strict=True)
    ]
    return {"nll": -sum(logs) / len(logs), "read_tokens": len(logs)}


def main() -> None:
    import vllm  # before torch: it sets variables that torch reads
    from vllm import LLM, SamplingParams  # noqa: F401 - vllm itself imports next to nothing before these are asked for

    # isort: split
    import torch

    line = sys.stdin.readline()
    if not line:
        return
    job = json.loads(line)
    begin = time.perf_counter()
    llm = engine(job)
    found = {"vllm": vllm.__version__, "torch": torch.__version__, "gpu": torch.cuda.get_device_name(0)}
    found["start_seconds"] = time.perf_counter() - begin
    if job["texts"]:
        found |= read(llm, job["texts"])
    if job["prompts"]:
        found |= answer(llm, job)
    Path(job["result"]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
