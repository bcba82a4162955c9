"""README.md of an artifact in ModelOpt's layout."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from dsv4q.checkpoint.shards import ShardPlan
from dsv4q.engines.compat import rows_of
from dsv4q.engines.facts import Facts, facts_of
from dsv4q.engines.show import engines_markdown, hardware_markdown, serve_markdown
from dsv4q.layout import DRAFTS, NO_DRAFT
from dsv4q.plan.modelcard import input_scales_text, source_license

_CARD = """\
---
{front}---

# DeepSeek-V4, NVFP4 in ModelOpt's layout

DeepSeek-V4 quantized with dsv4q and exported to the layout of NVIDIA ModelOpt. Which engine loads it, and what is known
from where, is under [Engines](#engines).

| part | stored as |
|---|---|
| routed experts of the main layers | NVFP4 (E2M1 values, one FP8 E4M3 scale per 16, two F32 scalars per linear) |
| everything else{draft} | as in the native release: FP8 and MXFP4 with their scales, BF16, F32 |

{tensors:,} tensors in {shards} safetensors shards, {gigabytes:.2f} GB. `report.json` has what was done.

## Serve

{serve}

{speculation}

## Engines

{engines}

Other versions were not looked at.

## Hardware

{hardware}
{inputs}
## Verify

```
dsv4q verify-shards . --deep --source /path/to/the/release
```

checks every header, scale and byte against the release that this was made from.

## License

{license}
"""


def modelopt_card(plan: ShardPlan, source: Path, facts: Facts, activations: Mapping[str, Any]) -> str:
    """The text; the same for every export of the same artifact.

    Args:
        facts: `export_facts` of it.
        activations: that section of the config that the artifact was made with, if it is known.
    """
    rows = rows_of(facts)
    identifier, text = source_license(source)
    front: dict[str, Any] = {"license": identifier or "other"}
    front["tags"] = ["deepseek_v4", "modelopt", "nvfp4", "dsv4q"]
    return _CARD.format(
        front=yaml.safe_dump(front, sort_keys=False),
        draft=", the draft too" if any(t.spec.is_mtp for t in plan.tensors) else "",
        tensors=len(plan.tensors),
        shards=len(plan.shards),
        gigabytes=plan.artifact_bytes / 1e9,
        serve=serve_markdown(facts, rows),
        speculation=_speculation(facts),
        engines=engines_markdown(rows),
        hardware=hardware_markdown(facts, rows),
        inputs=input_scales_text(activations),
        license=text,
    )


def export_facts(plan: ShardPlan, config: Mapping[str, Any]) -> Facts:
    """What decides which engines load an export.

    Args:
        config: its config.json.
    """
    dtypes = {tensor.name: tensor.dtype for tensor in plan.tensors}
    return facts_of(config, dtypes, plan.artifact_bytes, "config.json")


def _speculation(facts: Facts) -> str:
    """What the draft is."""
    if facts.draft == NO_DRAFT:
        return "This artifact has no draft, so there is no speculative decoding with it."
    return (
        f"The {DRAFTS[facts.draft].label} draft `mtp.*` is the release's, byte for byte. The lines above use it for "
        "speculative decoding,\nwhere the engine loads it."
    )
