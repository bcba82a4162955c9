"""What a run needs at most: host and GPU memory, disk, residual streams; from the shapes alone."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace

from dsv4q.checkpoint.shards import PlannedShard
from dsv4q.checkpoint.writer import WRITE_BEHIND
from dsv4q.config import Config
from dsv4q.errors import DeviceError
from dsv4q.layout import Dims, TensorSpec

RUNTIME_BYTES = 1_500_000_000
"""Python, torch, llmcompressor and the meta-device model; measured, see docs/log.md."""

READ_AHEAD = 4_000_000_000
"""Bytes read before they are needed, at most; a block at most where blocks are smaller."""

ENCODE_BYTES = 2_000_000_000
"""On a GPU: temporaries of the encoder, and what waits to be copied to the host; less where it has few experts."""

CUDA_BYTES = 700_000_000
"""What CUDA and its libraries take of a GPU before torch allocates anything."""

WINDOW_BYTES = 800_000_000
"""Experts that are BF16 at once where the others stay packed."""

STREAMS_IN_MEMORY = 12_000_000_000
"""Residual streams of all samples stay on the GPU between two blocks if it has the room. If not, they are kept on the
host up to this size, and beyond it on disk, micro-batch by micro-batch."""


@dataclass(frozen=True)
class GpuUse:
    """One way to use a GPU's memory."""

    memories: int
    """For a block's experts: with 2, one is filled while the other is worked with; with 1, the next block's experts
    come in as soon as those of this one are wanted no more."""
    experts: int
    """Of a block that are BF16 at once; the others stay packed, and are decoded for every micro-batch."""
    keeps_streams: bool
    """Residual streams stay on the GPU between two blocks."""
    nbytes: int
    """Allocated at most."""
    read_ahead: int = READ_AHEAD
    """Bytes that the reader may hold on the host before they are needed."""


def gpu_problem(needs: Estimate, gpu_memory: int | None) -> DeviceError | None:
    """What is wrong with using no more than so many bytes of a GPU, if anything is."""
    if gpu_memory is None or needs.on_gpu(gpu_memory - CUDA_BYTES) is not None:
        return None
    return too_small(needs, f"--gpu-memory {gpu_memory}", f"{gpu_memory:,} bytes")


def too_small(needs: Estimate, where: str, found: str) -> DeviceError:
    """What a run says that no way to use the GPU fits into."""
    return DeviceError(
        "The GPU has too little memory",
        where=where,
        expected=f"{needs.gpu_least + CUDA_BYTES:,} bytes",
        found=found,
        hint="a smaller calibration.micro_batch needs less; --device cpu needs none",
    )


