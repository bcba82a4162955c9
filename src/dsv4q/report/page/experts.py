"""Which routed experts calibration reached: layers x experts."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

from dsv4q.report.page.charts import Axis
from dsv4q.report.page.record import Gap, Record, layers_of

HASH_LAYERS = 3
"""`num_hash_layers` where config.json leaves it out, as for the model itself."""


@dataclass(frozen=True)
class Reach:
    """Tokens that the router sent to the experts of a layer."""

    layer: str
    routing: str
    """hash, score or unknown."""
    counts: list[int]
    fallback: int
    """Experts that the fallback gave tokens."""

    @property
    def median(self) -> float:
        return median(self.counts)

    @property
    def missed(self) -> list[int]:
        """Experts without tokens."""
        return [number for number, value in enumerate(self.counts) if value == 0]


def reach(report: Record, config: Record | Gap) -> list[Reach]:
    """Every layer that data went through."""
    hashed = _hash_layers(config)
    found = []
    for name, block in layers_of(report, "tokens_per_expert"):
        routing = "unknown" if hashed is None else "hash" if int(name) < hashed else "score"
        used = len(block.get("experts_without_tokens") or [])
        found.append(Reach(name, routing, block["tokens_per_expert"], used))
    if found and not (found[0].counts and len({len(one.counts) for one in found}) == 1):
        raise Gap(f"{report.name}: tokens_per_expert has not the same number of experts in every block")
    return found


def _hash_layers(config: Record | Gap) -> int | None:
    """How many layers route by hash, if config.json tells."""
    if isinstance(config, Gap):
        return None
    found = config.get("num_hash_layers")
    return HASH_LAYERS if found is None else found if isinstance(found, int) else None


def expert_axis(experts: int) -> Axis:
    """Few are all named, of many five."""
    ticks = range(experts) if experts <= 16 else [*(experts * part // 4 for part in range(4)), experts - 1]
    return Axis(0.0, float(experts), tuple((e + 0.5, str(e)) for e in ticks), title="expert")


def layer_axis(layers: int, marked: int) -> Axis:
    """Rows go down from the top; the first, marked ones have a bar beside them, which has their label."""
    every = 1 if layers <= 12 else 10
    return Axis(0.0, float(layers), tuple((layers - i - 0.5, str(i)) for i in range(marked, layers) if i % every == 0))
