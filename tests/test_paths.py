"""Paths as users have them: not UTF-8, with blanks and quotes; what is printed of them can be run."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from pathlib import Path

import pytest

from users import calibrated, config, dsv4q, small_source

ODD = [os.fsdecode(b"caf\xe9 \xff"), "two words & 'a quote'", "tab\tand\nline", "漢字"]


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_source(tmp_path_factory.mktemp("paths") / "native", native=True)


@pytest.mark.parametrize("name", ODD)
def test_every_command_works_below_any_path(name: str, native: Path, tmp_path: Path) -> None:
    place = tmp_path / name
    source = Path(shutil.copytree(native, place / "source"))
    shutil.copy(source / "chat_samples.jsonl", place / "data.jsonl")
    settings, out = calibrated(place), place / "out"
    assert dsv4q("plan", source, "-c", settings, "--skeleton", place / "skeleton").code == 0
    made = dsv4q("quantize", source, out, "-c", settings, "--device", "cpu", "--data", place / "data.jsonl")
    assert made.code == 0, made.err
    assert json.loads((out / "report.json").read_text())["source"]["path"] == str(source)
    assert (out / "report.html").is_file()
    assert dsv4q("verify-shards", out, "--deep", "--source", source, "--json", "--device", "cpu").code == 0
    assert dsv4q("report", out, "-o", place / "page.html").code == 0
    data = ("--data", place / "data.jsonl", "--samples", 2, "--length", 16, "--device", "cpu", "--save")
    assert dsv4q("eval", out, "--reference", source, *data).code == 0
    assert dsv4q("diff", out, out, "--device", "cpu", "--json").code == 0
    assert dsv4q("dequantize", source, place / "plain").code == 0
    assert dsv4q("rehearse", place / "try", "-c", settings, "--source", source, "--device", "cpu").code == 0
    assert dsv4q("toy", place / "toy").code == 0


@pytest.mark.parametrize("name", ODD[1:])
def test_the_command_that_checks_an_artifact_can_be_pasted(name: str, native: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(native, tmp_path / name / "source"))
    out = tmp_path / name / "out"
    for made in (
        dsv4q("quantize", source, out, "-c", config(tmp_path), "--device", "cpu"),
        dsv4q("dequantize", source, tmp_path / name / "plain"),
    ):
        told = re.search(r"Check every byte with: (dsv4q .*)\Z", made.out, re.DOTALL)
        assert told is not None
        program, *arguments = shlex.split(told[1])
        assert program == "dsv4q"
        assert dsv4q(*arguments).code == 0


def test_a_hint_quotes_the_path_in_its_command(native: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(native, tmp_path / "two words"))
    for shard in source.glob("*.safetensors"):
        shard.write_bytes(b"")
    said = dsv4q("dequantize", source, tmp_path / "out")
    assert f"dsv4q plan '{source}'" in said.err
