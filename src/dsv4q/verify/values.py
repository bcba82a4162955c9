"""The work on the values of an artifact, piece by piece, in the order in which differences are told."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Iterator, Sequence

from torch import Tensor

from dsv4q.checkpoint.native import entries_of
from dsv4q.layout import TensorSpec
from dsv4q.verify.batch import LinearBatch, most_together
from dsv4q.verify.case import Case, ValueCheck
from dsv4q.verify.inputs import SeenInputs, input_scales
from dsv4q.verify.linear import Linear, SharedScales
from dsv4q.verify.schemes import StoredScheme
from dsv4q.verify.untouched import Pieces, UntouchedTensor

_PARTNERS = {"w1": "w3", "w3": "w1"}


class ValueChecks:
    """Makes the work on tensors that lie on disk together, and remembers what other shards must be held against.

    Args:
        quick: leave linears that are exact out of the statistics.
    """

    def __init__(self, case: Case, *, quick: bool) -> None:
        self.case, self.quick = case, quick
        self._kept: dict[str, Tensor] = {}
        """Scales that an expert's partner must have too, whose shard has not come yet."""
        self._twins: dict[str, Pieces] = {}
        self.inputs = SeenInputs()

    def of(self, names: Sequence[str]) -> Iterator[ValueCheck]:
        """All work on sound tensors: the untouched ones in this order, then the linears that are whole."""
        case = self.case
        for name in names:
            if name.rpartition(".")[0] not in case.contract.schemes:
                yield from UntouchedTensor(case, name, case.sound[name], self._twins).checks()
        here = frozenset(names)
        batches: dict[tuple[object, ...], list[TensorSpec]] = defaultdict(list)
        most: dict[tuple[object, ...], int] = {}
        pairs: dict[str, str] = {}
        for spec, scheme in case.contract.whole_linears(names):
            shared = self._shared(spec.module, scheme, here)
            if not self._goes_into_batch(spec, scheme):
                yield Linear(case, spec, scheme, shared, self._kept)
                continue
            pairs |= shared
            kinds = (case.sound[f"{spec.module}.{suffix}"].dtype for suffix in scheme.stored(spec.shape))
            key = (scheme.group, spec.shape, *kinds, *self._kinds_in_source(spec))
            if key not in most:
                most[key] = most_together(case, spec)
            batch = batches[key]
            batch.append(spec)
            if len(batch) == most[key]:
                yield LinearBatch(case, scheme, tuple(batch), quick=self.quick)
                batch.clear()
        for batch in filter(None, batches.values()):
            yield LinearBatch(case, case.contract.schemes[batch[0].module], tuple(batch), quick=self.quick)
        if pairs:
            yield SharedScales(case, pairs, self._kept)
        if case.deep:
            yield from input_scales(case, dict.fromkeys(names), self.inputs)

    def _goes_into_batch(self, spec: TensorSpec, scheme: StoredScheme) -> bool:
        source = self.case.source
        if not scheme.in_batches or scheme.group in self.case.rounded or source is None or self.case.is_lost(spec.name):
            return False
        return self.case.source_fault(spec) is None and source.tensors[spec.name].dtype == "BF16"

    def _kinds_in_source(self, spec: TensorSpec) -> tuple[str, ...]:
        assert self.case.source is not None
        return tuple(entry.dtype for entry in entries_of(self.case.source, spec.name))

    def _shared(self, module: str, scheme: StoredScheme, here: Container[str]) -> dict[str, str]:
        """Scales of w1 -> the same of w3, where this linear is the one that says whether they are equal.

        Of two that lie here together it is w1, of two that come in different shards the later one.
        """
        expert, _, projection = module.rpartition(".")
        pairs: dict[str, str] = {}
        for suffix in scheme.shared if self.case.deep and projection in _PARTNERS else ():
            mine, other = f"{module}.{suffix}", f"{expert}.{_PARTNERS[projection]}.{suffix}"
            if mine not in here:  # a scheme without input scale
                continue
            if other in self._kept or (other in here and projection == "w1"):
                pairs[f"{expert}.w1.{suffix}"] = f"{expert}.w3.{suffix}"
            elif other not in here:
                self._kept[mine] = self.case.artifact.tensor(mine)
        return pairs
