"""Real runs on a toy, shared by the tests that need a finished or an unfinished artifact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dsv4q
from dsv4q.config import Config, load_config
from dsv4q.console import Console, Mode
from dsv4q.made_up.toy import write_toy
from dsv4q.quantize import Job, quantize
from dsv4q.report.page.write import write_missing_page

CONFIGS = Path(dsv4q.__file__).parent / "configs"

FLASH = Path(dsv4q.__file__).parent / "releases" / "deepseek-v4-flash" / "config.json"
"""config.json of DeepSeek-V4-Flash, as the package has it."""

VARYING = ("report.json", "report.html")
"""Files that hold times."""


def at_toy_size(config: Config) -> Config:
    """A shipped config with the toy's calibration and number of shards."""
    toy = load_config(CONFIGS / "toy.yaml")
    changes: dict[str, Any] = {"output": toy.output}
    if config.calibration is not None:
        changes["calibration"] = toy.calibration
    return config.model_copy(update=changes)


def toy_job(folder: Path, config_name: str = "toy", *, seed: int = 0, make: bool = True) -> Job:
    """The job FOLDER/source -> FOLDER/out with a shipped config; writes the source unless it is there."""
    if make:
        write_toy(folder / "source", seed=seed)
    config = at_toy_size(load_config(CONFIGS / f"{config_name}.yaml"))
    return Job(folder / "source", folder / "out", config, device="cpu")


def run(job: Job) -> dict[str, Any]:
    """Run a job without a word, as the command does; its report."""
    report = quantize(job, Console(Mode.QUIET))
    write_missing_page(job.out)
    return report


def finished_files(out: Path) -> list[str]:
    """Files of an artifact, relative, but for those that hold times."""
    return sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.is_file() and p.name not in VARYING)
