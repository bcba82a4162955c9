"""The values of an artifact: `verify-shards --deep` and `--source`.

Tensors are read, moved and compared a few at a time while one is judged, so memory is `ahead.BUDGET` and the
temporaries of one linear, or one tensor where a single one is larger.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv4q.checkpoint.native import scan_source
from dsv4q.checkpoint.pipes import loaded_ahead
from dsv4q.checkpoint.source import Checkpoint, scan
from dsv4q.host import usable_device
from dsv4q.layout import Dims, TensorSpec
from dsv4q.verify.case import Case, Job
from dsv4q.verify.config import Scheme
from dsv4q.verify.result import ErrorStats, Log
from dsv4q.verify.untouched import Untouched
from dsv4q.verify.weights import Linear

if TYPE_CHECKING:
    from dsv4q.verify.judge import Progress, Survey


def judge_values(
    survey: Survey, source: Path | None, deep: bool, progress: Progress | None, device: str, log: Log
) -> dict[str, ErrorStats]:
    """Look at the tensors that the header checks found sound; returns error statistics by tensor class.

    Raises:
        SourceError: the source has no usable config.json; reading fails.
        DeviceError: no such device.
        WeightError: a native source has values that are not numbers.
    """
    place = usable_device(device)
    with scan(survey.root) as artifact:
        if source is None:
            return _judge(Case(survey, artifact, None, deep, place, log), progress)
        with scan_source(source) as original:
            _compare_folders(survey, original, log)
            return _judge(Case(survey, artifact, original, deep, place, log), progress)


def _judge(case: Case, progress: Progress | None) -> dict[str, ErrorStats]:
    errors: dict[str, ErrorStats] = defaultdict(ErrorStats)
    total = sum(header.nbytes for header in case.survey.sound.values())
    done = 0
    with loaded_ahead(_jobs(case, errors), lambda job: job.load(), lambda job: job.memory) as jobs:
        for job, _ in jobs:
            job.judge()
            done += job.size
            if progress is not None:
                progress(job.label, done, total)
    if progress is not None and done < total:  # linears that are not whole have no job
        progress("done", total, total)
    return dict(errors)


def _jobs(case: Case, errors: Mapping[str, ErrorStats]) -> Iterator[Job]:
    """All work in the order in which differences are told."""
    sound, schemes = case.survey.sound, case.survey.schemes
    for name, header in sound.items():
        if name.rpartition(".")[0] not in schemes:
            yield from Untouched(case, name, header).jobs()
    for module, scheme in schemes.items():
        spec = case.survey.specs[f"{module}.weight"]
        if all(f"{module}.{suffix}" in sound for suffix in scheme.stored(spec.shape)):
            yield _linear(case, spec, scheme, errors)


def _linear(case: Case, spec: TensorSpec, scheme: Scheme, errors: Mapping[str, ErrorStats]) -> Linear:
    if not scheme.is_general:
        return Linear(case, spec, scheme, errors)
    from dsv4q.verify.general import GeneralLinear
    from dsv4q.verify.library import LibraryScheme

    assert isinstance(scheme, LibraryScheme)
    return GeneralLinear(case, spec, scheme, errors)


def _compare_folders(survey: Survey, source: Checkpoint, log: Log) -> None:
    """The source must be sound and of the same dimensions; its config and small files must have come along."""
    for problem in source.problems:
        log.differs("source", file=problem.where, expected=problem.expected or "a sound source", found=problem.what)
    _compare_configs(survey.config, source.config, log)
    for path in sorted(source.root.iterdir()) + sorted(source.root.glob("encoding/*")):
        name = path.relative_to(source.root).as_posix()
        if not path.is_file() or not name.startswith(("tokenizer", "generation_config.json", "encoding/")):
            continue
        log.looked_at("source")
        copy = survey.root / name
        if not copy.is_file() or copy.read_bytes() != path.read_bytes():
            found = "another file" if copy.is_file() else "no such file"
            log.differs("source", file=name, expected="the source's file", found=found)


def _compare_configs(config: Mapping[str, Any], source: Mapping[str, Any], log: Log) -> None:
    """Every key kept. Without its draft, an artifact says so in num_nextn_predict_layers and compress_ratios."""
    dropped = config.get("num_nextn_predict_layers") == 0
    for key in sorted((config.keys() | source.keys()) - {"quantization_config"}):
        log.looked_at("source")
        ours, theirs = config.get(key, "no such key"), source.get(key, "no such key")
        if key == "compress_ratios":
            layers = Dims.from_config(config).layers
            ours, theirs = (value[:layers] if isinstance(value, list) else value for value in (ours, theirs))
        if ours != theirs and not (dropped and key == "num_nextn_predict_layers"):
            log.differs("source", file="config.json", expected=f"{key}: {theirs!r}", found=repr(ours))