@dataclass(frozen=True)
class Estimate:
    """Bytes that the run needs at most."""

    host: int
    gpu: tuple[GpuUse, ...]
    """Ways to use a GPU, the fastest first."""
    disk: int
    streams: int
    """Residual streams of all calibration tokens."""
    calibration_tokens: int
    micro_batches: int
    """That the calibration tokens make."""

    @property
    def streams_elsewhere(self) -> str:
        """Where the residual streams are kept between two blocks if not on a GPU."""
        return "on disk" if self.streams > STREAMS_IN_MEMORY else "in host memory"

    @property
    def gpu_least(self) -> int:
        """Bytes on the smallest GPU that will do, without what CUDA itself takes."""
        return min(use.nbytes for use in self.gpu)

    def on_gpu(self, nbytes: int, ranks: int = 1) -> GpuUse | None:
        """The fastest way with so many bytes for torch to allocate, if there is one.

        Args:
            ranks: that share the micro-batches; what is said is of the one that has most.
        """
        most = -(-self.micro_batches // ranks)
        elsewhere = self.streams - self.streams * most // max(1, self.micro_batches)
        ways = (replace(use, nbytes=use.nbytes - 2 * elsewhere) if use.keeps_streams else use for use in self.gpu)
        return next((use for use in ways if use.nbytes <= nbytes), None)


def estimate(
    specs: list[TensorSpec], shards: tuple[PlannedShard, ...], config: Config, dims: Dims, packed: Callable[[str], int]
) -> Estimate:
    """Upper bounds from the shapes alone; docs/log.md has what runs really took.

    Args:
        packed: of a weight's name the bytes in which it may stay on the device until it is wanted, as they lie in the
            files; 0: it has to be BF16.
    """
    read: Counter[str] = Counter()
    dense: Counter[str] = Counter()
    for spec in specs:
        read[spec.block] += spec.nbytes
        dense[spec.block] += 0 if spec.expert is not None else spec.nbytes
    written: Counter[str] = Counter()
    drafted: defaultdict[str, set[TensorSpec]] = defaultdict(set)
    for shard in shards:
        for tensor in shard.tensors:
            written[tensor.block] += tensor.nbytes
            if tensor.encoded and tensor.spec.is_mtp and tensor.spec.expert is None:
                drafted[tensor.block].add(tensor.spec)
    main = [block for block in read if block.startswith("layers.")]
    block = max(read[b] + written[b] for b in main)
    largest = max(s.nbytes for s in specs)
    tokens = config.calibration.tokens if config.calibration and config.needs_data else 0
    streams = tokens * dims.hc_mult * dims.hidden * 2
    batch, micro_batches = 0, 0
    if tokens and config.calibration:
        micro_batches = -(-config.calibration.samples // config.calibration.micro_batch)
        rows = config.calibration.micro_batch * config.calibration.max_length
        scores = config.calibration.micro_batch * dims.heads * config.calibration.max_length**2
        wide = max(dims.heads * dims.head_dim, 4 * dims.moe_intermediate, 4 * dims.hc_mult * dims.hidden)
        batch = 6 * (rows * wide + 2 * scores)
    spilled = streams > STREAMS_IN_MEMORY
    disk = sum(s.nbytes for s in shards) + (3 if spilled else 2) * streams
    ahead = min(READ_AHEAD, max(read[b] for b in main))
    behind = min(WRITE_BEHIND, max(written[b] for b in main))
    held = 4 * streams // max(1, micro_batches) if spilled else 2 * streams
    host = RUNTIME_BYTES + block + held + batch + largest + ahead + behind
    experts = [spec for spec in specs if spec.block == main[0] and spec.expert is not None]
    parts = _Parts(
        dims.experts,
        sum(spec.nbytes for spec in experts),
        sum(packed(spec.name) for spec in experts),
        max(*(dense[block] for block in main), *(sum(s.nbytes for s in some) for some in drafted.values()), 0),
        largest, batch, block, streams, streams // max(1, micro_batches), ahead,
    )  # fmt: skip
    return Estimate(
        host=host, gpu=parts.ways(), disk=disk, streams=streams, calibration_tokens=tokens, micro_batches=micro_batches
    )


@dataclass(frozen=True)
class _Parts:
    """What lies on a GPU, in bytes."""

    count: int
    """Experts of a block."""
    wide: int
    """A block's experts as BF16."""
    packed: int
    """The same as they lie in the files, 0 if they cannot stay so."""
    dense: int
    """A block's other tensors."""
    largest: int
    """The largest tensor: the embedding, before the first block."""
    batch: int
    """Temporaries of one micro-batch."""
    block: int
    streams: int
    micro_batch: int
    """Residual streams of one micro-batch."""
    ahead: int
    """What the reader may hold on the host."""

    @property
    def few(self) -> int:
        """Experts that are BF16 at once where the others stay packed."""
        return max(1, min(self.count, WINDOW_BYTES * self.count // max(1, self.wide)))

    def ways(self) -> tuple[GpuUse, ...]:
        """All of them, the fastest first."""
        ways = [(2, self.count), (1, self.count)]
        if self.packed:
            # Once all are decoded their packed form is needed no more; without a forward each is decoded just once.
            ways = [(1, self.count), (2, self.few), (1, self.few)] if self.batch else [(2, self.few), (1, self.few)]
        # A GPU that has no room for a block's experts has none to spare for what the host can hold as well.
        every = [
            (*way, keeps)
            for way in ways
            for keeps in (True, False)
            if not keeps or (self.streams and way[1] == self.count)
        ]
        return tuple(GpuUse(*way, self._bytes(*way), self._ahead(*way[:2])) for way in every)

    def _ahead(self, memories: int, step: int) -> int:
        """Where the next block's experts have no place on the GPU until this one is encoded, all of them may wait on
        the host, which then has no block as BF16."""
        return self.ahead if memories > 1 or step == self.count else max(self.ahead, self.packed)

    def _bytes(self, memories: int, step: int, keeps: bool) -> int:
        window = self.wide * step // self.count
        experts = memories * self.packed + window if self.packed else memories * self.wide
        encode = min(ENCODE_BYTES, self.block, 2 * window)
        # Those that are not kept here: of one micro-batch that comes, two that are computed with, one that leaves.
        streams = 2 * self.streams if keeps else 4 * self.micro_batch
        return 2 * self.dense + experts + max(self.largest, self.batch + encode) + streams
