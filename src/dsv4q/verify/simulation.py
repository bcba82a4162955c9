"""The consumer's game of names: which group of quantization_config, or which ignore entry, takes each linear.

vLLM builds the main model under upstream names, the draft as `draft.py` says with the same quantization_config, and
asks of every linear: does a target match, does an ignore entry match. A target or ignore entry
is a regular expression for `re.match` after `re:`, else an exact name or the class name `Linear` (compressed-tensors
`utils/match.py`). So this module plays that game for every linear in both vocabularies and under every prefix, instead
of looking for literal entries.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dsv4q.layout import DRAFTS, DSPARK, Dims, Role, TensorSpec
from dsv4q.verify.draft import consumer_names, every_name, is_fused, may_be_quantized
from dsv4q.verify.result import Log, few
from dsv4q.verify.schemes import StoredScheme

CONFIG = "config.json"


class Patterns:
    """A list of targets or ignore entries."""

    def __init__(self, entries: Sequence[str], where: str, log: Log) -> None:
        self.exact = {entry for entry in entries if not entry.startswith("re:")}
        self.regexes: dict[str, re.Pattern[str]] = {}
        self.used: set[str] = set()
        for entry in entries:
            if entry.startswith("re:"):
                try:
                    self.regexes[entry] = re.compile(entry.removeprefix("re:"))
                except re.error as error:
                    log.differs(
                        "config", file=CONFIG, expected=f"a regular expression in {where}", found=f"{entry}: {error}"
                    )

    def match(self, name: str) -> str | None:
        """The entry that matches a linear of this name. All modules asked about are taken for linears."""
        found = name if name in self.exact else "Linear" if "Linear" in self.exact else None
        if found is None:
            found = next((entry for entry, regex in self.regexes.items() if regex.match(name)), None)
        if found is not None:
            self.used.add(found)
        return found

    def idle(self, names: Sequence[str]) -> list[str]:
        """Entries that match none of `names`."""
        regexes = [e for e, r in self.regexes.items() if e not in self.used and not any(map(r.match, names))]
        return regexes + sorted(self.exact - self.used - set(names))


@dataclass(frozen=True)
class TargetGroup:
    """A group of quantization_config."""

    name: str
    targets: Patterns
    scheme: StoredScheme | None
    """None: one that cannot be made out; that has been said."""


class Simulation:
    """Asks of every linear, under every name that it may bear, what the consumer would do with it."""

    def __init__(self, dims: Dims, groups: Sequence[TargetGroup], ignore: Patterns, log: Log) -> None:
        self.dims, self.groups, self.ignore, self.log = dims, groups, ignore, log
        self.found: dict[tuple[str, str], list[str]] = defaultdict(list)
        """(expected, found) -> names concerned: one defect of one entry is one difference, with its count."""
        self.effective: dict[str, str | None] = {}
        """Main linear that may be quantized -> group that quantizes it in the consumer."""
        self.schemes: dict[str, StoredScheme] = {}
        self.names: list[str] = []
        self._asks_by_its_own_names = False
        """Whether only the consumer's own names of the draft count; otherwise every name that it is known by."""

    def run(self, specs: Sequence[TensorSpec]) -> dict[str, StoredScheme]:
        """The scheme of every linear that a group quantizes, by upstream module name."""
        drafted = []
        for spec in specs:
            if not spec.name.endswith(".weight"):
                continue
            names = every_name(self.dims, spec) if spec.is_mtp else self._names(spec)
            self.names += names
            self.log.looked_at("targets", len(names))
            if spec.is_mtp:
                drafted.append(spec)
            elif spec.is_quantizable:
                self._quantizable(spec, names)
            else:
                self._untouched(spec, names)
        self._draft(drafted)
        self._idle_targets()
        self._fused(specs)
        for (expected, found), concerned in self.found.items():
            self.log.differs("targets", file=CONFIG, expected=expected, found=f"{found}: {few(concerned)}")
        return self.schemes

    def _names(self, spec: TensorSpec) -> tuple[str, ...]:
        return spec.module, f"model.{spec.module}", spec.hf_name.removesuffix(".weight")

    def _hits(self, name: str) -> list[TargetGroup]:
        return [group for group in self.groups if group.targets.match(name)]

    def _quantizable(self, spec: TensorSpec, names: Sequence[str]) -> None:
        hits = [self._hits(name) for name in names]
        first: list[TargetGroup] = next((hit for hit in hits if hit), [])
        for name, hit in zip(names, hits, strict=True):
            if len(hit) > 1:
                self._note("one group per linear", " and ".join(group.name for group in hit), name)
            if not hit and first:
                found = f"{first[0].name} does not match"
                self._note("targets that match in both vocabularies", found, name)
            entry = self.ignore.match(name) if first else None
            if entry is not None:
                self._note("no ignore entry that matches a targeted linear", entry, name)
        ignored = any(self.ignore.match(name) for name in names) if first else False
        self.effective[spec.module] = first[0].name if first and not ignored else None
        scheme = first[0].scheme if first else None
        if scheme is not None and self._fits(scheme, spec):
            self.schemes[spec.module] = scheme

    def _fits(self, scheme: StoredScheme, spec: TensorSpec) -> bool:
        """Whether a linear of this shape can be stored."""
        reason = scheme.misfit(spec.shape)
        if reason is not None:
            self._note(f"linears that {scheme.group} can store", reason, spec.module)
        return reason is None

    def _untouched(self, spec: TensorSpec, names: Sequence[str]) -> None:
        for name in names:
            hit = self._hits(name)
            if hit and self.ignore.match(name) is None:
                what = f"the {self._label} draft" if spec.is_mtp else f"{spec.role}s"
                every = "the consumer's" if spec.is_mtp and self._asks_by_its_own_names else "every"
                self._note(f"{what} left unquantized under {every} name", f"{hit[0].name} quantizes", name)

    # ------------------------------------------------------------------------------------------------ the draft

    @property
    def _label(self) -> str:
        return DRAFTS[self.dims.draft.kind].label

    def _draft(self, specs: Sequence[TensorSpec]) -> None:
        """Experts of all stages in one form, other linears of all stages in one form; what is quantized has a scheme.

        The form is what the consumer would build of some: of experts, or of linears that only DSpark names so.
        An entry that reaches an attention projection of a stage by the main layers' target is one that was forgotten.
        """
        able = [spec for spec in specs if may_be_quantized(self.dims, spec)]
        built = {spec.module: self._built(spec) for spec in able}
        experts = [spec for spec in able if spec.role == Role.ROUTED_EXPERT]
        linears = [spec for spec in able if spec.role != Role.ROUTED_EXPERT]
        whole = any(built[spec.module] for spec in experts)
        fused = any(built[spec.module] for spec in linears if is_fused(self.dims, spec))
        self._asks_by_its_own_names = whole or self.dims.draft.kind == DSPARK
        for some, quantized, what in ((experts, whole, "experts"), (linears, fused, "linears")):
            if quantized:
                self._in_one_form(some, built, what)
        taken = {spec.module for some, quantized in ((experts, whole), (linears, fused)) if quantized for spec in some}
        for spec in (spec for spec in specs if spec.module not in taken):
            own = self._asks_by_its_own_names
            self._untouched(spec, consumer_names(self.dims, spec) if own else every_name(self.dims, spec))

    def _built(self, spec: TensorSpec) -> TargetGroup | None:
        """The group under which the consumer builds a linear of the draft."""
        hits = [next(iter(self._hits(name)), None) for name in consumer_names(self.dims, spec)]
        ignored = [self.ignore.match(name) for name in consumer_names(self.dims, spec)]
        found = [hit for hit, entry in zip(hits, ignored, strict=True) if hit is not None and entry is None]
        return found[0] if found else None

    def _in_one_form(self, specs: Sequence[TensorSpec], built: Mapping[str, TargetGroup | None], what: str) -> None:
        groups = Counter(group.name for spec in specs if (group := built[spec.module]) is not None)
        usual = groups.most_common(1)[0][0]
        (group,) = {g.name: g for g in self.groups if g.name == usual}.values()
        for spec in specs:
            for name in consumer_names(self.dims, spec):
                hits, entry = [hit.name for hit in self._hits(name)], self.ignore.match(name)
                if hits != [usual] or entry is not None:
                    found = entry or " and ".join(hits) or "no target matches"
                    self._note(f"all {what} of the {self._label} draft in {usual}", found, name)
            if group.scheme is not None and self._fits(group.scheme, spec):
                self.schemes[spec.module] = group.scheme

    def _note(self, expected: str, found: str, name: str) -> None:
        self.found[expected, found].append(name)

    def _idle_targets(self) -> None:
        for group in self.groups:
            for entry in group.targets.idle(self.names):
                self.log.differs(
                    "targets",
                    file=CONFIG,
                    expected=f"config_groups.{group.name}: targets that match something",
                    found=entry,
                )

    def _fused(self, specs: Sequence[TensorSpec]) -> None:
        """Per layer: five projections or none, one group for all experts; fused linears never apart."""
        layers: dict[tuple[str, str], list[str]] = defaultdict(list)
        for spec in specs:
            if spec.is_quantizable:
                layers[spec.block, spec.role].append(spec.module)
        for (block, role), modules in layers.items():
            self.log.looked_at("targets")
            bare = [module for module in modules if self.effective[module] is None]
            if bare and len(bare) < len(modules):
                self.found[f"all {role}s of a layer quantized, or none", "not quantized"] += bare
            mixed = {self.effective[module] for module in modules} - {None}
            if role == Role.ROUTED_EXPERT and len(mixed) > 1:
                self._note("one group for all experts of a layer", " and ".join(sorted(map(str, mixed))), block)
            if role == Role.ATTENTION:
                wq_a, wkv = f"{block}.attn.wq_a", f"{block}.attn.wkv"
                if self.effective[wq_a] != self.effective[wkv]:
                    found = f"{self.effective[wq_a]} and {self.effective[wkv]}"
                    self._note("wq_a and wkv of a layer, which the consumer fuses, in one group", found, block)
        self._expert_pairs(layers)

    def _expert_pairs(self, layers: Mapping[tuple[str, str], list[str]]) -> None:
        for (_, role), modules in layers.items():
            for w1 in (m for m in modules if role == Role.ROUTED_EXPERT and m.endswith(".w1")):
                w3 = f"{w1.removesuffix('.w1')}.w3"
                if self.effective[w1] != self.effective[w3]:
                    found = f"{self.effective[w1]} and {self.effective[w3]}"
                    self._note("w1 and w3 of an expert, which the consumer fuses, in one group", found, w1)
