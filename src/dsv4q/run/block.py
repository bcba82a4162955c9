"""One block of the model: put in place, calibration tokens through it, scales, encoded form, back to meta.

Routed experts go through all of that as stacks (`experts.py`, `stacked.py`), whatever those do not know module by
module under llmcompressor's hooks (`modules.py`).

The forward passes unquantized residual streams on, which is bit-identical to stock's sequential pipeline because that
one disables quantization during calibration too.

Shape letters: B batch, S sequence, C hc_mult, D hidden_size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from dsv4q.checkpoint.source import Checkpoint
from dsv4q.config import Activations
from dsv4q.errors import CalibrationError, WeightError
from dsv4q.model.model import (
    BlockInputs,
    DeepseekV4ForCausalLMWithMTP,
    block_inputs,
    embed,
    release,
    run_block,
    set_tensor,
)
from dsv4q.plan.plan import Plan
from dsv4q.plan.work import RankWork, WorkTable
from dsv4q.run.experts import BatchedExperts, CountedRouting, Routing
from dsv4q.run.handover import Handover
from dsv4q.run.linears import InputScales, Linears, PlannedLinear, planned_linears
from dsv4q.run.loader import LoadedBlock
from dsv4q.run.modules import ModuleLinears
from dsv4q.run.ranks import Ranks
from dsv4q.run.record import BlockRecord
from dsv4q.run.residuals import ResidualStreams
from dsv4q.run.stacked import StackedLinears, StackLayout
from dsv4q.run.stopwatch import Stopwatch


@dataclass(frozen=True)
class BlockLinears:
    """The linears of one block that are encoded, and how those of its experts make stacks, if they do."""

    all: tuple[PlannedLinear, ...]
    stacks: StackLayout | None

    @property
    def as_modules(self) -> list[PlannedLinear]:
        """Those that are worked on as modules."""
        return [linear for linear in self.all if self.stacks is None or linear.spec.expert is None]


@dataclass
class BlockWorker:
    """Works on one block after another, each once it is loaded; the residual streams go from block to block.

    Attributes:
        advance: called with the block's name and the number of source bytes done with.
        check_stop: called where the run may be stopped; raises KeyboardInterrupt if it shall be.
    """

    model: DeepseekV4ForCausalLMWithMTP
    plan: Plan
    work: WorkTable
    source: Checkpoint
    batches: Sequence[torch.Tensor]
    """Token ids I64 [B, S] of each micro-batch, on the device."""
    streams: ResidualStreams
    device: torch.device
    ranks: Ranks
    handover: Handover
    advance: Callable[[str, int], None]
    check_stop: Callable[[], None]
    _inputs: dict[tuple[int, ...], BlockInputs] = field(default_factory=dict)

    def process(self, block: LoadedBlock, watch: Stopwatch) -> BlockRecord:
        """Do all that is to be done with a loaded block; its tensors may be on their way to the disk afterwards.

        Raises:
            WeightError: NaN or Inf in a source tensor.
            CalibrationError: non-finite residual streams, a scale that is not positive and finite.
            RankError: another rank is gone, or observers need to see all batches in order.
        """
        name = block.task.name
        done = RankWork(self.ranks.share.rank, read_bytes=block.read_bytes, write_bytes=block.written_bytes)
        record = BlockRecord(done)
        if name.startswith("layers.") or any(work.encoded for work in block.task.work):
            self._decoder_block(block, record, watch)
        else:
            self._embed(block, record, watch)
        return record

    def _embed(self, block: LoadedBlock, record: BlockRecord, watch: Stopwatch) -> None:
        with watch.stage("check"):
            self._put_in_place(block, experts=False)
            block.check_finite()
        with watch.stage("forward"):
            self.streams.through("embed", lambda n, _: embed(self.model, self.batches[n]))
        record.done.micro_batches = len(self.streams)
        release(self.model.model.embed_tokens)
        self.advance("embed", block.task.device_bytes)

    def _decoder_block(self, block: LoadedBlock, record: BlockRecord, watch: Stopwatch) -> None:
        task = block.task
        layer = self._module(task.name)
        linears = self._linears_of(task.name) if task.encode else BlockLinears((), None)
        in_modules = task.encode and linears.stacks is None
        with watch.stage("exchange"):
            if block.memory is not None:
                block.memory.exchange(self.ranks)
        with watch.stage("check"):
            self._put_in_place(block, experts=in_modules)
        routing = self._routing(block, in_modules)
        modules = ModuleLinears(linears.as_modules, self.device)
        modules.prepare()
        if not self.ranks.is_alone:
            modules.check_order_does_not_matter(len(self.streams.shapes) >= self.ranks.share.count)
        if self.work.is_forward(task.name):
            with watch.stage("forward"):
                self._forward(block, routing, record)
        else:
            block.check_finite()
        if task.encode:
            parts: list[Linears] = [modules]
            if linears.stacks is not None and isinstance(routing, BatchedExperts):
                parts.append(StackedLinears(linears.stacks, routing))
            with watch.stage("statistics"):
                self._settle(block, parts, record)
            for part in parts:
                self._encode(block, part, record, watch)
        release(layer, but=None if in_modules else layer.mlp.experts)
        self.advance(task.name, task.device_bytes - self._in_forward(block) * len(self.streams))

    # ----------------------------------------------------------------------------------------------------- in place

    def _module(self, block: str) -> Any:
        """The decoder layer of a main block, or of one of the draft's."""
        kind, _, index = block.partition(".")
        return (self.model.mtp if kind == "mtp" else self.model.model.layers)[int(index)]

    def _put_in_place(self, block: LoadedBlock, *, experts: bool) -> None:
        """Tensors into their modules, those of routed experts only if they are worked on as modules."""
        for spec, tensor in block.tensors.items():
            set_tensor(self.model, spec.hf_name, tensor)
        if experts and block.memory is not None:
            for spec in block.experts:
                set_tensor(self.model, spec.hf_name, block.memory.weight(spec))

    def _linears_of(self, block: str) -> BlockLinears:
        linears = planned_linears(self.model, self.plan.block_tensors(block))
        stacks = StackLayout.of(linears) if self.plan.experts_in_stacks else None
        assert stacks is not None or not self.plan.experts_in_stacks or not any(one.spec.expert for one in linears)
        return BlockLinears(linears, stacks)

    # -------------------------------------------------------------------------------------------------- the forward

    def _routing(self, block: LoadedBlock, in_modules: bool) -> Routing:
        """Who watches the routed experts, and computes them unless they are worked on as modules."""
        if in_modules or block.memory is None:
            return CountedRouting(torch.zeros(self.plan.dims.experts, dtype=torch.int64, device=self.device))
        limit = float(self.model.config.swiglu_limit)
        return BatchedExperts(block.memory, limit, all_tokens=self.plan.config.activations.experts == "all")

    def _forward(self, block: LoadedBlock, routing: Routing, record: BlockRecord) -> None:
        """Send every micro-batch through a block."""
        name = block.task.name
        index = int(name.removeprefix("layers."))
        finite: list[torch.Tensor] = []

        def compute(number: int, streams: torch.Tensor | None) -> torch.Tensor:
            self.check_stop()
            assert streams is not None
            ids = self.batches[number]
            out = run_block(self.model, index, streams, ids, self._inputs_of(ids))
            finite.append(torch.isfinite(out).all())
            self.advance(name, self._in_forward(block))
            return out

        with routing.watching(self.model.model.layers[index].mlp):
            self.streams.through(name, compute)
        block.check_finite(sizes=False)
        self._check_streams(block, torch.stack(finite).tolist() if finite else [])
        block.check_finite()
        routing.gather(self.ranks)
        record.done.micro_batches = len(self.streams)
        record.facts["tokens_per_expert"] = routing.counts.tolist()

    def _in_forward(self, block: LoadedBlock) -> int:
        """Bytes of progress for each micro-batch: half of the block's, the other half is its encoding."""
        if not self.work.is_forward(block.task.name):
            return 0
        return block.task.device_bytes // 2 // max(1, len(self.streams))

    def _check_streams(self, block: LoadedBlock, finite: Sequence[bool]) -> None:
        fine = dict(zip(self.streams.mine, finite, strict=True))
        if not all(fine.values()):
            hint = "the source's weights of this layer are damaged or not of this architecture"
            try:
                block.check_finite()
            except WeightError as error:
                hint += f": {error.where} has {error.found}"
            raise CalibrationError(
                "The activations became non-finite while calibrating",
                where=f"{block.task.name}, micro-batch {next(n for n, good in fine.items() if not good)}",
                expected="finite residual streams",
                found="NaN or Inf",
                hint=hint,
            )

    def _inputs_of(self, ids: torch.Tensor) -> BlockInputs:
        """Positions, rotary and mask, which are the same for all micro-batches of one shape and all blocks."""
        key = tuple(ids.shape)
        if key not in self._inputs:
            self._inputs[key] = block_inputs(self.model, ids)
        return self._inputs[key]

    # ------------------------------------------------------------------------------------------- scales and encoding

    def _settle(self, block: LoadedBlock, parts: Sequence[Linears], record: BlockRecord) -> None:
        name, activations = block.task.name, self.plan.config.activations
        # No token goes through the draft.
        used = Activations(scales="bound") if name.startswith("mtp.") else activations
        inputs = InputScales(name, used, self._input_bounds(name))
        for part in parts:
            part.settle(inputs)
        record.facts |= inputs.as_record()

    def _input_bounds(self, block: str) -> dict[str, float]:
        """Largest magnitude that the inputs of a block's routed experts can have, whatever the data.

        w1 and w3 read an RMSNorm's output, each element at most sqrt(D) times its weight; w2 reads
        silu(gate) * up with gate and |up| clamped to swiglu_limit.
        """
        norm = self.source.tensor(f"{block}.ffn_norm.weight").to(torch.float32)
        wide = math.sqrt(norm.numel()) * float(norm.abs().amax())
        limit = float(self.model.config.swiglu_limit)
        return {"w1": wide, "w3": wide, "w2": limit * limit}

    def _encode(self, block: LoadedBlock, part: Linears, record: BlockRecord, watch: Stopwatch) -> None:
        pieces = part.encoded(block.task.mine)
        while True:
            self.check_stop()
            with watch.stage("encode"):
                encoded = next(pieces, None)
                if encoded is None:
                    return
                self.handover.linears(block.task.name, encoded, partial(record.note, encoded))
