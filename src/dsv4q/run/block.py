"""The calibration pipeline that holds one block at a time, run inside an ordinary `oneshot`.

llmcompressor's recipe, modifier, observers and lifecycle do the calibrating; what is ours is where the weights live,
and that many are worked on at once. The model is on the meta device. For each block: read its tensors, run the
calibration batches through it, find the scales, encode, write, back to meta. Routed experts go through all of that as
stacks (`experts.py`, `stacked.py`), whatever those do not know module by module under llmcompressor's hooks. The next
block is on its way to the device meanwhile (`loader.py`), and the one before to the disk (`handover.py`).

The forward passes unquantized residual streams on, which is bit-identical to stock's sequential pipeline because that
one disables quantization during calibration too.

Shape letters: B batch, S sequence, C hc_mult, D hidden_size.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from llmcompressor.core import LifecycleCallbacks
from llmcompressor.pipelines.registry import CalibrationPipeline
from llmcompressor.utils.helpers import DisableQuantization, calibration_forward_context

from dsv4q.checkpoint.journal import Journal
from dsv4q.checkpoint.source import Checkpoint
from dsv4q.checkpoint.writer import BackgroundWriter, block_digest
from dsv4q.data.tokens import CalibrationData
from dsv4q.errors import CalibrationError
from dsv4q.formats.error import Errors
from dsv4q.host import memory_now
from dsv4q.layout import TensorSpec
from dsv4q.model.model import (
    BlockInputs,
    DeepseekV4ForCausalLMWithMTP,
    block_inputs,
    embed,
    release,
    run_block,
    set_tensor,
)
from dsv4q.model.upstream import experts_forward, weights_on_every_rank
from dsv4q.plan.plan import Plan
from dsv4q.run.experts import BatchedExperts, ExpertMemory
from dsv4q.run.handover import Handover
from dsv4q.run.loader import Item, LoadedBlock, Loader, items_of
from dsv4q.run.modules import (
    GLOBAL_SCALES,
    BlockModules,
    Member,
    State,
    check_scales,
    members_of,
)
from dsv4q.run.ranks import Ranks
from dsv4q.run.residuals import ResidualStreams
from dsv4q.run.stacked import ExpertStack, StackLayout
from dsv4q.run.stopwatch import Stopwatch

PIPELINE = "dsv4q_stream"


@CalibrationPipeline.register(PIPELINE)
class StreamingPipeline(CalibrationPipeline):
    """Registered with llmcompressor; `oneshot(pipeline="dsv4q_stream")` ends up here."""

    @staticmethod
    def __call__(model: torch.nn.Module, dataloader: object, dataset_args: object) -> None:
        """Run the `BlockStream` that was attached to the model; it has its own batches."""
        stream = cast("BlockStream", model.block_stream)
        LifecycleCallbacks.calibration_start()
        with calibration_forward_context(model), DisableQuantization(model):
            stream.run()
        LifecycleCallbacks.calibration_end()


@dataclass
class Found:
    """What is learnt of one block while it is worked on; tensors of it may still be on their way."""

    record: dict[str, Any] = field(default_factory=dict)
    errors: defaultdict[str, Errors] = field(default_factory=partial(defaultdict, Errors))
    scales: defaultdict[str, list[float]] = field(default_factory=partial(defaultdict, list))

    def note_scales(self, members: Sequence[Member], stored: Any) -> None:
        """Remember the global scales among the stored tensors of some members, on the host."""
        for suffix in (name for name in GLOBAL_SCALES if name in stored):
            for member, value in zip(members, stored[suffix].flatten().tolist(), strict=True):
                self.scales[f"{member.projection}.{suffix}"].append(value)

    @classmethod
    def merged(cls, parts: Sequence[Found]) -> Found:
        """What several ranks found of one block; what they found together is the same in all."""
        whole = cls(record=parts[0].record)
        for part in parts:
            for role, errors in part.errors.items():
                whole.errors[role].merge(errors)
                whole.errors[role].each.update(errors.each)
            for name, values in part.scales.items():
                whole.scales[name].extend(values)
        return whole

    def as_record(self) -> dict[str, Any]:
        """For the journal."""
        encoded = {
            "errors": {role: found.as_dict() for role, found in self.errors.items()},
            "tensors": {name: e.as_dict() for found in self.errors.values() for name, e in found.each.items()},
            "scales": {name: {"min": min(values), "max": max(values)} for name, values in self.scales.items()},
        }
        return {**self.record, **(encoded if self.errors else {})}


@dataclass(frozen=True)
class BlockLinears:
    """The linears of one block that are encoded, and how those of its experts make stacks, if they do."""

    members: tuple[Member, ...] = ()
    layout: StackLayout | None = None

    def without(self, stack: ExpertStack | None) -> list[Member]:
        """Those that are worked on as modules."""
        return [m for m in self.members if stack is None or m.spec.expert is None]


@dataclass
class BlockStream:
    """One run over the blocks of a plan: everything it needs, and the residual streams between two blocks."""

    model: DeepseekV4ForCausalLMWithMTP
    plan: Plan
    source: Checkpoint
    writer: BackgroundWriter
    journal: Journal
    data: CalibrationData | None
    device: torch.device
    advance: Callable[[str, int], None]
    """Called with the block's name and the number of source bytes done with."""
    check_stop: Callable[[], None]
    """Called where the run may be stopped; raises KeyboardInterrupt if it shall be."""
    ranks: Ranks = field(default_factory=Ranks)

    def run(self) -> None:
        """Every block that the journal does not know as done.

        Raises:
            WeightError: NaN or Inf in a source tensor.
            CalibrationError: non-finite residual streams, a scale that is not positive and finite.
            RankError: another rank is gone, or observers need to see all batches in order.
        """
        self._begin = time.monotonic()
        self._linears: dict[str, BlockLinears] = {}
        self._inputs: dict[tuple[int, ...], BlockInputs] = {}
        shapes = [(*ids.shape, self.plan.dims.hc_mult, self.plan.dims.hidden) for ids in self._batches()]
        mine = self.ranks.share.among(len(shapes))
        self._streams = ResidualStreams(self.journal.folder, self.device, shapes, mine)
        again, todo = self._again(), self._todo()
        loader = Loader(
            self.source,
            self.device,
            budget=self.plan.estimate.read_ahead,
            memory=partial(ExpertMemory.of, self.plan.dims, self.device),
            slots=self._slots(),
            put=self.writer.put,
            where=lambda spec: f"{spec.name} in {self.source.tensors[spec.name].file}",
            advance=self.advance,
        )
        with (
            Handover(self.writer, self.device) as handover,
            loader.blocks([*again, *todo], self.check_stop) as blocks,
        ):
            for wanted in (*again, *todo):
                watch = Stopwatch(self.device)
                block = self._next(blocks, wanted, watch)
                found = Found()
                with watch.stage("check"):
                    self._put_in_place(block, encode=wanted in todo)
                if block.experts is not None:
                    with watch.stage("exchange"):
                        self.ranks.exchange(block.experts.gate_up)
                        self.ranks.exchange(block.experts.down)
                if block.name.startswith("layers."):
                    self._decoder_block(block, found, watch, handover, encode=wanted in todo)
                elif block.name == "embed" and self._is_forward("embed"):
                    self._embed(block, watch)
                loader.release(block)
                if wanted in todo:
                    self._finish(block.name, found, watch, handover)

    def _todo(self) -> list[tuple[str, list[Item]]]:
        """Blocks of which the artifact lacks something, and what to do with their tensors."""
        blocks = [b for b in self.plan.blocks if b not in self.journal.done and self.plan.block_tensors(b)]
        kept: dict[TensorSpec, list[str]] = defaultdict(list)
        encoded = set()
        for tensor in self.plan.tensors:
            if tensor.encoded:
                encoded.add(tensor.spec.name)
            elif tensor.block == tensor.spec.block:
                kept[tensor.spec].append(tensor.name)
        wanted = set(blocks)
        specs = [s for s in self.plan.source_specs if s.block in wanted]
        items = self._items(specs, kept, lambda s: self._is_forward(s.block) or s.name in encoded)
        return [(block, items[block]) for block in blocks]

    def _items(
        self,
        specs: Sequence[TensorSpec],
        kept: Mapping[TensorSpec, Sequence[str]],
        on_device: Callable[[TensorSpec], bool],
    ) -> dict[str, list[Item]]:
        return items_of(specs, kept, on_device, self.ranks.share, self.plan.dims.experts)

    def _again(self) -> list[tuple[str, list[Item]]]:
        """Finished blocks that must be computed once more, for the residual streams behind them were not saved."""
        forward = [block for block in self.plan.blocks if self._is_forward(block)]
        finished = [block for block in forward if block in self.journal.done]
        if self.ranks.is_leader:
            self._streams.forget_but(finished)
        self.ranks.wait_for_all()
        if len(finished) == len(forward) or not finished:
            return []
        saved = self._streams.restore(finished)
        missing = finished[finished.index(saved) + 1 :] if saved else finished
        wanted = set(missing)
        specs = [s for s in self.plan.source_specs if s.block in wanted]
        items = self._items(specs, {}, lambda _: True)
        return [(block, items[block]) for block in missing]

    def _slots(self) -> int:
        """Blocks on the device at once: two if a GPU has room for them."""
        if self.device.type != "cuda":
            return 1
        free, _ = torch.cuda.mem_get_info(self.device)
        return 2 if free > self.plan.estimate.gpu_ahead else 1

    # ------------------------------------------------------------------------------------------------ one block

    def _next(self, blocks: Iterator[LoadedBlock], wanted: tuple[str, list[Item]], watch: Stopwatch) -> LoadedBlock:
        with watch.stage("read"):
            block = next(blocks)
            assert block.name == wanted[0], f"{wanted[0]} is wanted, {block.name} comes"
            block.wait()
        return block

    def _put_in_place(self, block: LoadedBlock, *, encode: bool) -> None:
        """Tensors into their modules; experts that are worked on as stacks have no use for theirs."""
        stacked = block.experts is not None and (not encode or self._linears_of(block.name).layout is not None)
        for spec, tensor in block.tensors.items():
            if spec.expert is None or not stacked:
                set_tensor(self.model, spec.hf_name, tensor)
        copies = [t for t in self.plan.block_tensors(block.name) if not t.encoded and t.block != t.spec.block]
        for number, copy in enumerate(copies):
            if self.ranks.share.has(number):
                self.writer.put(block.name, [(copy.name, self.source.read(copy.spec.name))])

    def _embed(self, block: LoadedBlock, watch: Stopwatch) -> None:
        self._check_finite(block)
        with watch.stage("forward"):
            batches = self._batches()
            self._streams.through("embed", lambda n, _: embed(self.model, batches[n].to(self.device)))
        release(self.model.model.embed_tokens)
        self.advance("embed", block.nbytes)

    def _decoder_block(
        self, block: LoadedBlock, found: Found, watch: Stopwatch, handover: Handover, *, encode: bool
    ) -> None:
        index = int(block.name.removeprefix("layers."))
        layer = self.model.model.layers[index]
        linears = self._linears_of(block.name) if encode else BlockLinears()
        stack = None
        if linears.layout is not None and block.experts is not None:
            stack = ExpertStack(linears.layout, block.experts)
        modules = BlockModules(linears.without(stack), self.device)
        modules.prepare()
        if not self.ranks.is_alone:
            modules.check_order_does_not_matter(len(self._streams.shapes) >= self.ranks.share.count)
        seen: BatchedExperts | None = None
        if self._is_forward(block.name):
            with watch.stage("forward"):
                seen = self._forward(index, block, found, batched=stack is not None or not encode)
        else:
            self._check_finite(block)
        if encode:
            with watch.stage("statistics"):
                self._settle(index, modules, stack, seen, found)
            self._encode(block, modules, stack, found, watch, handover)
        self._linears.pop(block.name, None)
        release(layer, but=layer.mlp.experts if stack is not None or not encode else None)
        self.advance(block.name, block.nbytes - block.nbytes // 2)

    def _linears_of(self, block: str) -> BlockLinears:
        """The linears of a block to be encoded; found once, of the next block while the device computes."""
        if block not in self._linears:
            members = members_of(self.model, self.plan.block_tensors(block))
            self._linears[block] = BlockLinears(tuple(members), StackLayout.of(members))
        return self._linears[block]

    def _check_finite(self, block: LoadedBlock) -> None:
        block.check_finite(lambda spec: f"{spec.name} in {self.source.tensors[spec.name].file}")

    def _forward(self, index: int, block: LoadedBlock, found: Found, *, batched: bool) -> BatchedExperts | None:
        """Send every micro-batch through block `index`; `batched` computes the experts as stacks."""
        mlp = self.model.model.layers[index].mlp
        activations = self.plan.config.activations
        experts = counts = None
        finite: list[torch.Tensor] = []
        with ExitStack() as until_the_end:
            if batched and block.experts is not None:
                limit = float(self.model.config.swiglu_limit)
                experts = BatchedExperts(block.experts, limit, all_tokens=activations.experts == "all")
                counts = experts.counts
                until_the_end.enter_context(experts_forward(mlp.experts, experts))
            else:
                counts = torch.zeros(self.plan.dims.experts, dtype=torch.int64, device=self.device)
                hook = mlp.gate.register_forward_hook(partial(_count, counts))
                until_the_end.callback(hook.remove)

            def compute(number: int, streams: torch.Tensor | None) -> torch.Tensor:
                self.check_stop()
                assert streams is not None
                ids = self._batches()[number].to(self.device)
                out = run_block(self.model, index, streams, ids, self._inputs_of(ids))
                finite.append(torch.isfinite(out).all())
                self.advance(block.name, block.nbytes // 2 // len(self._streams))
                return out

            self._streams.through(block.name, compute)
        following = f"layers.{index + 1}"
        if index + 1 < self.plan.dims.layers and following not in self.journal.done:
            self._linears_of(following)
        self._check_finite(block)
        fine = dict(zip(self._streams.mine, torch.stack(finite).tolist() if finite else [], strict=True))
        if not all(fine.values()):
            raise CalibrationError(
                "The activations became non-finite while calibrating",
                where=f"{block.name}, micro-batch {next(n for n, good in fine.items() if not good)}",
                expected="finite residual streams",
                found="NaN or Inf",
                hint="the source's weights of this layer are damaged or not of this architecture",
            )
        if experts is not None:
            experts.gather(self.ranks)
        else:
            self.ranks.total(counts)
        found.record["tokens_per_expert"] = counts.tolist()
        return experts

    def _inputs_of(self, ids: torch.Tensor) -> BlockInputs:
        """Positions, rotary and mask, which are the same for all micro-batches of one shape and all blocks."""
        key = tuple(ids.shape)
        if key not in self._inputs:
            self._inputs[key] = block_inputs(self.model, ids)
        return self._inputs[key]

    def _settle(
        self, index: int, modules: BlockModules, stack: ExpertStack | None, seen: BatchedExperts | None, found: Found
    ) -> None:
        """Find the scales of the inputs, and those of the weights that are calibrated as modules."""
        modules.check_observed()
        modules.settle_weight_scales()
        with weights_on_every_rank():
            LifecycleCallbacks.sequential_epoch_end([m.module for m in modules.members])
        bounds = self._input_bounds(index)
        activations = self.plan.config.activations
        unseen: set[int] = set()
        if activations.scales == "bound":
            modules.bound_input_scales(bounds)
        else:
            unseen.update(modules.settle_input_scales(activations))
        amax = modules.input_amax()
        if stack is not None and stack.stores_input_scales:
            if activations.scales == "bound":
                stack.bound_input_scales(bounds)
            else:
                assert seen is not None
                unseen.update(stack.observed_input_scales(seen, f"layers.{index}", activations))
            amax |= stack.input_amax()
        if activations.scales != "bound":
            found.record["experts_without_tokens"] = sorted(unseen)
        found.record["input_amax"] = {
            projection: {"used": used, "bound": bounds[projection]}
            for projection, used in amax.items()
            if projection in bounds
        }

    def _input_bounds(self, index: int) -> dict[str, float]:
        """Largest magnitude that the inputs of a block's routed experts can have, whatever the data.

        w1 and w3 read an RMSNorm's output, each element at most sqrt(D) times its weight; w2 reads
        silu(gate) * up with gate and |up| clamped to swiglu_limit.
        """
        norm = self.source.tensor(f"layers.{index}.ffn_norm.weight").to(torch.float32)
        wide = math.sqrt(norm.numel()) * float(norm.abs().amax())
        limit = float(self.source.config.get("swiglu_limit", 10.0))
        return {"w1": wide, "w3": wide, "w2": limit * limit}

    def _encode(
        self,
        block: LoadedBlock,
        modules: BlockModules,
        stack: ExpertStack | None,
        found: Found,
        watch: Stopwatch,
        handover: Handover,
    ) -> None:
        share = self.ranks.share
        for number, batch in enumerate(modules.batches()):
            self.check_stop()
            if not share.has(number):
                continue
            with watch.stage("encode"):
                stored = batch.encode()
                batch.measure(stored, found.errors[batch.role])
                self._hand_over(block.name, batch.members, stored, found, handover)
            for member in batch.members:
                release(member.module)
        if stack is None:
            return
        parts = stack.parts(share.experts(self.plan.dims.experts))
        while True:
            self.check_stop()
            with watch.stage("encode"):
                part = next(parts, None)
                if part is None:
                    return
                self._hand_over(block.name, part.members, part.stored, found, handover)
                names, errors = [m.spec.name for m in part.members], found.errors[part.members[0].spec.role]
                sums = handover.to_host(part.sums)
            handover.then(partial(_add_errors, errors, names, sums))

    def _hand_over(
        self, block: str, members: tuple[Member, ...], stored: State, found: Found, handover: Handover
    ) -> None:
        def look(host: Any) -> None:
            check_scales(members, host)
            found.note_scales(members, host)

        handover.tensors(block, members, stored, look)

    def _finish(self, block: str, found: Found, watch: Stopwatch, handover: Handover) -> None:
        """Have the block made durable and written into the journal, behind the computation."""
        wanted = self._is_forward(block) and self.ranks.from_leader(self._streams.should_be_saved)
        save = self._streams.to_save() if wanted else None

        def on_disk(digests: Mapping[str, str], seconds: float) -> None:
            """Runs in the writer's thread while other blocks compute; the journal's line comes last."""
            if save is not None:
                save()
            spent = {**watch.seconds(), "sync": seconds, "done_at": time.monotonic() - self._begin}
            parts = self.ranks.gathered((found, dict(digests), spent), behind=True)
            if not self.ranks.is_leader:
                return
            record = Found.merged([part for part, _, _ in parts]).as_record()
            record["seconds"] = {name: round(value, 4) for name, value in spent.items()}
            record["memory"] = memory_now(self.device)
            record["digest"] = block_digest({name: d for _, part, _ in parts for name, d in part.items()})
            self.journal.finish_block(block, record)
            if save is not None:
                self._streams.drop_before(block, self.plan.blocks)

        handover.then(lambda: self.writer.finish(block, on_disk))

    def _batches(self) -> tuple[torch.Tensor, ...]:
        return () if self.data is None else self.data.batches

    def _is_forward(self, block: str) -> bool:
        return self.data is not None and (block == "embed" or block.startswith("layers."))


def _count(counts: torch.Tensor, _module: torch.nn.Module, _args: object, output: tuple[torch.Tensor, ...]) -> None:
    counts.add_(torch.bincount(output[2].reshape(-1), minlength=len(counts)))


def _add_errors(errors: Errors, names: Sequence[str], sums: Callable[[], torch.Tensor]) -> None:
    errors.add_all(names, sums().tolist())
