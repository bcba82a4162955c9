"""What exactness a source allows, from its values alone, and what an artifact's own recipe says of it.

NVFP4: a block of 16 is exact under 2^k where every value is one of E2M1 times 2^k. A value 2^e, or 1.5 * 2^e, is one
for k from e - 2 to e + 1, or to e. The stored block scale is 2^k times the global scale, and E4M3 has the powers of two
from 2^-9 to 2^8, so a linear can be exact if some power of two brings all its blocks into these 18. FP8: doubling a
value of E4M3 up to 448 gives one of E4M3, so a block of 128x128 is exact under the smallest 2^k that clips nothing, or
under none.

Written down once more than in `formats/exact.py`: what an encoder could have done is not asked of the encoder.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv4q.layout import TensorSpec
from dsv4q.verify.result import Log
from dsv4q.verify.simulation import Patterns

if TYPE_CHECKING:
    from torch import Tensor

RECIPE = "recipe.yaml"
OBSERVERS = ("exact_nvfp4", "exact_fp8_block")
"""Observers that store every block exactly that can be."""
_LOWEST, _HIGHEST = -9, 8
_NONE = 1 << 20
"""Stands for "no bound"."""


@dataclass(frozen=True)
class Exponents:
    """Of blocks of 16: under which 2^k each is exact, I32 [n]; none where lower > upper, any for zeros."""

    lower: Tensor
    upper: Tensor

    @classmethod
    def of(cls, blocks: Tensor) -> Exponents:
        """Of F32 [n, 16], finite."""
        import torch

        fraction, exponent = torch.frexp(blocks.abs())
        zero = fraction == 0
        lower = torch.where(zero, -_NONE, exponent - 3).amax(dim=-1)
        upper = torch.where(zero, _NONE, exponent - (fraction == 0.75).to(torch.int32)).amin(dim=-1)
        off = (~zero & (fraction != 0.5) & (fraction != 0.75)).any(dim=-1)
        return cls(lower, upper.masked_fill(off, -2 * _NONE))

    def under(self, global_scale: float) -> Tensor:
        """Bool [n]: blocks that are exact under some E4M3 scale and this global scale, if that is a power of two."""
        import torch

        fraction, exponent = math.frexp(global_scale)
        if fraction != 0.5:
            return torch.zeros_like(self.lower, dtype=torch.bool)
        least, most = _LOWEST - (exponent - 1), _HIGHEST - (exponent - 1)
        return (self.lower <= self.upper) & (self.lower <= most) & (self.upper >= least)

    def ends(self) -> tuple[int, int] | None:
        """The largest lower and the smallest upper one; None if some block is on no grid."""
        if bool((self.lower > self.upper).any()):
            return None
        return int(self.lower.max()), int(self.upper.min())


def have_one_window(*ends: tuple[int, int] | None) -> bool:
    """Whether one global scale serves all blocks of linears with these `Exponents.ends`."""
    known = [one for one in ends if one is not None]
    if len(known) < len(ends):
        return False
    return max(low for low, _ in known) - min(high for _, high in known) <= _HIGHEST - _LOWEST


def fp8_possible(blocks: Tensor) -> Tensor:
    """Bool [n]: which blocks F32 [n, k] E4M3 stores exactly under some power of two."""
    import torch

    fraction, exponent = torch.frexp(blocks.abs().amax(dim=-1))
    # 448 is 0.875 * 2^9.
    k = (exponent - 9 + (fraction > 0.875).to(torch.int32)).clamp_(min=-126)
    scaled = torch.ldexp(blocks, -k.unsqueeze(-1))
    return (scaled.to(torch.float8_e4m3fn).to(torch.float32) == scaled).all(dim=-1)


# ------------------------------------------------------------------------------------------------ the recipe


def promised_linears(root: Path, specs: Mapping[str, TensorSpec], log: Log) -> frozenset[str]:
    """Modules of which the artifact's recipe.yaml says that their scales are found by one of `OBSERVERS`."""
    import yaml

    path = root / RECIPE
    if not path.is_file():
        return frozenset()  # the file check says so
    try:
        recipe = yaml.safe_load(path.read_bytes())
    except (OSError, yaml.YAMLError, RecursionError) as error:
        log.differs("files", file=RECIPE, expected="YAML", found=" ".join(str(error).split())[:200])
        return frozenset()
    wanted = [Patterns(targets, RECIPE, log) for targets, observer in _groups(recipe) if observer in OBSERVERS]
    linears = [spec for spec in specs.values() if spec.is_quantizable or spec.is_mtp]
    names = {spec.module: (spec.module, spec.hf_name.removesuffix(".weight")) for spec in linears}
    return frozenset(
        module for module, both in names.items() if any(one.match(name) for one in wanted for name in both)
    )


def _groups(recipe: Any) -> Iterator[tuple[list[str], object]]:
    """Targets and weight observer of every config group, wherever it stands."""
    for key, value in recipe.items() if isinstance(recipe, dict) else ():
        if key != "config_groups" or not isinstance(value, dict):
            yield from _groups(value)
            continue
        for group in value.values():
            weights = group.get("weights") if isinstance(group, dict) else None
            targets = group.get("targets") if isinstance(group, dict) else None
            if isinstance(weights, dict) and isinstance(targets, list):
                yield [target for target in targets if isinstance(target, str)], weights.get("observer")
