"""The calibration pipeline that holds one block at a time, run inside one genuine llmcompressor `oneshot`.

llmcompressor's recipe, modifier, observers and lifecycle do the calibrating; what is ours is where the weights live,
and that many are worked on at once. The way there and back: `run_oneshot` builds a model on the meta device, hangs a
`BlockLoop` on it and calls `oneshot`, which ends up in `StreamingPipeline`, which takes the loop off the model and runs
it. For each block: its tensors are read (`loader.py`), calibration tokens go through it, scales are found, its linears
encoded (`block.py`) and written (`handover.py`), and back it goes to meta. The next block is on its way to the device
meanwhile, and the one before to the disk. What nothing computes with is copied before (`copying.py`).
"""

from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch
import yaml

from dsv4q.checkpoint.writer import BackgroundWriter, block_digest
from dsv4q.host import end_beginning, memory_now
from dsv4q.model.upstream import quiet_libraries
from dsv4q.plan.plan import Plan
from dsv4q.run.copying import Copying
from dsv4q.run.loader import BlockTask, LoadedBlock
from dsv4q.run.schedule import Schedule
from dsv4q.run.stopwatch import Stopwatch

with quiet_libraries():
    from llmcompressor import oneshot
    from llmcompressor.core import LifecycleCallbacks, reset_session
    from llmcompressor.pipelines.registry import CalibrationPipeline
    from llmcompressor.utils.helpers import DisableQuantization, calibration_forward_context

    from dsv4q.model.model import DeepseekV4ForCausalLMWithMTP, build_meta_model, rebuild_rotary
    from dsv4q.run.block import BlockWorker
    from dsv4q.run.handover import Handover
    from dsv4q.run.record import BlockRecord

PIPELINE = "dsv4q_stream"


@CalibrationPipeline.register(PIPELINE)
class StreamingPipeline(CalibrationPipeline):
    """Registered with llmcompressor; `oneshot(pipeline="dsv4q_stream")` ends up here."""

    @staticmethod
    def __call__(model: torch.nn.Module, dataloader: object, dataset_args: object) -> None:
        """Run the `BlockLoop` that was attached to the model; it has its own batches."""
        loop = cast("BlockLoop", model.block_loop)
        LifecycleCallbacks.calibration_start()
        with calibration_forward_context(model), DisableQuantization(model):
            loop.run()
        LifecycleCallbacks.calibration_end()


def run_oneshot(
    plan: Plan, folder: Path, device: torch.device, make_loop: Callable[[DeepseekV4ForCausalLMWithMTP], BlockLoop]
) -> None:
    """Build the meta model, hand it to `oneshot` with the plan's recipe, and let `make_loop`'s loop run.

    Args:
        folder: work folder; the model's config.json goes there, for `oneshot` reads it again from disk and refuses
            a model whose config names another quantization, which a dequantized checkpoint's may well do.
    """
    settings = {key: value for key, value in plan.artifact_config.items() if key != "quantization_config"}
    # Several ranks must not write one file at once.
    home = folder / f"model.{os.getpid()}"
    home.mkdir(exist_ok=True)
    (home / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    # tokenizers' threads and llmcompressor's dataset workers do not mix; it sets this itself, with a warning
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with quiet_libraries():
        model = build_meta_model(settings, str(home), 1 if plan.experts_in_stacks else None)
        rebuild_rotary(model, device)
        model.block_loop = make_loop(model)
        try:
            oneshot(
                model=model,
                processor=object(),
                recipe=yaml.safe_dump(plan.library_recipe()),
                pipeline=PIPELINE,
                moe_calibrate_all_experts=plan.config.activations.experts == "all",
            )
        finally:
            del model.block_loop
            reset_session()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@dataclass
class BlockLoop:
    """One run over the blocks of a plan, and all that it needs."""

    model: DeepseekV4ForCausalLMWithMTP
    schedule: Schedule
    blocks: Iterator[LoadedBlock]
    """Those of the schedule, as they come in."""
    copying: Copying
    """Has what nothing computes with, and has begun."""
    writer: BackgroundWriter
    _begin: float = field(default_factory=time.monotonic, init=False)

    def run(self) -> None:
        """Every block of the schedule.

        Raises:
            WeightError: NaN or Inf in a source tensor.
            CalibrationError: non-finite residual streams, a scale that is not positive and finite.
            RankError: another rank is gone, or observers need to see all batches in order.
        """
        end_beginning()
        schedule, device = self.schedule, self.schedule.device
        copied = deque(self.copying.tasks)
        with Handover(self.writer, device) as handover:
            worker = self._worker(handover)
            for task in schedule.tasks:
                watch = Stopwatch(device)
                block = self._next(self.blocks, task, watch)
                record = worker.process(block, watch)
                schedule.loader.release(block)
                if task.encode:
                    if task.name != "embed":  # by the end of a layer they are copied, or the disk has no time left
                        self._finish_copied(copied, handover)
                    self._finish(task.name, record, watch, handover)
            self._finish_copied(copied, handover)

    def _worker(self, handover: Handover) -> BlockWorker:
        here = self.schedule
        # A copy to the device for every block and micro-batch would wait each time until the device has come so far.
        batches = [ids.to(here.device) for ids in here.batches]
        return BlockWorker(
            self.model, here.plan, here.work, here.source, batches, here.streams, here.device, here.ranks,
            handover, here.advance, here.check_stop,
        )  # fmt: skip

    def _next(self, blocks: Iterator[LoadedBlock], task: BlockTask, watch: Stopwatch) -> LoadedBlock:
        with watch.stage("read"):
            block = next(blocks)
            assert block.task is task, f"{task.name} is wanted, {block.task.name} comes"
            block.begin()
        return block

    # ----------------------------------------------------------------------------------------------- a block is done

    def _finish_copied(self, tasks: deque[BlockTask], handover: Handover) -> None:
        """Finish what is copied, at one place among all blocks, for ranks talk to each other when they finish one."""
        while tasks:
            task, watch = tasks.popleft(), Stopwatch(self.schedule.device)
            with watch.stage("read"):
                record = BlockRecord(self.copying.done(task, self.schedule.check_stop))
            self._finish(task.name, record, watch, handover)

    def _finish(self, block: str, record: BlockRecord, watch: Stopwatch, handover: Handover) -> None:
        """Have the block made durable and written into the journal, behind the computation."""
        here, streams = self.schedule, self.schedule.streams
        wanted = here.work.is_forward(block) and here.ranks.from_leader(streams.should_be_saved)
        save = streams.to_save() if wanted else None

        def on_disk(digests: Mapping[str, str], seconds: float) -> None:
            """Runs in the writer's thread while other blocks compute; the journal's line comes last."""
            if save is not None:
                save()
            spent = {**watch.seconds(), "sync": seconds, "done_at": time.monotonic() - self._begin}
            parts = here.ranks.gathered((record, dict(digests), spent), behind=True)
            if not here.ranks.is_leader:
                return
            line = BlockRecord.merged([part for part, _, _ in parts])
            for rank, (_, _, of_rank) in zip(line["ranks"], parts, strict=True):
                rank["seconds"] = {name: round(value, 4) for name, value in of_rank.items()}
            line["seconds"] = line["ranks"][0]["seconds"]
            line["memory"] = memory_now(here.device)
            line["digest"] = block_digest({name: d for _, part, _ in parts for name, d in part.items()})
            here.journal.finish_block(block, line)
            if save is not None:
                streams.drop_before(block, here.plan.blocks)

        handover.put(lambda: self.writer.finish(block, on_disk))
