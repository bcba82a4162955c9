"""What the project says about itself: one version, pins without surplus, CI and hooks that call its own commands."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from runs import CONFIGS

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def brought(wanted: Iterable[str]) -> set[str]:
    """Names of all packages that these requirements bring into this environment."""
    found: set[tuple[str, frozenset[str]]] = set()
    waiting = [Requirement(text) for text in wanted]
    while waiting:
        one = waiting.pop()
        key = canonicalize_name(one.name), frozenset(one.extras)
        if key in found:
            continue
        found.add(key)
        for text in metadata.requires(one.name) or []:
            needs = Requirement(text)
            if any(needs.marker is None or needs.marker.evaluate({"extra": e}) for e in ("", *one.extras)):
                waiting.append(needs)
    return {name for name, _ in found}


def test_every_pin_is_of_a_package_that_the_dev_set_brings(project: dict[str, Any]) -> None:
    wanted = project["dependencies"] + project["optional-dependencies"]["dev"]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {canonicalize_name(line.split("==")[0]) for line in lines if not line.startswith("#")}
    assert pins - brought(wanted) == set()
    assert {canonicalize_name(Requirement(text).name) for text in wanted} <= pins


def test_the_version_is_stated_once_and_has_a_place_in_the_changelog(project: dict[str, Any]) -> None:
    version = project["version"]
    released = re.match(r"\d+\.\d+\.\d+", version)
    assert released and f"\n## {released[0]}, " in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    for file in (ROOT / "src").rglob("*.py"):
        assert version not in file.read_text(encoding="utf-8"), file


def test_a_copy_that_was_never_installed_knows_no_version(tmp_path: Path) -> None:
    (tmp_path / "dsv4q").mkdir()
    shutil.copy(ROOT / "src" / "dsv4q" / "__init__.py", tmp_path / "dsv4q")
    code = "import sys; sys.path.insert(0, sys.argv[1]); import dsv4q; print(dsv4q.__version__)"
    line = [sys.executable, "-I", "-S", "-c", code, str(tmp_path)]  # -S: without installed packages
    assert subprocess.run(line, capture_output=True, text=True, check=True).stdout == "0+unknown\n"


def test_an_installed_copy_outside_the_clone_has_its_configs_and_releases(tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "src", clone / "src", ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, clone)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", tmp_path / "site", clone], check=True, capture_output=True)
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}

    def dsv4q(*arguments: str) -> str:
        command = [sys.executable, "-m", "dsv4q", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, env=environment, cwd=tmp_path).stdout

    assert json.loads(dsv4q("configs", "--json"))["configs"].keys() == {p.stem for p in CONFIGS.glob("*.yaml")}
    assert dsv4q("configs", "toy") == (CONFIGS / "toy.yaml").read_text()
    flash = tmp_path / "site" / "dsv4q" / "releases" / "deepseek-v4-flash"
    assert "134,309 tensors" in dsv4q("plan", str(flash), "--config", "nvfp4-fp8-mtp")


def test_ci_runs_what_a_developer_can_run() -> None:
    job = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))["jobs"]["ci"]
    assert [step["run"] for step in job["steps"] if "run" in step] == ["bash .ci/run"]


def test_the_hooks_are_local_and_call_make() -> None:
    repos = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    assert {repo["repo"] for repo in repos} == {"local"}
    assert all(hook["entry"].startswith("make ") for repo in repos for hook in repo["hooks"])
