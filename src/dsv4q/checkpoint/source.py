"""A checkpoint as it lies on disk: headers first, bytes on demand, every problem named.

The index of several shards is `model.safetensors.index.json`: `weight_map` (tensor -> file) and `metadata.total_size`
(bytes of data). Index and headers must agree exactly; a file name that leads out of the folder is never followed.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from dsv4q.checkpoint.downloads import Holes, check_downloads, find_holes
from dsv4q.checkpoint.files import AGAIN, INDEX, read_at
from dsv4q.checkpoint.folder import (
    check_lone_files,
    check_places,
    check_strays,
    folder_files,
    is_readable,
    load_model_config,
    promise,
    read_index,
    usable_files,
)
from dsv4q.checkpoint.headers import MAX_HEADER, Findings, TensorEntry, read_shard, shown
from dsv4q.checkpoint.reading import OpenFiles
from dsv4q.errors import SourceError, WeightError, command, first_problem
from dsv4q.formats.dtypes import tensor_bytes, torch_dtypes
from dsv4q.layout import DTYPE_BYTES

if TYPE_CHECKING:
    import torch

SAMPLES, SAMPLE_BYTES = 16, 4096

ALIGNED = 512
"""Where in memory tensors that are read together begin."""


# ------------------------------------------------------------------------------------------------ checkpoint


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's headers, and the way to its bytes. Reading is safe from several threads; closing is not."""

    root: Path
    config: dict[str, Any]
    """Parsed config.json."""
    tensors: dict[str, TensorEntry]
    files: dict[str, int]
    """Shard file name -> size on disk in bytes."""
    problems: tuple[SourceError, ...]
    """Everything found wrong in index and headers."""
    has_weights: bool
    """False when the folder (or file) holds only a config.json."""
    config_file: Path
    warnings: tuple[SourceError, ...] = ()
    """What is odd there, but stops nothing."""
    hidden: Mapping[str, str] = field(default_factory=dict)
    """Tensors that index or headers promise, of which a problem hides dtype and shape -> the shard they are said to be
    in."""
    _handles: OpenFiles = field(default_factory=OpenFiles, repr=False, compare=False)

    def read(self, name: str) -> memoryview:
        """Raw bytes of one tensor, in memory of its own.

        Raises:
            SourceError: no such tensor, the file changed or ends early, the disk fails.
        """
        buffer = memoryview(bytearray(self._entry(name).nbytes))
        self.read_into(name, buffer)
        return buffer

    def read_into(self, name: str, buffer: memoryview) -> None:
        """Read one tensor's raw bytes into `buffer`: writable, contiguous, exactly the tensor's size.

        Raises:
            ValueError: a buffer of another size (a defect of the caller).
            SourceError: as `read`.
        """
        entry = self._entry(name)
        if buffer.nbytes != entry.nbytes:
            raise ValueError(f"{name} has {entry.nbytes} bytes, the buffer {buffer.nbytes}")
        if entry.nbytes:
            self.read_part(name, 0, buffer.cast("B"))

    def read_part(self, name: str, start: int, buffer: memoryview) -> None:
        """Read those raw bytes of a tensor into `buffer` (bytes) that begin at byte `start` of it.

        Raises:
            SourceError: as `read`.
        """
        if not len(buffer):
            return
        entry = self._entry(name)
        self._handles.fill(self.root, self.files, [(entry, buffer)], entry.start + start)

    def read_many(self, wanted: Sequence[tuple[str, memoryview]]) -> None:
        """`read_into` of several tensors, in few calls of the system.

        Raises:
            ValueError, SourceError: as `read_into`.
        """
        places = [(self._entry(name), buffer.cast("B")) for name, buffer in wanted]
        for entry, buffer in places:
            if buffer.nbytes != entry.nbytes:
                raise ValueError(f"{entry.name} has {entry.nbytes} bytes, the buffer {buffer.nbytes}")
        self._handles.read(self.root, self.files, places)

    def stored(self, name: str, *, pinned: bool = False) -> tuple[torch.Tensor, ...]:
        """What lies in the files of one tensor, as it lies there: itself, or a packed weight and its scale.

        Args:
            pinned: in page-locked memory, from which copies to a GPU run at full speed.

        Raises:
            SourceError: as `tensor`.
        """
        return tuple(part[0] for part in self.stored_together([name], pinned=pinned))

    def stored_together(self, names: Sequence[str], *, pinned: bool = False) -> tuple[torch.Tensor, ...]:
        """`stored` of T tensors that are stored alike, each part of them in one piece [T, ...].

        Raises:
            SourceError: as `tensor`.
        """
        return self.stored_rows([names], pinned=pinned)[0]

    def stored_rows(self, rows: Sequence[Sequence[str]], *, pinned: bool = False) -> list[tuple[torch.Tensor, ...]]:
        """`stored_together` of several rows of tensors, all of them in one piece of memory.

        Raises:
            SourceError: as `tensor`.
        """
        return [(tensors,) for tensors in self._filled([[self._entry(n) for n in row] for row in rows], pinned)]

    def decoded(self, name: str, stored: Sequence[torch.Tensor]) -> torch.Tensor:
        """The tensor that `stored` stands for, on the device where that lies; of T tensors stored alike [T, ...].

        Raises:
            WeightError: it stands for none, only where it is packed; names the tensor, the first of several.
        """
        (tensor,) = stored
        return tensor

    def decoded_together(self, names: Sequence[str], stored: Sequence[torch.Tensor]) -> torch.Tensor:
        """`decoded` of what `stored_together` gives; an error is that of the tensor that has it.

        Raises:
            WeightError: as `decoded`.
        """
        try:
            return self.decoded(names[0], stored)
        except WeightError:
            for name, *parts in zip(names, *stored, strict=True):
                self.decoded(name, parts)
            raise

    def _filled(self, rows: Sequence[Sequence[TensorEntry]], pinned: bool) -> list[torch.Tensor]:
        """Of each row of tensors of one dtype and shape [T, ...]."""
        import torch

        for row in rows:
            self._check_alike(row)
        sizes = [-(-len(row) * row[0].nbytes // ALIGNED) * ALIGNED for row in rows]
        whole = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=pinned)
        found, wanted = [], []
        for row, part in zip(rows, torch.split(whole, sizes), strict=True):
            there = part[: len(row) * row[0].nbytes]
            wanted += stacked([entry.name for entry in row], there)
            found.append(there.view(torch_dtypes()[row[0].dtype]).view(len(row), *row[0].shape))
        self.read_many(wanted)
        return found

    def _check_alike(self, entries: Sequence[TensorEntry]) -> None:
        """That tensors can be made of the bytes, all of one dtype and shape."""
        dtype, shape = entries[0].dtype, entries[0].shape
        for entry in entries:
            assert (entry.dtype, entry.shape) == (dtype, shape), f"{entry.name} is stored otherwise"
            if dtype not in torch_dtypes() or math.prod(shape) * DTYPE_BYTES[dtype] != entry.nbytes:
                raise SourceError(
                    "A tensor cannot be made of these bytes",
                    where=f"{self.root / entry.file}: {shown(entry.name)}",
                    found=f"{entry.nbytes:,} bytes as {shown(dtype)} {list(shape)}",
                    hint=AGAIN,
                )

    def tensor_on(self, name: str, device: torch.device) -> torch.Tensor:
        """One tensor on a device; what is packed travels as it is, and is decoded there.

        Raises:
            SourceError, WeightError: as `tensor`.
        """
        return self.decoded(name, [part.to(device) for part in self.stored(name)])

    def fetched(self, name: str, *, pinned: bool = False) -> Callable[[torch.Tensor], None]:
        """Read a tensor now, on whatever thread; the function that it gives writes its values into a tensor anywhere.

        Raises:
            SourceError, and WeightError from the function: as `tensor`.
        """
        stored = self.stored(name, pinned=pinned)

        def write(tensor: torch.Tensor) -> None:
            tensor.copy_(self.decoded(name, [part.to(tensor.device, non_blocking=pinned) for part in stored]))

        return write

    def is_whole(self, name: str) -> bool:
        """Whether a tensor's bytes are as many as dtype and shape need, and its file is long enough to hold them."""
        entry = self._entry(name)
        needed = math.prod(entry.shape) * DTYPE_BYTES[entry.dtype]
        return entry.nbytes == needed and entry.start + entry.nbytes <= self.files[entry.file]

    @cached_property
    def unread(self) -> frozenset[str]:
        """Tensors that are neither there nor missing: the names in `hidden`."""
        return frozenset(self.hidden)

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor with its dtype and shape, on the CPU, in memory of its own.

        Raises:
            SourceError: as `read`; a dtype that torch lacks; a size that is not that of dtype and shape.
        """
        return self._filled([[self._entry(name)]], pinned=False)[0][0]

    @property
    def on_disk_tensors(self) -> Mapping[str, TensorEntry]:
        """The tensors as they lie in the files."""
        return self.tensors

    @cached_property
    def holes(self) -> Holes:
        """Data that was never written; see `downloads.find_holes`."""
        return find_holes(self.root, (e for e in self.tensors.values() if e.file in self.files))

    def fingerprint(self) -> dict[str, Any]:
        """The source's identity as JSON: digests of config.json, of every shard's header and of samples of its data.

        Of config.json the values count, in their order, and no white space.

        Samples: 16 pieces of 4 KiB spread evenly over the data, its first and last bytes among them. Two checkpoints
        of the same shapes whose tensors differ throughout (a fine-tune) differ here; a change of a few bytes between
        the samples is not seen.
        """
        shards = {}
        for file, size in sorted(self.files.items()):
            handle, path = self._handles.get(self.root, file, size)
            header = min(8 + int.from_bytes(read_at(handle, 0, 8, path), "little"), size, 8 + MAX_HEADER)
            samples = hashlib.sha256()
            for offset, length in _sample_extents(header, size):
                samples.update(read_at(handle, offset, length, path))
            shards[file] = {
                "size": size,
                "header_sha256": hashlib.sha256(read_at(handle, 0, header, path)).hexdigest(),
                "samples_sha256": samples.hexdigest(),
            }
        config = json.dumps(self.config, separators=(",", ":")).encode()
        return {"config_sha256": hashlib.sha256(config).hexdigest(), "files": shards}

    def close(self) -> None:
        """Close the files; no read may be under way. A later read opens them again."""
        self._handles.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _entry(self, name: str) -> TensorEntry:
        if name not in self.tensors:
            raise SourceError("The checkpoint has no such tensor", where=f"{self.root}: {shown(name)}")
        return self.tensors[name]


def stacked(names: Sequence[str], stack: torch.Tensor) -> list[tuple[str, memoryview]]:
    """Where `Checkpoint.read_many` reads each of T tensors of one size into a stack [T, ...] on the host."""
    whole = tensor_bytes(stack)
    nbytes = len(whole) // len(names)
    return [(name, whole[index * nbytes : (index + 1) * nbytes]) for index, name in enumerate(names)]


def _sample_extents(begin: int, end: int) -> list[tuple[int, int]]:
    """(offset, length) of the samples of the bytes begin..end; all of them where there are few."""
    if end - begin <= SAMPLES * SAMPLE_BYTES:
        return [(begin, end - begin)]
    room = end - begin - SAMPLE_BYTES
    return [(begin + room * i // (SAMPLES - 1), SAMPLE_BYTES) for i in range(SAMPLES)]


# ------------------------------------------------------------------------------------------------ scan


def scan(path: Path) -> Checkpoint:
    """Read config.json, index and every header; no tensor data.

    Args:
        path: checkpoint folder, or a folder or file with just a config.json.

    Raises:
        SourceError: config.json absent or unreadable. Every other problem goes into `Checkpoint.problems`.
    """
    config = load_model_config(path)
    if not path.is_dir():
        return Checkpoint(path.parent, config, {}, {}, (), has_weights=False, config_file=path)
    findings, warnings = Findings(path), Findings(path)
    index = read_index(findings)
    has_index, on_disk = os.path.lexists(path / INDEX), folder_files(path)
    weight_map = {} if index is None else index.weight_map
    promised = Counter(weight_map.values())
    files = usable_files(on_disk if index is None else promised, findings, "" if index is None else INDEX)
    if index is not None:
        check_strays(on_disk, promised, findings)
    elif on_disk and not has_index:
        check_lone_files(on_disk, findings)
    check_downloads(files, findings)
    read = [read_shard(file, promise(promised[file]), findings) for file in sorted(files)]
    shards = {shard.file: shard for shard in read if shard is not None}
    check_places(index, shards, findings, warnings)
    tensors: dict[str, TensorEntry] = {}
    for shard in shards.values():  # of a tensor in two shards, the one that the index means; else the first
        tensors |= {n: e for n, e in shard.entries.items() if n not in tensors or weight_map.get(n) == shard.file}
    hidden = {n: shard.file for shard in shards.values() for n in shard.unusable}
    hidden |= {n: file for n, file in weight_map.items() if not is_readable(shards, file)}
    return Checkpoint(
        path,
        config,
        tensors,
        {shard.file: shard.size for shard in shards.values()},
        findings.errors(),
        has_weights=bool(on_disk) or has_index,
        config_file=path / "config.json",
        warnings=warnings.errors(),
        hidden={n: file for n, file in hidden.items() if n not in tensors},
    )


def open_checkpoint(path: Path) -> Checkpoint:
    """`scan`, then refuse a checkpoint that has any problem.

    Raises:
        SourceError: the first problem; its hint tells how many more there are.
    """
    return require_sound(scan(path), path)


def require_sound(checkpoint: Checkpoint, path: Path) -> Checkpoint:
    """The checkpoint, which was found at `path`, if it has no problem and all of its data.

    Raises:
        SourceError: the first problem; its hint tells how many more there are.
    """
    problems = checkpoint.problems or checkpoint.holes.problems
    if problems:
        raise first_problem(problems, f"`{command('dsv4q', 'plan', path)}` shows all", _there_are)
    return checkpoint


def _there_are(more: int) -> str:
    return f"there {'is' if more == 1 else 'are'} {more} more problem{'s' * (more != 1)}:"


def require_weights(checkpoint: Checkpoint) -> None:
    """Refuse a source that has only a config.json.

    Raises:
        SourceError: no safetensors there.
    """
    if not checkpoint.has_weights:
        raise SourceError(
            "There are no safetensors files",
            where=checkpoint.root,
            hint="`dsv4q plan` works from a config.json alone; everything else needs the weights",
        )
