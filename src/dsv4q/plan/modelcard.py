"""README.md of an artifact: what it is, how to serve it, on which hardware, under which license."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from dsv4q.layout import DRAFTS, MTP, NO_DRAFT
from dsv4q.plan.draft import DraftForm
from dsv4q.plan.plan import Plan
from dsv4q.recipe.schemes import FLOAT, NVFP4, PACKED_INT, Scheme

LICENSE_FILE = re.compile(r"(LICEN[CS]E|COPYING|NOTICE)([._-].*)?", re.IGNORECASE)
"""Names of files that go with the weights wherever they go."""

_FORMAT_TEXT = {
    NVFP4: "NVFP4 (E2M1 values, one FP8 E4M3 scale per 16, one F32 scale per tensor)",
    FLOAT: "FP8 E4M3",
    PACKED_INT: "packed integers",
}

_CARD = """\
---
{front}---

# {title}

DeepSeek-V4 quantized with dsv4q, in the compressed-tensors format that vLLM loads
as it is.

| part | stored as |
|---|---|
{rows}

{tensors:,} tensors in {shards} safetensors shards, {gigabytes:.2f} GB. `report.json` has what the run did,
`recipe.yaml` the llmcompressor recipe.

## Serve

```
{serve}
```

{draft}

## Hardware

{hardware}

About {size:.0f} GB of weights: {gpus}. No environment variables and no patches are needed with vLLM 0.33.0.

## Verify

```
dsv4q verify-shards . --deep --source /path/to/the/source
```

checks every header, scale and byte against the checkpoint that this was made from.

## Source

{source}.

Of `config.json` and the index the bytes of the files, of the tensors lines of name, dtype and shape.

## License

{license}
"""


def model_card(plan: Plan, source: Path) -> str:
    """The text; the same for every run of the same plan."""
    size = plan.artifact_bytes / 1e9
    gpus, memory = _gpus(size)
    identifier, text = source_license(source)
    front: dict[str, Any] = {"license": identifier or "other", "library_name": "vllm"}
    front["tags"] = ["deepseek_v4", "compressed-tensors", "dsv4q"]
    return _CARD.format(
        front=yaml.safe_dump(front, sort_keys=False),
        title=f"DeepSeek-V4, {_title(plan)}",
        rows="\n".join(f"| {part} | {form} |" for part, form in _parts(plan)),
        tensors=len(plan.tensors),
        shards=len(plan.shards),
        gigabytes=size,
        serve=serve_command(plan.draft_form, gpus),
        draft=_draft(plan.draft_form),
        hardware=_hardware(plan),
        size=size,
        gpus=f"{gpus} GPUs of {memory} GB or more" if size > 100 else "any GPU that holds them",
        license=text,
        source=plan.pin.text(),
    )


def _gpus(gigabytes: float) -> tuple[int, int]:
    """How many GPUs of which size hold so many bytes of weights, and the cache beside them."""
    return (4, 80) if gigabytes < 260 else (8, 180)


def _draft(form: DraftForm) -> str:
    """What the draft is, and how it is served."""
    if form.kind == NO_DRAFT:
        return "This artifact has no multi-token-prediction block, so there is no speculative decoding with it."
    quantized = [name for name, how in (("routed experts", form.experts), ("linears", form.linears)) if how != "bf16"]
    how = f"but for its quantized {' and '.join(quantized)} the source's, byte for byte" if quantized else ""
    if form.kind == MTP:
        how = how or "the source's, byte for byte and unquantized"
        return f"The multi-token-prediction block `mtp.*` is {how}; vLLM uses it for speculative decoding."
    how = how or "the source's, byte for byte and unquantized"
    return (
        f"The DSpark draft `mtp.*` is {how}; vLLM uses it for speculative decoding with the method `{form.kind}`, "
        f"{form.tokens} tokens\nat a time, and loads it with no other method. The V2 model runner, vLLM's default, is "
        "required."
    )


def serve_command(form: DraftForm, gpus: int = 4) -> str:
    """The `vllm serve` command for an artifact with a draft of this form."""
    lines = [f"vllm serve ARTIFACT --tensor-parallel-size {gpus} --kv-cache-dtype fp8 --max-model-len 65536"]
    if form.speculation is not None:
        lines.append(f"--speculative-config '{json.dumps(form.speculation, separators=(',', ':'))}'")
    lines.append("--tokenizer-mode deepseek_v4 --reasoning-parser deepseek_v4 --tool-call-parser deepseek_v4")
    lines.append("--enable-auto-tool-choice --trust-remote-code")
    return " \\\n  ".join(lines)


def _scheme_text(scheme: Scheme) -> str:
    weights = scheme.weights
    text = _FORMAT_TEXT.get(scheme.compression_format, scheme.compression_format)
    if weights.block_structure:
        text += ", blocks of " + "x".join(map(str, weights.block_structure))
    elif weights.group_size and scheme.compression_format != NVFP4:
        text = f"{weights.type.upper()}{weights.num_bits}, groups of {weights.group_size}, {text}"
    return text


def _parts(plan: Plan) -> list[tuple[str, str]]:
    roles: dict[str, str] = {}
    for spec in plan.source_specs:
        if spec.module in plan.group_of:
            part = f"{'draft, ' if spec.is_mtp else ''}{spec.role}s"
            roles.setdefault(part, _scheme_text(plan.config.groups[plan.group_of[spec.module]]))
    parts = list(roles.items())
    form = plan.draft_form
    if form.kind != NO_DRAFT:
        rest = ", the rest" if any(part.startswith("draft, ") for part in roles) else ""
        name = "MTP block" if form.kind == MTP else f"{DRAFTS[form.kind].label} draft"
        parts.append((f"{name}{rest}", "as the source has it"))
    return [*parts, ("everything else", "as the source has it")]


def _title(plan: Plan) -> str:
    names = {NVFP4: "NVFP4"}
    forms = [
        names.get(s.compression_format, f"{'FP' if s.weights.type == 'float' else 'INT'}{s.weights.num_bits}")
        for s in plan.config.groups.values()
    ]
    return " and ".join(dict.fromkeys(forms))


def _hardware(plan: Plan) -> str:
    if any(s.compression_format == NVFP4 for s in plan.config.groups.values()):
        return (
            "Native FP4 tensor cores need SM 10.x (B200, B300) or 12.x (RTX PRO 6000, DGX Spark). On SM 9.0\n"
            "(H100, H200) the experts run weight-only: FP4 storage, BF16 arithmetic."
        )
    return "The experts run weight-only: small storage, BF16 arithmetic. Any GPU that vLLM's Marlin kernels support."


def source_license(source: Path) -> tuple[str | None, str]:
    """License of the source: identifier from its model card, if it has one, and a sentence for ours."""
    card, identifier = source / "README.md", None
    if card.is_file():
        match = re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
        try:
            front = yaml.safe_load(match.group(1)) if match else None
        except yaml.YAMLError:
            front = None  # somebody else's card; the license file below still counts
        if isinstance(front, dict) and isinstance(front.get("license"), str):
            identifier = front["license"]
    files = [p.name for p in sorted(source.iterdir()) if p.is_file() and LICENSE_FILE.fullmatch(p.name)]
    files = [name for name in files if not name.upper().startswith("NOTICE")]
    if files:
        first = (source / files[0]).read_text(encoding="utf-8", errors="replace").strip().splitlines()
        if identifier is None and first and first[0].strip().lower() == "mit license":
            identifier = "mit"
        return identifier, f"That of the source: see [{files[0]}]({files[0]})."
    if identifier:
        return identifier, f"That of the source: {identifier}."
    return None, "That of the source, which came without a license file."
