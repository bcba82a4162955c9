"""Pure planning: config + layout + headers -> every output tensor, its bytes, its shard, its offset.

No tensor is read and nothing is imported that takes seconds. The run executes this very object.
"""

from __future__ import annotations

import json
import math
import shutil
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from dsv4q.checkpoint.against_layout import compare_with_layout, draft_kind
from dsv4q.checkpoint.native import NativeCheckpoint, entries_of, forms_of
from dsv4q.checkpoint.source import Checkpoint
from dsv4q.checkpoint.source import require_weights as require_weights
from dsv4q.config import Config
from dsv4q.errors import ConfigError, Dsv4qError, RecipeError
from dsv4q.layout import DTYPE_BYTES, HEAD_COPIES, Dims, Shape, TensorSpec, source_tensors
from dsv4q.plan.targets import published_config, select
from dsv4q.plan.work import Share
from dsv4q.recipe.schemes import FLOAT, NVFP4, Scheme, stored_tensors

RUNTIME_BYTES = 1_500_000_000
"""Python, torch, llmcompressor and the meta-device model; measured, see docs/log.md."""

READ_AHEAD = 4_000_000_000
"""Bytes read before they are needed, at most; a block at most where blocks are smaller."""

WRITE_BEHIND = 4_000_000_000
"""Bytes that may wait to be written, a block's output: so the disk has work while the next block is computed."""

WRITE_THREADS = 6
"""sha256 takes 0.8 s a GB on one thread, and copying into the page cache half of that again."""

ENCODE_BYTES = 2_000_000_000
"""On a GPU: temporaries of the encoder, and what waits to be copied to the host."""

STREAMS_ON_GPU = 2_500_000_000
"""Residual streams of all samples up to this size stay on the GPU between two blocks."""

STREAMS_IN_MEMORY = 12_000_000_000
"""Larger ones are kept on the host, and beyond this on disk, micro-batch by micro-batch."""

