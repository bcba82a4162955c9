"""How the artifact stores the draft: what the config asks for, with the defaults of the kind that the source has.

| kind | experts | linears | form |
|---|---|---|---|
| MTP | bf16, nvfp4 | bf16 | as in the source, by default with copies of the shared head; or NVFP4 experts |
| DSpark | nvfp4, bf16 | bf16 | NVFP4 experts and the rest as in the source; or all of it so |
| DSpark | nvfp4 | fp8 | FP8 attention, shared experts and main_proj too |

No other combination is known to load (`engines/compat.yaml`). Linears are the attention projections, the shared
experts and DSpark's main_proj. A quantized one takes the scheme that the recipe gives its like in the main layers.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dsv4q.config import Config
from dsv4q.engines.facts import MTP_TOKENS
from dsv4q.errors import ConfigError
from dsv4q.layout import DRAFTS, DSPARK, MTP, NO_DRAFT, Dims, Role, TensorSpec
from dsv4q.recipe.schemes import FLOAT, NVFP4, Scheme

_LINEARS = (Role.ATTENTION, Role.SHARED_EXPERT, Role.DRAFT_INPUT)


@dataclass(frozen=True)
class DraftForm:
    """How the artifact stores the draft."""

    kind: str
    """That of the source; `NO_DRAFT` if it is left out."""
    experts: str = "bf16"
    """`bf16` or `nvfp4`."""
    linears: str = "bf16"
    """`bf16` or `fp8`."""
    head_copies: bool = False
    tokens: int = 0
    """That the consumer is to propose at a time."""

    @classmethod
    def of(cls, config: Config, dims: Dims) -> DraftForm:
        """The form that the config asks for, whether it is possible or not (`problems`)."""
        choice, kind = config.draft, dims.draft.kind
        if not choice.keep or kind == NO_DRAFT:
            return cls(NO_DRAFT)
        usual = "nvfp4" if kind == DSPARK and any(map(_is_nvfp4, config.groups.values())) else "bf16"
        copies = choice.shared_head_copies
        return cls(
            kind,
            choice.experts or usual,
            choice.linears,
            DRAFTS[kind].head_copies and copies is not False,
            dims.draft.block_size or MTP_TOKENS,
        )

    @property
    def scale_dtype(self) -> str:
        """Dtype of the scales of FP8 blocks, of the main layers too.

        The consumer holds them as F32. BF16 is the form in which Flash with its MTP as in the source was first made,
        and its bytes stay.
        """
        return "BF16" if self.kind in (NO_DRAFT, MTP) and self.experts == "bf16" else "F32"

    @property
    def speculation(self) -> dict[str, Any] | None:
        """vLLM's --speculative-config. It accepts another method for a DSpark draft too, and dies while loading it."""
        return None if self.kind == NO_DRAFT else {"method": self.kind, "num_speculative_tokens": self.tokens}

    def as_dict(self) -> dict[str, Any]:
        """For `--json` and report.json."""
        return asdict(self) | {"speculative_config": self.speculation}

    def quantizes(self, spec: TensorSpec) -> bool:
        """Whether a tensor is a linear of the draft that this form quantizes."""
        if not spec.is_mtp or len(spec.shape) != 2:
            return False
        if spec.role == Role.ROUTED_EXPERT:
            return self.experts == "nvfp4"
        return self.linears == "fp8" and spec.role in _LINEARS

    def groups(self, config: Config, group_of: Mapping[str, str], specs: Sequence[TensorSpec]) -> dict[str, str]:
        """Module of the draft -> config group, that of its like in the main layers; none where there is no such."""
        quantized = [spec for spec in specs if self.quantizes(spec)]
        if not quantized:
            return {}
        used = {spec.role: {} for spec in specs}  # type: dict[str, dict[str, None]]
        for spec in specs:
            if spec.module in group_of:
                used[spec.role][group_of[spec.module]] = None
        experts = next((g for g in used[Role.ROUTED_EXPERT] if _is_nvfp4(config.groups[g])), None)
        linears = next((g for g in used[Role.ATTENTION] if is_fp8_blocks(config.groups[g])), None)
        groups = {s.module: experts if s.role == Role.ROUTED_EXPERT else linears for s in quantized}
        return {module: group for module, group in groups.items() if group is not None}

    def problems(self, config: Config, dims: Dims, groups: Mapping[str, str]) -> Iterator[ConfigError]:
        """What the config asks for and this source or recipe cannot have."""
        choice, kind = config.draft, dims.draft.kind
        if not choice.keep:
            return
        if kind == NO_DRAFT:
            yield ConfigError(
                "The config keeps the draft but the source has none",
                where="draft.keep",
                expected="a source with MTP or DSpark, as its config.json says",
                found="neither num_nextn_predict_layers nor dspark_* keys",
                hint="take a config with draft: {keep: false}, such as --config nvfp4-fp8",
            )
            return
        label = DRAFTS[kind].label
        if choice.shared_head_copies and not DRAFTS[kind].head_copies:
            yield ConfigError(
                f"With {label} there can be no copies of the shared head: they break the consumer's loader",
                where="draft.shared_head_copies",
                expected="false, or left out",
                found="true",
            )
        if self.linears == "fp8" and (kind, self.experts) != (DSPARK, "nvfp4"):
            yield ConfigError(
                "The consumer loads FP8 linears of the draft in one form only",
                where="draft.linears",
                expected="with a DSpark draft and experts: nvfp4",
                found=f"{label}, experts: {self.experts}",
                hint="leave draft.linears out",
            )
            return
        for name, wanted, made in (
            ("experts", self.experts == "nvfp4", "routed experts of the main layers as NVFP4, for their scheme"),
            ("linears", self.linears == "fp8", "attention of the main layers as FP8 in blocks of 128x128"),
        ):
            there = any((".experts." in module) == (name == "experts") for module in groups)
            if wanted and not there:
                yield ConfigError(
                    "The recipe has no scheme that the draft could take",
                    where=f"draft.{name}",
                    expected=f"a recipe that stores {made}",
                    found=", ".join(scheme.compression_format for scheme in config.groups.values()),
                    hint=f"draft: {{{name}: bf16}} needs none",
                )


