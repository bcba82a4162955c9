"""README.md of an artifact in ModelOpt's layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from dsv4q.checkpoint.shards import ShardPlan
from dsv4q.plan.modelcard import source_license

_CARD = """\
---
{front}---

# DeepSeek-V4, NVFP4 in ModelOpt's layout

DeepSeek-V4 quantized with dsv4q and exported to the layout of NVIDIA ModelOpt, which SGLang and TensorRT-LLM read, and
vLLM too.

| part | stored as |
|---|---|
| routed experts of the main layers | NVFP4 (E2M1 values, one FP8 E4M3 scale per 16, two F32 scalars per linear) |
| everything else{draft} | as in the native release: FP8 and MXFP4 with their scales, BF16, F32 |

{tensors:,} tensors in {shards} safetensors shards, {gigabytes:.2f} GB. `report.json` has what was done.

## License

{license}
"""


def modelopt_card(plan: ShardPlan, source: Path) -> str:
    """The text; the same for every export of the same artifact."""
    identifier, text = source_license(source)
    front: dict[str, Any] = {"license": identifier or "other"}
    front["tags"] = ["deepseek_v4", "modelopt", "nvfp4", "dsv4q"]
    return _CARD.format(
        front=yaml.safe_dump(front, sort_keys=False),
        draft=", the draft too" if any(t.spec.is_mtp for t in plan.tensors) else "",
        tensors=len(plan.tensors),
        shards=len(plan.shards),
        gigabytes=plan.artifact_bytes / 1e9,
        license=text,
    )
