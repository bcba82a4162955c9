"""What served.py starts in place of Python with vLLM: writes a result as served_engine.py does, without an engine.

    python tests/vllm_stand_in.py ENGINE < JOB.json

The figures are functions of the job, so that a test knows them. A folder with a file `broken` fails;
of one with a file `wavers` a draft changes the first answer.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

line = "" if sys.argv[1] == "-c" else sys.stdin.readline()  # asked whether there is a vLLM
if not line:
    sys.exit()
job = json.loads(line)
if (Path(job["model"]) / "broken").is_file():
    sys.exit("no kernel for this")
tokens = 0 if job["speculation"] is None else job["speculation"]["num_speculative_tokens"]
drafts = 100 * bool(tokens)
found = {
    "vllm": "0.33.0",
    "torch": "2",
    "gpu": f"a stand-in of {job['tensor_parallel']}",
    "tokens": 1000,
    "seconds": 2.0 - 0.5 * tokens,
    "answers": [[*prompt[-1:], tokens and 0] for prompt in job["prompts"]],
    "counters": {"drafts": drafts, "draft_tokens": drafts * tokens, "accepted_tokens": drafts * tokens * 0.75},
}
if tokens and (Path(job["model"]) / "wavers").is_file():
    found["answers"][0].append(tokens)
if job["texts"]:
    found |= {"nll": sum(map(sum, job["texts"])) / 1e6, "read_tokens": sum(map(len, job["texts"]))}
Path(job["result"]).write_text(json.dumps(found))