LEFT_OUT = DraftForm(NO_DRAFT)


def _is_nvfp4(scheme: Scheme) -> bool:
    return scheme.compression_format == NVFP4


def is_fp8_blocks(scheme: Scheme) -> bool:
    """Whether a scheme stores FP8 weights in blocks of 128x128."""
    return scheme.compression_format == FLOAT and scheme.weights.block_structure == (128, 128)


# ------------------------------------------------------------------------------------------------ for llmcompressor


def recipe_targets(
    groups: Mapping[str, Scheme], ignore: Iterable[str], draft: Mapping[str, str], specs: Iterable[TensorSpec]
) -> tuple[dict[str, Scheme], tuple[str, ...]]:
    """Groups and ignore entries under which llmcompressor quantizes the draft's linears as well.

    A recipe speaks of the main layers; its ignore entries for the draft give way, and targets are added.

    Args:
        draft: module of the draft -> group.
    """
    if not draft:
        return dict(groups), tuple(ignore)
    modules: dict[str, list[str]] = defaultdict(list)
    tails: dict[str, dict[str, None]] = defaultdict(dict)
    for spec in (spec for spec in specs if spec.module in draft):
        module = spec.hf_name.removesuffix(".weight")
        modules[draft[spec.module]].append(module)
        tail = re.escape(module.removeprefix(f"{spec.block}."))
        tails[draft[spec.module]][re.sub(r"experts\\\.\d+\\\.", r"experts\\.\\d+\\.", tail)] = None
    patterns = {group: rf"mtp\.\d+\.({'|'.join(found)})$" for group, found in tails.items()}
    spared = "|".join(patterns.values())
    kept = [f"re:(?!{spared})(?:{entry[3:]})" if entry.startswith("re:") else entry for entry in ignore]
    made = dict(groups)
    for name, pattern in patterns.items():
        own = [re.compile(target[3:]) for target in made[name].targets if target.startswith("re:")]
        if not all(any(target.match(module) for target in own) for module in modules[name]):
            targets = (*made[name].targets, f"re:{pattern}")
            made[name] = made[name].model_copy(update={"targets": targets})
    return made, tuple(kept)


# ------------------------------------------------------------------------------------------------ for the consumer


def stages(dims: Dims) -> list[int]:
    """Numbers under which vLLM builds the stages: `model.layers.N`, behind the main layers."""
    return [dims.layers + stage for stage in range(max(1, dims.draft.stages))]


def published_ignore(form: DraftForm, dims: Dims) -> list[str]:
    """The ignore list of config.json, by kind and form of the draft.

    vLLM builds stage k as `model.layers.{num_hidden_layers + k}` with the main model's quantization_config, and asks by
    that name alone; entries with `mtp` are for other readers. What an entry matches is built unquantized.
    """
    built = [rf"re:^model\.layers\.{number}\." for number in stages(dims)]
    if form.kind == DSPARK and form.linears == "fp8":
        return ["lm_head"]
    if form.kind == DSPARK and form.experts == "nvfp4":
        return ["lm_head", r"re:^mtp\.\d+\.attn\..*", *[rf"{prefix}attn\..*" for prefix in built]]
    if form.kind == DSPARK:
        return ["lm_head", r"re:^mtp\..*", *[rf"{prefix}.*" for prefix in built]]
    if form.kind == MTP and form.experts == "nvfp4":
        prefixes = (r"re:^mtp\.\d+\.", r"re:^model\.mtp\.\d+\.", *built)
        return ["lm_head", *[rf"{prefix}(?!ffn\.experts).*" for prefix in prefixes]]
    return ["lm_head", r"re:^mtp\..*", r"re:^model\.mtp\..*", *[rf"{prefix}.*" for prefix in built]]


def further_targets(dims: Dims) -> list[str]:
    """Targets of the FP8 group for the linears of a DSpark draft.

    vLLM fuses wq_a with wkv, w1 with w3, and the wkv of all stages once more, and asks by the fused names there.
    """
    fused = r"(attn\.fused_wqa_wkv|ffn\.shared_experts\.(gate_up_proj|down_proj))$"
    return [
        r"re:^mtp\.\d+\.(ffn\.shared_experts\.(w1|w2|w3)|main_proj)$",
        r"re:^model\.(main_proj|context_wkv_proj)$",
        *[rf"re:^model\.layers\.{number}\.{fused}" for number in stages(dims)],
    ]