QUANTIZATION_VERSION = "0.17.0"
"""compressed-tensors version stated in config.json: the oldest one whose fields we write."""


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the artifact."""

    name: str
    dtype: str
    shape: Shape
    spec: TensorSpec
    """The source tensor it is made of."""
    encoded: bool
    """False: the source's bytes. True: made by compressing the module `spec.module`."""
    block: str
    """Unit of work that writes it."""

    @cached_property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class PlannedShard:
    """One safetensors file: its exact header and the offset of every tensor in it."""

    file: str
    tensors: tuple[PlannedTensor, ...]
    """In the order in which they lie in the file: by alignment, then by the model's order."""

    @classmethod
    def of(cls, file: str, tensors: Iterable[PlannedTensor]) -> PlannedShard:
        """A shard of `tensors`, which come in the model's order."""
        # Wide dtypes first keeps every tensor aligned to its element size, as safetensors' own writer does.
        return cls(file, tuple(sorted(tensors, key=lambda t: -DTYPE_BYTES[t.dtype])))

    @cached_property
    def data_bytes(self) -> int:
        return sum(t.nbytes for t in self.tensors)

    @cached_property
    def header(self) -> bytes:
        """8 bytes of length and the JSON, padded with spaces to a multiple of 8."""
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for tensor in self.tensors:
            end = offset + tensor.nbytes
            entries[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": (offset, end)}
            offset = end
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    @property
    def nbytes(self) -> int:
        return len(self.header) + self.data_bytes

    def offsets(self) -> Iterator[tuple[PlannedTensor, int]]:
        """Tensors with their absolute offset in the file."""
        offset = len(self.header)
        for tensor in self.tensors:
            yield tensor, offset
            offset += tensor.nbytes


@dataclass(frozen=True)
class ShardPlan:
    """What is written, to which file, and where in it."""

    shards: tuple[PlannedShard, ...]

    @cached_property
    def tensors(self) -> tuple[PlannedTensor, ...]:
        return tuple(t for shard in self.shards for t in shard.tensors)

    @cached_property
    def blocks(self) -> tuple[str, ...]:
        """Units of work in order."""
        return tuple(sorted(self._by_block, key=_block_order))

    def block_tensors(self, block: str) -> tuple[PlannedTensor, ...]:
        return self._by_block.get(block, ())

    @cached_property
    def _by_block(self) -> dict[str, tuple[PlannedTensor, ...]]:
        found: dict[str, list[PlannedTensor]] = defaultdict(list)
        for tensor in self.tensors:
            found[tensor.block].append(tensor)
        return {block: tuple(tensors) for block, tensors in found.items()}

    @property
    def artifact_bytes(self) -> int:
        """Bytes of tensor data, the index's `total_size`."""
        return sum(s.data_bytes for s in self.shards)

    def index(self) -> dict[str, Any]:
        """Contents of model.safetensors.index.json."""
        weight_map = {t.name: shard.file for shard in self.shards for t in shard.tensors}
        return {"metadata": {"total_size": self.artifact_bytes}, "weight_map": dict(sorted(weight_map.items()))}


@dataclass(frozen=True)
class SourceFiles:
    """How the source lies on disk."""

    layout: str
    """`bf16`, `native` (DeepSeek's FP8 and MXFP4), or `assumed bf16` where there is just a config.json."""
    forms: dict[str, int]
    """Tensors of the model by the form that they are stored in: MXFP4, FP8, or their dtype."""
    entries: dict[str, tuple[int, int]]
    """Tensor of the model -> tensors in the files that hold it, a scale counted too, and their bytes."""

    @classmethod
    def of(cls, checkpoint: Checkpoint, specs: Iterable[TensorSpec]) -> SourceFiles:
        entries = {s.name: entries_of(checkpoint, s.name) for s in specs}
        sizes = {s.name: (1, s.nbytes) for s in specs}
        sizes |= {name: (len(found), sum(e.nbytes for e in found)) for name, found in entries.items() if found}
        if not checkpoint.has_weights:
            return cls("assumed bf16", dict(Counter(s.dtype for s in specs).most_common()), sizes)
        return cls("native" if isinstance(checkpoint, NativeCheckpoint) else "bf16", forms_of(checkpoint), sizes)


@dataclass(frozen=True)
class Estimate:
    """Bytes that the run needs at most."""

    host: int
    read_ahead: int
    """Part of `host`: what the reader may hold before it is needed."""
    gpu: int
    gpu_ahead: int
    """With the next block on the GPU while one is worked on; done where there is room."""
    disk: int
    streams: int
    """Residual streams of all calibration tokens."""
    calibration_tokens: int

    @property
    def streams_kept(self) -> str:
        """Where the residual streams are kept between two blocks when a GPU is used."""
        if self.streams > STREAMS_IN_MEMORY:
            return "on disk"
        return "in host memory" if self.streams > STREAMS_ON_GPU else "on the GPU"


@dataclass(frozen=True)
class Plan(ShardPlan):
    """What a run will read, make and write."""

    source: str
    dims: Dims
    config: Config
    source_specs: tuple[TensorSpec, ...]
    """The tensors of the model, as BF16."""
    source_files: SourceFiles
    group_of: dict[str, str]
    artifact_config: dict[str, Any]
    """The config.json to write."""
    draft: str
    """Kind of draft that the source has: none, mtp, dspark, unknown."""
    estimate: Estimate
    free_disk: int | None
    problems: tuple[Dsv4qError, ...]

    @cached_property
    def blocks(self) -> tuple[str, ...]:
        """Units of work in order, those of which nothing is written too."""
        return tuple(dict.fromkeys(s.block for s in self.source_specs))

    def as_dict(self) -> dict[str, Any]:
        """For `--json`: everything but the list of tensors."""
        mtp = [t for t in self.tensors if t.name.startswith("mtp.")]
        return {
            "source": {
                "path": self.source,
                "layout": self.source_files.layout,
                "forms": self.source_files.forms,
                "tensors": sum(count for count, _ in self.source_files.entries.values()),
                "bytes": sum(nbytes for _, nbytes in self.source_files.entries.values()),
                "classes": _classes((s, *self.source_files.entries[s.name]) for s in self.source_specs),
                "draft": self.draft,
            },
            "artifact": {
                "tensors": len(self.tensors),
                "bytes": self.artifact_bytes,
                "classes": _classes((t.spec, 1, t.nbytes) for t in self.tensors),
                "mtp_tensors": len(mtp),
                "mtp_bytes": sum(t.nbytes for t in mtp),
                "quantized_linears": dict(Counter(self.group_of.values())),
                "shards": [
                    {"file": s.file, "tensors": len(s.tensors), "bytes": s.nbytes, "blocks": _blocks_of(s)}
                    for s in self.shards
                ],
            },
            "needs": {
                "host_bytes": self.estimate.host,
                "gpu_bytes": self.estimate.gpu,
                "disk_bytes": self.estimate.disk,
                "free_disk_bytes": self.free_disk,
                "calibration_tokens": self.estimate.calibration_tokens,
                "streams_bytes": self.estimate.streams,
                "streams_kept": self.estimate.streams_kept,
            },
            "problems": [p.as_dict() for p in self.problems],
        }


def _classes(items: Iterable[tuple[TensorSpec, int, int]]) -> dict[str, dict[str, int]]:
    """Tensors and bytes by class, of (tensor of the model, tensors, bytes)."""
    found: dict[str, dict[str, int]] = {}
    for spec, count, nbytes in items:
        entry = found.setdefault(spec.class_name, {"tensors": 0, "bytes": 0})
        entry["tensors"] += count
        entry["bytes"] += nbytes
    return dict(sorted(found.items(), key=lambda item: -item[1]["bytes"]))


def _blocks_of(shard: PlannedShard) -> list[str]:
    return list(dict.fromkeys(t.block for t in sorted(shard.tensors, key=lambda t: _block_order(t.block))))


def _block_order(block: str) -> tuple[int, int]:
    kind, _, number = block.partition(".")
    return ("embed", "layers", "head", "mtp").index(kind), int(number or 0)


def make_plan(checkpoint: Checkpoint, config: Config, *, free_disk: int | None = None) -> Plan:
    """Plan a run.

    Problems of the source, of the recipe against the layout, and of the disk are collected in `Plan.problems`.

    Raises:
        SourceError: config.json does not describe a DeepSeek-V4 model.
        ConfigError: more shards than there are pieces to put into them; contradictions between config and source.
    """
    dims = Dims.from_config(checkpoint.config, checkpoint.root / "config.json")
    specs = source_tensors(dims)
    problems: list[Dsv4qError] = list(checkpoint.problems)
    if checkpoint.has_weights:
        problems += compare_with_layout(checkpoint, dims)
    selection = select(config.groups, config.ignore, specs)
    problems += selection.problems
    if config.mtp.keep and not dims.mtp_layers:
        problems.append(
            ConfigError(
                "The config keeps the MTP block but the source has none",
                where="mtp.keep",
                expected="num_nextn_predict_layers of at least 1 in the source's config.json",
                found=0,
                hint="take a config with mtp: {keep: false, shared_head_copies: false}",
            )
        )
    tensors, misfits = _artifact_tensors(specs, config, dict(selection.group_of))
    problems += misfits
    problems += _unread_by_the_consumer(config)
    shards = balanced_shards(tensors, config.output.shards)
    estimate = _estimate(specs, shards, config, dims)
    names = checkpoint.tensors if checkpoint.has_weights else (s.name for s in specs)
    return Plan(
        source=str(checkpoint.root),
        dims=dims,
        config=config,
        source_specs=tuple(specs),
        source_files=SourceFiles.of(checkpoint, specs),
        shards=shards,
        group_of=dict(selection.group_of),
        artifact_config=_artifact_config(checkpoint.config, config, dims, dict(selection.group_of)),
        draft=draft_kind(names),
        estimate=estimate,
        free_disk=free_disk,
        problems=tuple(problems),
    )


def _unread_by_the_consumer(config: Config) -> Iterator[RecipeError]:
    """Schemes that compressed-tensors stores but vLLM reads as something else, or not at all."""
    for name, scheme in config.groups.items():
        weights, inputs = scheme.weights, scheme.input_activations
        if scheme.compression_format == NVFP4:
            fits = (weights.strategy, weights.group_size, weights.symmetric) == ("tensor_group", 16, True)
            fits = fits and (inputs is None or (inputs.strategy, inputs.dynamic) == ("tensor_group", "local"))
            expected = "symmetric tensor_group of 16; inputs none, or tensor_group with dynamic: local"
        elif scheme.compression_format == FLOAT and weights.strategy == "block":
            fits, expected = weights.block_structure == (128, 128), "blocks of 128x128"
        else:
            continue
        if not fits:
            yield RecipeError(
                "The consumer cannot read this form of the scheme",
                where=f"recipe: config_groups.{name}",
                expected=f"{scheme.compression_format} with {expected}",
                found=f"weights {weights.strategy} {weights.block_structure or weights.group_size}"
                + ("" if inputs is None else f", inputs {inputs.strategy}, dynamic: {inputs.dynamic}"),
            )


def _artifact_tensors(
    specs: list[TensorSpec], config: Config, group_of: dict[str, str]
) -> tuple[list[PlannedTensor], list[Dsv4qError]]:
    stored: dict[tuple[str, Shape], tuple[tuple[str, str, Shape], ...]] = {}
    problems: list[Dsv4qError] = []
    tensors: list[PlannedTensor] = []
    for spec in specs:
        group = group_of.get(spec.module) if spec.is_quantizable else None
        if spec.is_mtp and not config.mtp.keep:
            continue
        if group is None:
            tensors.append(PlannedTensor(spec.name, spec.dtype, spec.shape, spec, False, spec.block))
            continue
        key = (group, spec.shape)
        if key not in stored:
            stored[key] = _stored(config.groups[group], spec, problems)
        for suffix, dtype, shape in stored[key]:
            tensors.append(PlannedTensor(f"{spec.module}.{suffix}", dtype, shape, spec, True, spec.block))
    if config.mtp.shared_head_copies:
        tensors += _head_copies(specs)
    return tensors, problems


def _stored(scheme: Scheme, spec: TensorSpec, problems: list[Dsv4qError]) -> tuple[tuple[str, str, Shape], ...]:
    try:
        return stored_tensors(scheme, spec.shape)
    except Dsv4qError as error:
        error.where = error.where or spec.name
        error.args = (error.text(),)
        problems.append(error)
        return (("weight", spec.dtype, spec.shape),)


def _head_copies(specs: list[TensorSpec]) -> Iterator[PlannedTensor]:
    by_name = {s.name: s for s in specs}
    for block in dict.fromkeys(s.block for s in specs if s.is_mtp):
        for suffix, main in HEAD_COPIES.items():
            spec = by_name[main]
            yield PlannedTensor(f"{block}.{suffix}", spec.dtype, spec.shape, spec, False, block)


def balanced_shards(
    tensors: list[PlannedTensor], count: int, asked_by: str = "output.shards"
) -> tuple[PlannedShard, ...]:
    """Cut the model's order into exactly `count` contiguous shards as equal as whole pieces allow.

    A piece is one routed expert or one other module; it is never cut. Each cut is the piece boundary nearest to
    its ideal place, k/count of all bytes.
    """
    pieces: list[list[PlannedTensor]] = []
    key = None
    for tensor in tensors:
        this = (tensor.block, tensor.spec.expert if tensor.spec.expert is not None else tensor.name.rpartition(".")[0])
        if this != key:
            pieces.append([])
        pieces[-1].append(tensor)
        key = this
    if count > len(pieces):
        raise ConfigError(
            "More shards are asked for than there are pieces to put into them",
            where=asked_by,
            expected=f"at most {len(pieces)}",
            found=count,
        )
    ends = _cuts([sum(t.nbytes for t in piece) for piece in pieces], count)
    shards = []
    for number, (start, end) in enumerate(zip([0, *ends], ends, strict=False), 1):
        members = [tensor for piece in pieces[start:end] for tensor in piece]
        shards.append(PlannedShard.of(shard_name(number, count), members))
    return tuple(shards)


def shard_name(number: int, count: int) -> str:
    """Name of shard `number`, from 1, of `count`."""
    return f"model-{number:05d}-of-{count:05d}.safetensors"


def _cuts(sizes: list[int], count: int) -> list[int]:
    """End index of each of `count` contiguous parts of `sizes`, none empty."""
    sums = [0]
    for size in sizes:
        sums.append(sums[-1] + size)
    ends: list[int] = []
    for k in range(1, count):
        ideal = sums[-1] * k / count
        at = bisect_left(sums, ideal)
        if at > 0 and ideal - sums[at - 1] <= sums[at] - ideal:
            at -= 1
        least = (ends[-1] if ends else 0) + 1
        most = len(sizes) - (count - k)
        ends.append(min(max(at, least), most))
    return [*ends, len(sizes)]


def _artifact_config(source: dict[str, Any], config: Config, dims: Dims, group_of: dict[str, str]) -> dict[str, Any]:
    """The source's config.json, every key kept, with our quantization_config; without MTP its count is 0."""
    result = {key: value for key, value in source.items() if key != "quantization_config"}
    if not config.mtp.keep and "num_nextn_predict_layers" in result:
        result["num_nextn_predict_layers"] = 0
    result["quantization_config"] = published_config(config.groups, group_of, dims, QUANTIZATION_VERSION)
    return result


def _estimate(specs: list[TensorSpec], shards: tuple[PlannedShard, ...], config: Config, dims: Dims) -> Estimate:
    """Upper bounds from the shapes alone; docs/log.md has what runs really took."""
    read: Counter[str] = Counter()
    for spec in specs:
        read[spec.block] += spec.nbytes
    written: Counter[str] = Counter()
    for shard in shards:
        for tensor in shard.tensors:
            written[tensor.block] += tensor.nbytes
    main = [block for block in read if block.startswith("layers.")]
    block = max(read[b] + written[b] for b in main)
    largest = max(s.nbytes for s in specs)
    tokens = config.calibration.tokens if config.calibration and config.needs_data else 0
    streams = tokens * dims.hc_mult * dims.hidden * 2
    batch, micro_batches = 0, 1
    if tokens and config.calibration:
        micro_batches = -(-config.calibration.samples // config.calibration.micro_batch)
        rows = config.calibration.micro_batch * config.calibration.max_length
        scores = config.calibration.micro_batch * dims.heads * config.calibration.max_length**2
        wide = max(dims.heads * dims.head_dim, 4 * dims.moe_intermediate, 4 * dims.hc_mult * dims.hidden)
        batch = 6 * (rows * wide + 2 * scores)
    spilled = streams > STREAMS_IN_MEMORY
    on_gpu = 2 * streams if streams <= STREAMS_ON_GPU else 0
    ahead_on_gpu = max(read[b] for b in main)
    gpu = ahead_on_gpu + batch + min(ENCODE_BYTES, block) + largest + on_gpu
    disk = sum(s.nbytes for s in shards) + (3 if spilled else 2) * streams
    ahead = min(READ_AHEAD, max(read[b] for b in main))
    behind = min(WRITE_BEHIND, max(written[b] for b in main))
    held = 4 * streams // max(1, micro_batches) if spilled else 2 * streams
    host = RUNTIME_BYTES + block + held + batch + largest + ahead + behind
    return Estimate(
        host=host, read_ahead=ahead, gpu=gpu, gpu_ahead=gpu + ahead_on_gpu, disk=disk, streams=streams,
        calibration_tokens=tokens,
    )  # fmt: skip


def rank_shares(plan: Plan, count: int) -> list[dict[str, Any]]:
    """What each of `count` ranks reads, computes and writes, by rank."""
    shares = [Share(rank, count) for rank in range(count)]
    read, write, linears = Counter[int](), Counter[int](), Counter[int]()
    for block in plan.blocks:
        planned: dict[str, list[PlannedTensor]] = defaultdict(list)
        for tensor in plan.block_tensors(block):
            planned[tensor.spec.name].append(tensor)
        used = plan.estimate.calibration_tokens > 0 and (block == "embed" or block.startswith("layers."))
        others = 0
        for number, spec in enumerate(s for s in plan.source_specs if s.block == block):
            outputs = planned[spec.name]
            encoded = any(t.encoded for t in outputs)
            if encoded and spec.expert is None:
                writer = others % count
                others += 1
            elif spec.expert is not None and (encoded or used):
                writer = next(s.rank for s in shares if spec.expert in s.experts(plan.dims.experts))
            else:
                writer = number % count
            linears[writer] += encoded
            write[writer] += sum(t.nbytes for t in outputs)
            everybody = (used or encoded) and spec.expert is None
            for rank in range(count) if everybody else (writer,) if used or encoded or outputs else ():
                read[rank] += plan.source_files.entries[spec.name][1]
        copies = [t for t in plan.block_tensors(block) if not t.encoded and t.spec.block != block]
        for number, copy in enumerate(copies):
            write[number % count] += copy.nbytes
            read[number % count] += plan.source_files.entries[copy.spec.name][1]
    calibration = plan.config.calibration
    samples = calibration.samples if calibration is not None and plan.estimate.calibration_tokens else 0
    batches = -(-samples // calibration.micro_batch) if calibration is not None else 0
    return [
        {"rank": s.rank, "read_bytes": read[s.rank], "micro_batches": len(s.among(batches)),
         "encoded_linears": linears[s.rank], "write_bytes": write[s.rank]}
        for s in shares
    ]  # fmt: skip


def first_problem(problems: Sequence[Dsv4qError], see: str) -> Dsv4qError:
    """The first problem; its hint tells how many more there are, and `see` what lists them."""
    error = problems[0]
    if len(problems) > 1:
        more = f"{len(problems) - 1} more problem(s); {see}"
        error.hint = f"{error.hint}; {more}" if error.hint else more
        error.args = (error.text(),)
    return error


def with_problem(plan: Plan, problem: Dsv4qError | None) -> Plan:
    """The same plan with one more problem, if there is one."""
    return plan if problem is None else replace(plan, problems=(*plan.problems, problem))


def artifact_config_text(plan: Plan) -> str:
    """config.json of the artifact."""
    return json.dumps(plan.artifact_config, indent=2, ensure_ascii=False) + "\n"


def index_text(plan: ShardPlan) -> str:
    """model.safetensors.index.json of the artifact."""
    return json.dumps(plan.index(), indent=2) + "\n"


def free_bytes(path: Path) -> int:
    """Bytes that an ordinary user can still write where `path` lies or will lie."""
    probe = path.absolute()
    while not probe.exists():
        probe = probe.parent
    return shutil.disk_usage(probe).free
