"""Without the source: report.json has a SHA-256 of every block, and any other byte than was written is found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import artifact_maker as maker
import runs
from artifact_maker import edit, edit_json, read
from dsv4q.__main__ import main

EXPERT = "layers.1.ffn.experts.2"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy and its artifact."""
    folder = tmp_path_factory.mktemp("made")
    runs.run(runs.toy_job(folder))
    return folder


@pytest.fixture
def artifact(folder: Path, tmp_path: Path) -> Path:
    return maker.copy(folder / "out", tmp_path / "artifact")


def judged(capsys: pytest.CaptureFixture[str], artifact: Path, *arguments: object) -> tuple[int, dict[str, Any]]:
    """Exit code and result of the real command."""
    with pytest.raises(SystemExit) as stopped:
        main(["verify-shards", str(artifact), *map(str, arguments), "--json"])
    return stopped.value.code or 0, json.loads(capsys.readouterr().out)  # type: ignore[return-value]


def _blocks(result: dict[str, Any]) -> list[str]:
    assert {d["check"] for d in result["differences"]} <= {"digests"}
    return [d["expected"].partition(" ")[0] for d in result["differences"]]


def test_an_artifact_as_it_was_written_has_the_digests_of_its_report(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dsv4q.verify.untouched.PIECE", 1000)
    code, result = judged(capsys, folder / "out", "--deep")
    assert (code, result["differences"], result["notes"]) == (0, [], [])
    blocks = json.loads((folder / "out" / "report.json").read_text())["blocks"]
    assert result["checks"]["digests"] == len(blocks) == 8


def test_every_byte_is_read_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = judged(capsys, folder / "out", "--deep")[1]
    assert result["bytes_read"] == result["bytes"]


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("embed.weight", "embed"),
        (f"{EXPERT}.w1.weight_packed", "layers.1"),
        (f"{EXPERT}.w2.weight_scale", "layers.1"),
        ("layers.2.attn.wkv.weight", "layers.2"),
        ("layers.3.ffn.gate.weight", "layers.3"),
        ("head.weight", "head"),
        ("mtp.0.ffn.experts.1.w2.weight", "mtp.0"),
    ],
)
def test_a_flipped_bit_anywhere_is_found_without_a_source(
    artifact: Path, capsys: pytest.CaptureFixture[str], name: str, block: str
) -> None:
    if block in ("embed", "head"):  # and no copy of them gives it away
        copies = ("mtp.0.emb.tok_emb.weight", "mtp.0.head.weight")
        before = {copy: read(artifact)[copy] for copy in copies}
    tensor = read(artifact)[name].contiguous()
    tensor.view(torch.uint8).view(-1)[40] ^= 1
    edit(artifact, {name: tensor})
    code, result = judged(capsys, artifact, "--deep")
    assert code == 3
    if block in ("embed", "head"):
        assert set(before) & {d["tensor"] for d in result["differences"]}
    else:
        assert _blocks(result) == [block]


def test_swapped_experts_are_found_without_a_source(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stored = read(artifact)
    one, two = "layers.1.ffn.experts.0.", "layers.1.ffn.experts.1."
    names = [name.removeprefix(one) for name in stored if name.startswith(one)]
    swapped = {f"{one}{n}": stored[f"{two}{n}"] for n in names} | {f"{two}{n}": stored[f"{one}{n}"] for n in names}
    edit(artifact, swapped)
    code, result = judged(capsys, artifact, "--deep")
    assert (code, _blocks(result)) == (3, ["layers.1"])


def test_a_zeroed_page_is_found_without_a_source(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "mtp.0.ffn.experts.3.w1.weight"
    weight = read(artifact)[name]
    weight.view(-1)[: 4096 // 2] = 0
    edit(artifact, {name: weight})
    code, result = judged(capsys, artifact, "--deep")
    assert (code, _blocks(result)) == (3, ["mtp.0"])


def test_what_is_told_otherwise_is_not_told_again(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "layers.3.ffn.gate.bias"
    bias = read(artifact)[name]
    bias[1] = float("nan")
    edit(artifact, {name: bias})
    (difference,) = judged(capsys, artifact, "--deep")[1]["differences"]
    assert (difference["check"], difference["tensor"]) == ("values", name)


def test_a_shard_that_is_cut_off_is_told_once(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = artifact / "model-00002-of-00004.safetensors"
    shard.write_bytes(shard.read_bytes()[:-5000])
    (difference,) = judged(capsys, artifact, "--deep")[1]["differences"]
    assert (difference["check"], difference["file"]) == ("headers", shard.name)


def test_without_digests_it_is_said_that_bytes_are_not_known(
    artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (artifact / "report.json").unlink()
    code, result = judged(capsys, artifact, "--deep")
    assert (code, result["differences"]) == (0, [])
    assert result["notes"][0].startswith("no report.json with SHA-256")
    with pytest.raises(SystemExit):
        main(["verify-shards", str(artifact), "--deep"])
    assert "no report.json with SHA-256" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["--source"]])
def test_headers_and_a_source_need_no_digests(
    folder: Path, artifact: Path, capsys: pytest.CaptureFixture[str], arguments: list[object]
) -> None:
    (artifact / "report.json").unlink()
    source = [folder / "source"] if arguments else []
    code, result = judged(capsys, artifact, *arguments, *source)
    assert (code, result["differences"], result["notes"]) == (0, [], [])


@pytest.mark.parametrize("damage", ["another digest", "a block without"])
def test_a_report_of_other_bytes_is_told(artifact: Path, capsys: pytest.CaptureFixture[str], damage: str) -> None:
    def change(report: dict[str, Any]) -> None:
        if damage == "another digest":
            report["blocks"][2]["digest"] = "0" * 64
        else:
            del report["blocks"][2]

    edit_json(artifact, "report.json", change)
    code, result = judged(capsys, artifact, "--deep")
    assert (code, _blocks(result)) == (3, ["layers.1"])


def test_a_plain_checkpoint_has_digests_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["toy", tmp_path / "native", "--native"], ["dequantize", tmp_path / "native", tmp_path / "out"]):
        with pytest.raises(SystemExit):
            main([*map(str, arguments), "--quiet"])
    assert judged(capsys, tmp_path / "out", "--deep")[0] == 0
    name = f"{EXPERT}.w1.weight"
    weight = read(tmp_path / "out")[name]
    weight.view(torch.uint8)[0, 0] ^= 1
    edit(tmp_path / "out", {name: weight})
    code, result = judged(capsys, tmp_path / "out", "--deep")
    assert (code, _blocks(result)) == (3, ["layers.1"])
