"""The independent judge of an artifact, or of a plain BF16 checkpoint: `dsv4q verify-shards`, and of `rehearse`.

It derives by itself what must be there: the tensors of a DeepSeek-V4 from config.json (`layout`), how each linear is
stored from config.json's quantization_config (`config.py`), and it reads index and headers with its own eyes
(`files.py`), so that every difference is counted once and exactly. It never sees plan, recipe, config, run or the
writer; with them it shares what a number and a file are: `formats`, `layout`, and the readers of `checkpoint`. Of the
artifact's own recipe.yaml it asks only which observers are exact. Exact sets, never thresholds: the consumer loads an
artifact with a missing expert, a missing scale or a scale of the wrong dtype in silence.

A checkpoint without quantization_config is plain: every tensor of the layout in the layout's dtype, no recipe.yaml. An
artifact in ModelOpt's layout is shown to the judge in terms that it knows (`modelopt.py`).

There is one judge. `verify` feeds it all shards at once, so that differences are told in the order of the layout and a
linear may lie in several shards; `rehearse` feeds it each shard as it becomes whole, and deletes it.

Headers are judged without torch. Values are read by one thread for each core. For a GPU these read ahead, and memory is
twice `pipes.BUDGET` and the temporaries of one linear; on a CPU each judges what it has read, in `THREAD_BYTES`.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence, Set
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from dsv4q.checkpoint.folder import load_model_config
from dsv4q.checkpoint.headers import TensorEntry
from dsv4q.checkpoint.native import scan_source
from dsv4q.checkpoint.pipes import BUDGET, THREADS, loaded_ahead
from dsv4q.checkpoint.source import Checkpoint
from dsv4q.errors import SourceError, VerificationFailed, command
from dsv4q.host import compute_alone, cores, end_beginning, usable_device
from dsv4q.layout import Dims
from dsv4q.verify.case import Case, Contract
from dsv4q.verify.config import judge_model_config
from dsv4q.verify.digests import NONE, compare_digests, reported_digests
from dsv4q.verify.exactness import promised_linears
from dsv4q.verify.files import Header, Headers, check_files, check_index, read_header, read_shards
from dsv4q.verify.kinds import contract_of, kind_of
from dsv4q.verify.result import PLAIN, QUANTIZED, Difference, Log, VerifyResult, reason
from dsv4q.verify.schemes import FP8
from dsv4q.verify.source import compare_folders, require_comparable

if TYPE_CHECKING:
    import torch

    from dsv4q.verify.case import ValueCheck
    from dsv4q.verify.values import ValueChecks

__all__ = ["Difference", "Judge", "VerifyResult", "require_verified", "verify", "verify_headers"]

THREAD_BYTES = 256 << 20
"""What a thread holds that reads and judges on a CPU."""

Progress = Callable[[str, int, int], None]
"""Called with a label, bytes done, bytes in all."""


def verify_headers(artifact: Path) -> VerifyResult:
    """Judge names, dtypes, shapes, index, config.json and files. Reads no tensor.

    Raises:
        SourceError: no config.json, or not one of a DeepSeek-V4.
    """
    return verify(artifact, source=None, deep=False, progress=None)


def verify(
    artifact: Path, *, source: Path | None, deep: bool, progress: Progress | None, device: str = "cpu"
) -> VerifyResult:
    """Judge an artifact or a plain checkpoint.

    Args:
        artifact: its folder.
        source: the checkpoint it was made of, BF16 or native; compares untouched tensors byte by byte, re-encodes
            quantized ones. What of it is damaged is a difference, and the rest is compared, also if reading fails.
        deep: look at every value: scales finite and positive, pairs equal, no NaN.
        progress: called with a label, bytes done and bytes in all.
        device: where quantized weights are encoded and compared: auto, cpu, cuda or cuda:N.

    Raises:
        DeviceError: no such device.
        SourceError: artifact or source has no config.json, or not one of a DeepSeek-V4; the artifact is a release in
            DeepSeek's own layout; nothing of the source can be compared.
    """
    begin = time.monotonic()
    if not artifact.is_dir():
        raise SourceError("There is no artifact folder here", where=artifact, hint="give the folder with config.json")
    config, log = load_model_config(artifact), Log()
    dims = Dims.from_config(config, artifact / "config.json")
    headers = read_shards(artifact, log)
    kind = kind_of(artifact, config, headers)
    check_files(artifact, headers, kind == QUANTIZED, log)
    check_index(headers, log)
    contract = contract_of(artifact, config, dims, headers, kind, log)
    if source is None:
        judge_model_config(config, dims, log)
    promised = frozenset() if kind == PLAIN else promised_linears(artifact, contract.specs, log)
    reported = reported_digests(artifact) if deep and source is None and contract.as_stored else {}
    place = usable_device(device) if deep or source is not None else None
    with nullcontext() if source is None else scan_source(source) as original:
        if original is not None:
            require_comparable(original, contract)
            original = contract.seen(original)
        judge = Judge(
            artifact, contract, log, source=original, deep=deep, device=place, promised=promised, hashed=bool(reported)
        )
        judge.all_shards(contract.shown(headers, log), progress)
        if reported:
            compare_digests(judge.case, reported)
        contract.finish(judge.case)
    return VerifyResult(
        artifact=str(artifact),
        kind=kind,
        tensors=len(headers.holders),
        shards=headers.shards,
        bytes=headers.nbytes,
        mtp_tensors=sum(name.startswith("mtp.") for name in headers.holders),
        checks=dict(log.checks),
        differences=tuple(log.differences),
        errors={role: stats.as_dict() for role, stats in judge.case.errors.items()},
        notes=(NONE,) if deep and source is None and not reported else (),
        bytes_read=judge.bytes_read,
        seconds=time.monotonic() - begin,
    )


def require_verified(out: Path) -> VerifyResult:
    """The independent judge looks at the headers before we say that it is done; what it says.

    Raises:
        VerificationFailed: it finds a difference.
    """
    result = verify_headers(out)
    if not result.ok:
        first = result.differences[0]
        raise VerificationFailed(
            f"The finished artifact has {len(result.differences)} difference(s) from the contract",
            where=f"{first.tensor or ''} {first.file or ''}".strip() or out,
            expected=first.expected,
            found=first.found,
            hint=f"{command('dsv4q', 'verify-shards', out)} lists all; if it was only just made, please report this",
        )
    return result


class Judge:
    """Judges the shards of one artifact, each once, in any order; what is wrong goes into the log.

    What has to be held against each other across shards is kept: the tensors that are still missing, the dtypes of
    the attention scales, and of an expert whose w1 and w3 come in different shards the scales that both must have.

    Args:
        root: folder in which the shards lie.
        contract: what must be there.
        source: what the artifact is made of.
        deep: look at every value.
        device: where quantized weights are judged; None: no value is looked at.
        promised: linears that are exact wherever the source allows it, as the artifact's own recipe says.
        hashed: take the SHA-256 of every tensor whose values are looked at.
        quick: judge linears in batches, and leave those that are exact out of the statistics.
    """

    def __init__(
        self,
        root: Path,
        contract: Contract,
        log: Log,
        *,
        source: Checkpoint | None = None,
        deep: bool = False,
        device: torch.device | None = None,
        promised: frozenset[str] = frozenset(),
        hashed: bool = False,
        quick: bool = False,
    ) -> None:
        self.contract, self.log, self.quick = contract, log, quick
        # Only the judge's own headers say where a tensor lies; the reader brings its bytes.
        artifact = contract.reader(root, dict(contract.config), {}, {}, (), True, root / "config.json")
        self.case = Case(contract, artifact, source, deep, log, device, promised, hashed)
        self.shards, self.tensors, self.mtp_tensors, self.nbytes = 0, 0, 0, 0
        self.bytes_read = 0
        """Of values: of the artifact, and of the source as it lies on disk."""
        self._owed = dict.fromkeys(contract.tensors)
        self._split = set(contract.schemes)
        """Quantized linears that no shard so far held as a whole."""
        self._values: ValueChecks | None = None
        self._stream: torch.cuda.Stream | None = None

    # ------------------------------------------------------------------------------------ feeding

    def all_shards(self, headers: Headers, progress: Progress | None) -> None:
        """Judge all shards at once: first which tensors are there, then the values, both in the layout's order."""
        self._drop_copies(headers.holders.keys() | headers.index.keys())
        self.case.artifact.files.update(headers.sizes)
        for name in list(self._owed):
            file = headers.index.get(name)
            if name in headers.holders:
                self._admit(name, headers.holders[name])
            elif file in headers.unread:  # nobody knows what is in it, and that has been said
                self.log.looked_at(_set_check(name))
            else:
                self._misses(name, file, "no such tensor")
        for name, holders in headers.holders.items():
            if name not in self.contract.tensors:
                self._has_no_place(name, holders[0], self.contract.instead(name))
        self._check_attention_scales()
        if self.case.source is not None:
            compare_folders(self.case)
        end_beginning()
        before = len(self.log.differences)
        self._judge_values(list(self.case.sound), progress)
        self._judge_inputs()
        # Linears are judged in batches of one shape; what is wrong is told in the layout's order.
        order = {module: number for number, module in enumerate(self.contract.schemes)}
        self.log.differences[before:] = sorted(
            self.log.differences[before:], key=lambda one: order.get((one.tensor or "").rpartition(".")[0], -1)
        )

    def shard(self, file: str, header: bytes, check_stop: Callable[[], None]) -> None:
        """Judge one shard, of which nothing is needed afterwards.

        Args:
            header: what the file must begin with.
            check_stop: called between two pieces of work; what it raises ends the judging.

        Raises:
            OSError: no such file.
            SourceError: reading fails.
        """
        case = self.case
        with (case.artifact.root / file).open("rb") as stream:
            if stream.read(len(header)) != header:
                self.log.differs("headers", file=file, expected="the planned header", found="another one")
        self.shards += 1
        read = read_header(case.artifact.root, file, self.log)
        if read is None:
            return
        case.artifact.files[file], entries = read
        for name, entry in entries.items():
            self.tensors, self.nbytes = self.tensors + 1, self.nbytes + entry.nbytes
            self.mtp_tensors += name.startswith("mtp.")
            if name in self._owed:
                self._admit(name, [entry])
            else:
                self._has_no_place(name, entry, "no such tensor, or only once")
        sound = [name for name in entries if name in case.sound and case.sound[name].file == file]
        self._split -= {spec.module for spec, _ in self.contract.whole_linears(sound)}
        with self._own_stream():
            self._judge_values(sound, lambda *_: check_stop())

    def finish(self) -> None:
        """No shard comes any more: say which tensors none had. Head copies are there all together or not at all."""
        self._drop_copies(self.contract.tensors.keys() - self._owed.keys())
        for name in list(self._owed):
            self._misses(name, None, "no such tensor in any shard")
        self._check_attention_scales()
        self._judge_inputs()
        if not self.log.differences:
            for module in sorted(self._split):
                expected, found = "all tensors of a linear in one shard", "parts of it in several, not judged"
                self.log.differs("tensors", tensor=module, expected=expected, found=found)

    # ------------------------------------------------------------------------------------ which tensors

    def _drop_copies(self, there: Set[str]) -> None:
        """Copies of the shared head are there all together or not at all."""
        if not self.contract.copies.keys() & there:
            for copy in self.contract.copies:
                self._owed.pop(copy, None)

    def _admit(self, name: str, holders: Sequence[Header]) -> None:
        """A tensor that must be there and is: its dtype and shape must be exact."""
        check = _set_check(name)
        self.log.looked_at(check)
        del self._owed[name]
        first, (dtypes, shape) = holders[0], self.contract.tensors[name]
        if first.dtype not in dtypes or first.shape != shape:
            expected = self.contract.text(name)
            self.log.differs(check, tensor=name, file=first.file, expected=expected, found=first.text())
        elif len(holders) == 1 and first.whole:
            self.case.sound[name] = first
            entry = TensorEntry(name, first.file, first.dtype, first.shape, first.start, first.nbytes)
            self.case.artifact.tensors[name] = entry

    def _misses(self, name: str, file: str | None, found: str) -> None:
        self.log.looked_at(_set_check(name))
        del self._owed[name]
        self._split.discard(name.rpartition(".")[0])
        self.log.differs(_set_check(name), tensor=name, file=file, expected=self.contract.text(name), found=found)

    def _has_no_place(self, name: str, header: Header, expected: str) -> None:
        self.log.differs(_set_check(name), tensor=name, file=header.file, expected=expected, found=header.text())

    def _check_attention_scales(self) -> None:
        """BF16 or F32, but the same everywhere."""
        names = [f"{module}.weight_scale" for module, how in self.contract.schemes.items() if how.format == FP8]
        there = {name: self.case.sound[name] for name in names if name in self.case.sound}
        dtypes = Counter(header.dtype for header in there.values())
        usual = dtypes.most_common(1)[0][0] if dtypes else None
        for name, header in there.items():
            if header.dtype != usual:
                expected = f"{usual}, as the other attention scales"
                self.log.differs("tensors", tensor=name, file=header.file, expected=expected, found=header.dtype)

    # ------------------------------------------------------------------------------------ values

    def _judge_values(self, names: Sequence[str], progress: Progress | None) -> None:
        """Look at the values of sound tensors, which lie on disk now."""
        if self.case.device is None:
            return
        from dsv4q.verify.values import ValueChecks  # imports torch, and headers are judged without it

        if self._values is None:
            self._values = ValueChecks(self.case, quick=self.quick)
        total, done = sum(self.case.sound[name].nbytes for name in names), 0
        checks = self._values.of(names)
        threads = THREADS if self.quick else max(THREADS, cores())
        on_host = self.case.device.type == "cpu"
        room = BUDGET if self.quick else threads * THREAD_BYTES if on_host else 2 * BUDGET
        ahead = loaded_ahead(checks, _load, lambda one: one.memory, budget=room, threads=threads, begin=compute_alone)
        with self.case.artifact, ahead as loaded:
            for check, error in loaded:
                if error is None:
                    check.judge()
                else:
                    expected = f"tensors of {check.label} that can be read"
                    self.log.differs("values", file=str(error.where), expected=expected, found=reason(error))
                done += check.size
                self.bytes_read += check.read
                if progress is not None:
                    progress(check.label, done, total)
        if progress is not None and done < total:  # linears that are not whole are not judged
            progress("done", total, total)

    def _judge_inputs(self) -> None:
        """Input scales against each other, now that all have been read."""
        if self._values is not None:
            self._values.inputs.judge(self.case)

    def _own_stream(self) -> AbstractContextManager[object]:
        """On a GPU, or the judge's work would wait for the run's, and the run's for it."""
        if self.case.device is None or self.case.device.type != "cuda":
            return nullcontext()
        import torch

        if self._stream is None:
            self._stream = torch.cuda.Stream(self.case.device)
        return torch.cuda.stream(self._stream)


def _load(check: ValueCheck) -> SourceError | None:
    """Load; an artifact that cannot be read is no reason to lose what has been found."""
    try:
        check.load()
    except SourceError as error:
        return error
    return None


def _set_check(name: str) -> str:
    return "mtp" if name.startswith("mtp.") else "tensors"
