"""The calibration data that a config asks for, looked for beside the user and beside the source."""

from __future__ import annotations

from pathlib import Path

from dsv4q.config import Config, with_dataset
from dsv4q.data.rows import split_of_other_data
from dsv4q.data.spec import Calibration
from dsv4q.data.tokens import CalibrationData, check_data, load_calibration, load_tokenizer
from dsv4q.errors import DataError


def data_wanted(config: Config, source: Path) -> tuple[Calibration, Path] | None:
    """What to calibrate on, and the folder that a relative path in it is relative to; None: no data are needed."""
    wanted = config.calibration
    if wanted is None or not config.needs_data:
        return None
    here = Path.cwd()
    return wanted, here if (here / wanted.dataset).exists() else source


def with_other_data(config: Config, source: Path, dataset: str | None, split: str | None) -> Config:
    """The same config on the data that the command line names; None: as the config has it.

    The config's split stays where the other data has it too.

    Raises:
        ConfigError: the config calibrates nothing.
        DataError: as `split_of_other_data`.
    """
    if dataset is None and split is None:
        return config
    before = config.calibration
    name = dataset or (before.dataset if before else "")
    changed = with_dataset(config, name, split or (before.split if before else None))
    wanted = data_wanted(changed, source)
    if wanted is None or split is not None:
        return changed
    try:
        return with_dataset(changed, name, split_of_other_data(*wanted))
    except DataError:
        if not (wanted[1] / name).exists():
            return changed  # the plan says where it was looked for
        raise


def data_problem(config: Config, source: Path) -> DataError | None:
    """What is wrong with the data, as far as a first look tells."""
    wanted = data_wanted(config, source)
    if wanted is None:
        return None
    spec, base = wanted
    try:
        check_data(spec, base)
    except DataError as error:
        if not Path(spec.dataset).is_absolute() and not (base / spec.dataset).exists():
            looked = f"a relative path is looked for in {Path.cwd()}, then in {source}"
            return error.but(where=spec.dataset, hint=looked)
        return error
    return None


def tokenizer_finding(config: Config, source: Path) -> DataError | None:
    """What to say of a source without a tokenizer: a problem where data are to be tokenized, else a warning."""
    if (source / "tokenizer.json").is_file():
        return None
    needed = config.needs_data
    return DataError(
        "The checkpoint has no tokenizer",
        where=source / "tokenizer.json",
        found="no such file",
        hint="copy tokenizer.json and tokenizer_config.json of the release into this folder"
        + ("" if needed else "; the run needs none, but who serves the artifact does"),
    )


def load_data(config: Config, source: Path, vocab: int) -> CalibrationData | None:
    """The token batches; None: no data are needed.

    Raises:
        DataError: data or tokenizer cannot be used.
    """
    wanted = data_wanted(config, source)
    if wanted is None:
        return None
    spec, base = wanted
    return load_calibration(spec, load_tokenizer(source), base, vocab_size=vocab)
