"""README.md of an artifact: what it is, how to serve it, on which hardware, under which license."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from dsv4q.engines.compat import rows_of
from dsv4q.engines.facts import Facts, facts_of
from dsv4q.engines.show import engines_markdown, hardware_markdown, serve_markdown
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
as it is. Which engine loads it, and what is known from where, is under [Engines](#engines).

| part | stored as |
|---|---|
{rows}

{tensors:,} tensors in {shards} safetensors shards, {gigabytes:.2f} GB. `report.json` has what the run did,
`recipe.yaml` the llmcompressor recipe.

## Serve

{serve}

{draft}

## Engines

{engines}

Other versions were not looked at. No environment variables and no patches are needed where it says yes.

## Hardware

{hardware}

About {size:.0f} GB of weights: {gpus}.
{inputs}
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
    facts = plan_facts(plan)
    rows = rows_of(facts)
    gpus, memory = facts.gpus
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
        serve=serve_markdown(facts, rows),
        draft=_draft(plan.draft_form),
        engines=engines_markdown(rows),
        hardware=hardware_markdown(facts, rows),
        inputs=input_scales_text(vars(plan.config.activations) if plan.config.has_input_scales else {}),
        size=size,
        gpus=f"{gpus} GPUs of {memory} GB or more" if size > 100 else "any GPU that holds them",
        license=text,
        source=plan.pin.text(),
    )


def plan_facts(plan: Plan) -> Facts:
    """What decides which engines load the planned artifact."""
    dtypes = {tensor.name: tensor.dtype for tensor in plan.tensors}
    return facts_of(plan.artifact_config, dtypes, plan.artifact_bytes, plan.source)


_INPUT_SCALES = {
    "bound": """\
The input scales of the experts are bounds (`activations: bound`): no data was needed for them, and no input is ever
clipped. Into w1 and w3 goes what an RMSNorm gives, at most sqrt(hidden_size) * max|norm weight|; into w2 at most
swiglu_limit^2. A scale above the largest input costs next to nothing, because each 16 values have a scale of their own.
""",
    "observed": """\
The input scales of the experts are the largest inputs that calibration saw{times}. An input beyond them is clipped.
""",
}


def input_scales_text(activations: Mapping[str, Any]) -> str:
    """A section about where input scales come from; nothing where there are none, or that is not known.

    Args:
        activations: that section of the config, as it is or as report.json has it.
    """
    text = _INPUT_SCALES.get(activations.get("scales", ""))
    headroom = activations.get("headroom", 1.0)
    return (
        ""
        if text is None
        else "\n## Input scales\n\n" + text.format(times="" if headroom == 1.0 else f", times {headroom:g}")
    )


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
