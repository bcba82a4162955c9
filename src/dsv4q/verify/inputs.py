"""Whether input scales are plausible: no weight tells them, but weights and clamp bound what they can stand for.

An `input_global_scale` stands for an amax, 448 * 6 / scale. w1 and w3 read x = g * n, an RMSNorm's output of D elements
with weights g: the mean square of n is 1. So no |x| exceeds sqrt(D) * max|g|; and the largest one of any token is at
least sqrt(D / sum(1 / g^2)), which is what a token has that makes all of them equal. w2 reads silu(gate) * up with both
clamped to swiglu_limit, so at most its square. These hold for whatever data: observed, routed, bounds and fallbacks.
w2 has no least value; but a kernel takes the largest amax of a layer's experts, so one that is far off the others is
wrong for all.

"Far" is generous, so that no honest artifact is condemned: rounding, a wide margin, tokens that few experts see. What
passes: a scale wrong by less than that, and of w2 one factor throughout the model.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv4q.checkpoint.files import REPORT
from dsv4q.errors import SourceError
from dsv4q.verify.case import Case

if TYPE_CHECKING:
    from torch import Tensor

INPUT_SCALE = "input_global_scale"
NORM = "ffn_norm.weight"
_AMAX = 448.0 * 6.0
_FAR = 32.0
"""Times an analytic bound."""
_OFF = 512.0
"""Times the median of a layer's experts."""
_ADRIFT = 4096.0
"""Times the median of all layers."""


class ReadInputs:
    """The input scales of a layer's experts and the norm before them, as far as they lie on disk together."""

    def __init__(self, case: Case, block: str, names: tuple[str, ...], found: SeenInputs) -> None:
        self.case, self.label, self.names, self.found = case, block, names, found
        self.size, self.read, self.memory = 0, 0, 0

    def load(self) -> None:
        scales = [name for name in self.names if not name.endswith(NORM)]
        (stack,) = self.case.artifact.stored_together(scales)
        self.found.scales.update(zip(scales, stack.flatten().tolist(), strict=True))
        for norm in self.names[len(scales) :]:
            self.found.bounds[self.label] = _bounds(self.case.artifact.tensor(norm))

    def judge(self) -> None:
        """They are judged when all layers have been seen."""


class SeenInputs:
    """What was read of all layers."""

    def __init__(self) -> None:
        self.scales: dict[str, float] = {}
        self.bounds: dict[str, tuple[float, float]] = {}
        """Block -> smallest and largest magnitude that the input of w1 and w3 has at its largest; 0 where unknown."""

    def judge(self, case: Case) -> None:
        """Every positive finite scale; others have been named."""
        limit, headroom = case.contract.config.get("swiglu_limit"), _headroom(case.artifact.root)
        clamp = float(limit) ** 2 if isinstance(limit, (int, float)) and 0 < limit < 1e6 else 0.0
        layers: dict[str, dict[str, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
        for name in (name for name in case.contract.tensors if name in self.scales):
            if 0 < self.scales[name] < math.inf:
                projection = name.split(".")[-2]
                layers[projection][name.partition(".ffn.")[0]][name] = _AMAX / self.scales[name]
        for projection, blocks in layers.items():
            middles = {block: statistics.median(amax.values()) for block, amax in blocks.items()}
            for block, amax in blocks.items():
                least, most = self.bounds.get(block, (0.0, 0.0)) if projection != "w2" else (0.0, clamp)
                others = statistics.median(value for key, value in middles.items() if key != block or len(middles) < 3)
                limits = _Plausible(least / _FAR, most * _FAR * headroom, middles[block], others)
                for name, value in amax.items():
                    case.log.looked_at("inputs")
                    why = limits.against(value)
                    if why is not None and not _sees_only_zeros(case, name):
                        case.differs("inputs", name, why, f"{self.scales[name]:.6g}, which stands for {value:.6g}")


@dataclass(frozen=True)
class _Plausible:
    """Of the amax of one projection in one layer; 0: none."""

    least: float
    most: float
    middle: float
    elsewhere: float

    def against(self, amax: float) -> str | None:
        """What is expected instead, if an amax is not plausible."""
        if amax < self.least:
            return f"a largest input of at least {self.least * _FAR:.4g}, as the norm's weights give every token"
        if self.most and amax > self.most:
            return f"a largest input of at most {self.most / _FAR:.4g}, as weights and clamp allow"
        if not self.middle / _OFF <= amax <= self.middle * _OFF:
            return f"a largest input like the layer's other experts', {self.middle:.4g} in the middle"
        if not self.elsewhere / _ADRIFT <= amax <= self.elsewhere * _ADRIFT:
            return f"a largest input like those of other layers, {self.elsewhere:.4g} in the middle"
        return None


def input_scales(case: Case, names: Mapping[str, object], found: SeenInputs) -> Iterator[ReadInputs]:
    """The work, layer by layer, of scales and norms among `names`."""
    layers: dict[str, list[str]] = defaultdict(list)
    for name in names:
        if name.endswith(f".{INPUT_SCALE}"):
            layers[name.partition(".ffn.")[0]].append(name)
    for block, scales in layers.items():
        norm = f"{block}.{NORM}"
        yield ReadInputs(case, block, (*scales, *([norm] if norm in names else [])), found)


def _bounds(norm: Tensor) -> tuple[float, float]:
    weight = norm.double()
    if not bool(weight.isfinite().all()):
        return 0.0, 0.0
    inverse = float(weight.square().reciprocal().sum())
    least = math.sqrt(weight.numel() / inverse) if 0 < inverse < math.inf else 0.0
    return least, math.sqrt(weight.numel()) * float(weight.abs().max())


def _headroom(root: Path) -> float:
    """By how much the run widened what it observed, as its report says."""
    try:
        report: Any = json.loads((root / REPORT).read_bytes())
        headroom = report["activations"]["headroom"]
    except (OSError, ValueError, RecursionError, LookupError, TypeError):
        return 1.0
    return float(headroom) if isinstance(headroom, (int, float)) and 1 <= headroom <= 1e6 else 1.0


def _sees_only_zeros(case: Case, name: str) -> bool:
    """Whether a scale is that of an expert's w2 whose input is zero, for w1 or w3 is: then it stands for nothing."""
    expert, _, rest = name.partition(".w2.")
    for packed in (f"{expert}.{other}.weight_packed" for other in ("w1", "w3") if rest):
        try:
            if packed in case.sound and not bool((case.artifact.tensor(packed) & 0x77).any()):
                return True
        except SourceError:
            continue
    return False
