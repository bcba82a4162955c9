"""Input scales: observed with calibration, or bounded without any data."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from artifact_maker import edit
from dsv4q.config import Config, parse_config
from dsv4q.errors import ConfigError, DeviceError
from dsv4q.made_up.native import native_form
from dsv4q.made_up.toy import write_toy
from dsv4q.quantize import Job
from dsv4q.run import block as stream
from dsv4q.run.linears import EncodedLinears
from dsv4q.run.stacked import StackedLinears
from dsv4q.verify.judge import verify
from runs import finished_files, run, toy_job


def with_bounds(config: Config) -> dict[str, Any]:
    """The config as YAML would give it, on bounds instead of data."""
    raw = config.model_dump(mode="json")
    return {**raw, "activations": "bound", "calibration": None}


@pytest.fixture(scope="module")
def observed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, dict[str, Any]]:
    job = toy_job(tmp_path_factory.mktemp("observed"))
    return job, run(job)


@pytest.fixture(scope="module")
def bounded(
    observed: tuple[Job, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Job, dict[str, Any]]:
    source = observed[0].source
    job = Job(source, tmp_path_factory.mktemp("bound") / "out", parse_config(with_bounds(observed[0].config)))
    return job, run(job)


def read(folder: Path, name: str) -> torch.Tensor:
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            if name in file.keys():  # noqa: SIM118 - safe_open is no mapping
                return file.get_tensor(name)
    raise AssertionError(name)


def test_an_artifact_on_bounds_passes_every_check(bounded: tuple[Job, dict[str, Any]]) -> None:
    job, _ = bounded
    assert verify(job.out, source=job.source, deep=True, progress=None).ok


def test_the_bound_of_w1_and_w3_follows_from_the_norm_before_them(bounded: tuple[Job, dict[str, Any]]) -> None:
    job, _ = bounded
    norm = read(job.source, "layers.3.ffn_norm.weight").double()
    amax = math.sqrt(norm.numel()) * float(norm.abs().max())
    for projection in ("w1", "w3"):
        scale = float(read(job.out, f"layers.3.ffn.experts.5.{projection}.input_global_scale"))
        assert scale == pytest.approx(448 * 6 / amax, rel=1e-6)


def test_the_bound_of_w2_is_the_square_of_the_swiglu_limit(bounded: tuple[Job, dict[str, Any]]) -> None:
    job, _ = bounded
    assert float(read(job.out, "layers.0.ffn.experts.0.w2.input_global_scale")) == pytest.approx(448 * 6 / 100)


def test_bounds_change_nothing_but_the_input_scales(
    observed: tuple[Job, dict[str, Any]], bounded: tuple[Job, dict[str, Any]]
) -> None:
    for path in sorted(observed[0].out.glob("*.safetensors")):
        with safe_open(path, framework="pt") as left, safe_open(bounded[0].out / path.name, framework="pt") as right:
            for name in left.keys():  # noqa: SIM118 - safe_open is no mapping
                if not name.endswith("input_global_scale"):
                    one, other = left.get_tensor(name), right.get_tensor(name)
                    assert torch.equal(one.view(torch.uint8), other.view(torch.uint8)), name


def test_nothing_observed_is_above_its_bound(observed: tuple[Job, dict[str, Any]]) -> None:
    layers = [b["input_amax"] for b in observed[1]["blocks"] if "input_amax" in b]
    assert len(layers) == 5
    for layer in layers:
        assert set(layer) == {"w1", "w2", "w3"}
        for amax in layer.values():
            assert 0 < amax["used"] <= amax["bound"]


def test_the_report_says_where_the_scales_came_from(
    observed: tuple[Job, dict[str, Any]], bounded: tuple[Job, dict[str, Any]]
) -> None:
    assert observed[1]["activations"]["scales"] == "observed"
    assert bounded[1]["activations"]["scales"] == "bound"
    assert bounded[1]["calibration"] is None


def test_bounds_and_calibration_data_contradict_each_other(observed: tuple[Job, dict[str, Any]]) -> None:
    raw = {**observed[0].config.model_dump(mode="json"), "activations": "bound"}
    with pytest.raises(ConfigError, match="calibration"):
        parse_config(raw)


def test_bounds_and_headroom_contradict_each_other(observed: tuple[Job, dict[str, Any]]) -> None:
    raw = {**with_bounds(observed[0].config), "activations": {"scales": "bound", "headroom": 2.0}}
    with pytest.raises(ConfigError, match="no effect"):
        parse_config(raw)


def test_running_out_of_gpu_memory_is_a_named_error_that_loses_nothing(
    observed: tuple[Job, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore lines")

    job = Job(observed[0].source, tmp_path / "out", observed[0].config, device="cpu")
    with monkeypatch.context() as patch:
        patch.setattr(stream, "run_block", full)
        with pytest.raises(DeviceError, match="micro_batch"):
            run(job)
    run(job)
    assert verify(job.out, source=job.source, deep=True, progress=None).ok


# ------------------------------------------------------------------------------------------------ on the bytes


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A native toy of which one expert spans more binades than the scales of NVFP4 do."""
    out = write_toy(tmp_path_factory.mktemp("native") / "source", form=native_form()).out
    name = "layers.1.ffn.experts.2.w2.scale"
    scale = read(out, name)
    scale.view(torch.uint8)[0, 0] -= 40
    edit(out, {name: scale})
    return out


def learnt(report: dict[str, Any]) -> list[dict[str, Any]]:
    """What the report says of each block, but for times and memory."""
    return [{k: v for k, v in block.items() if k not in ("seconds", "memory", "ranks")} for block in report["blocks"]]


def test_native_experts_on_bounds_are_converted_on_their_bytes_as_by_way_of_bf16(
    native: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = parse_config(with_bounds(toy_job(tmp_path, make=False).config))
    wide: list[str] = []
    real = StackedLinears._encoded

    def encoded(self: StackedLinears, begun: Any) -> EncodedLinears:
        found = real(self, begun)
        wide.extend(linear.spec.module for linear in found.linears)
        return found

    monkeypatch.setattr(StackedLinears, "_encoded", encoded)
    converted = run(Job(native, tmp_path / "converted", config, device="cpu"))
    assert wide == ["layers.1.ffn.experts.2.w2"]
    monkeypatch.setattr(StackedLinears, "_converted", lambda *_: [])
    ordinary = run(Job(native, tmp_path / "ordinary", config, device="cpu"))
    assert len(wide) == 1 + 5 * 8 * 3
    assert learnt(converted) == learnt(ordinary)
    files = finished_files(tmp_path / "ordinary")
    assert finished_files(tmp_path / "converted") == files
    for name in files:
        assert (tmp_path / "converted" / name).read_bytes() == (tmp_path / "ordinary" / name).read_bytes(), name
    assert verify(tmp_path / "converted", source=native, deep=True, progress=None).ok
