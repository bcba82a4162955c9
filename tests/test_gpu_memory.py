"""What a GPU of some size is used for, as the plan has it; scripts/bench_layer.py shows what is really allocated."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from dsv4q.__main__ import main
from dsv4q.checkpoint.headers import TensorEntry
from dsv4q.checkpoint.native import as_source, open_source
from dsv4q.checkpoint.source import Checkpoint
from dsv4q.config import load_config
from dsv4q.console import bytes_of
from dsv4q.layout import Dims, source_tensors
from dsv4q.made_up.native import native_form, stored_specs
from dsv4q.made_up.toy import ToyConfig, write_toy
from dsv4q.plan.needs import CUDA_BYTES, Estimate, GpuUse
from dsv4q.plan.plan import Plan, make_plan
from dsv4q.quantize import Job
from runs import CONFIGS, FLASH, finished_files, run, toy_job

PRO = {
    "hidden_size": 7168, "moe_intermediate_size": 3072, "n_routed_experts": 384, "num_attention_heads": 128,
    "q_lora_rank": 1536, "o_groups": 16,
}  # fmt: skip
"""Where DeepSeek-V4-Pro is wider than Flash; https://huggingface.co/deepseek-ai/DeepSeek-V4-Pro, config.json."""


LARGE = {"samples": 512, "max_length": 2048, "micro_batch": 8}
"""A calibration set whose residual streams are 34 GB."""


def native_plan(config: str = "nvfp4-fp8-mtp", calibration: Mapping[str, int] | None = None, **wider: int) -> Plan:
    """The plan of a native checkpoint of full size, of which there are only the headers."""
    release = json.loads(FLASH.read_text(encoding="utf-8")) | wider
    stored = [part for spec in source_tensors(Dims.from_config(release)) for part in stored_specs(spec)]
    tensors = {p.name: TensorEntry(p.name, "x", p.dtype, p.shape, 0, p.nbytes) for p in stored}
    source = as_source(Checkpoint(FLASH.parent, release, tensors, {}, (), has_weights=True, config_file=FLASH))
    wanted = load_config(CONFIGS / f"{config}.yaml")
    if calibration is not None and wanted.calibration is not None:
        wanted = wanted.model_copy(update={"calibration": wanted.calibration.model_copy(update=calibration)})
    return make_plan(source, wanted)


def use_of(plan: Plan, gpu: float, ranks: int = 1) -> GpuUse:
    found = plan.estimate.on_gpu(int(gpu) - CUDA_BYTES, ranks)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def flash() -> Plan:
    return native_plan()


def test_flash_from_the_official_files_needs_at_most_14_gb_of_a_gpu_of_16(flash: Plan) -> None:
    use = use_of(flash, 16e9)
    assert use.nbytes <= 14e9 and 1 < use.experts < 256 and use.memories == 2


def test_a_gpu_with_room_has_all_experts_as_bf16_at_once(flash: Plan) -> None:
    use = use_of(flash, 80e9)
    assert (use.experts, use.memories, use.keeps_streams) == (256, 1, True)
    assert use.nbytes == flash.estimate.gpu[0].nbytes < 25e9


def test_each_of_several_ranks_needs_room_for_its_own_residual_streams() -> None:
    large = native_plan(calibration=LARGE)
    uses = [use_of(large, 80e9, ranks) for ranks in (1, 2, 4)]
    assert [use.keeps_streams for use in uses] == [False, False, True]
    assert use_of(large, 140e9).keeps_streams
    rest = 2 * (large.estimate.streams - large.estimate.streams // 4)
    assert use_of(large, 140e9).nbytes - uses[2].nbytes == rest


def test_pro_from_its_official_files_fits_a_gpu_of_24_gib() -> None:
    assert use_of(native_plan(**PRO), 24 * 1024**3).experts < 384


def test_experts_that_find_no_place_on_the_gpu_before_the_block_ends_may_all_wait_on_the_host() -> None:
    pro = native_plan(**PRO)
    experts = sum(s.nbytes for s in pro.source_specs if s.block == "layers.0" and s.expert is not None) * 17 // 64
    small, large = use_of(pro, 24 * 1024**3), use_of(pro, 80e9)
    assert (small.memories, small.read_ahead) == (1, experts) and large.read_ahead < experts / 3
    assert small.read_ahead < pro.estimate.host / 4


def test_experts_that_are_calibrated_as_modules_do_not_stay_packed() -> None:
    assert not native_plan("w4a16-fp8-mtp").experts_packed


def test_more_memory_is_never_used_for_a_slower_way(flash: Plan) -> None:
    def rank(needs: Estimate, gpu: int) -> int:
        use = needs.on_gpu(gpu)
        return len(needs.gpu) if use is None else needs.gpu.index(use)

    ranks = [rank(flash.estimate, gpu) for gpu in range(4_000_000_000, 60_000_000_000, 500_000_000)]
    assert ranks == sorted(ranks, reverse=True) and ranks[0] == len(flash.estimate.gpu) and ranks[-1] == 0


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpu") / "source"
    write_toy(folder, ToyConfig(), 0, native_form())
    return folder


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
"""Without a GPU experts are decoded part by part, but residual streams have nowhere else to be."""

WAYS = {
    "with room": GpuUse(memories=1, experts=8, keeps_streams=True, nbytes=0),
    "streams on the host": GpuUse(memories=1, experts=8, keeps_streams=False, nbytes=0),
    "three experts at a time": GpuUse(memories=2, experts=3, keeps_streams=False, nbytes=0),
    "and one memory": GpuUse(memories=1, experts=3, keeps_streams=False, nbytes=0),
}


def made(toy: Path, out: Path, way: str) -> dict[str, bytes]:
    """Files of a run over four micro-batches that uses a GPU in one of these ways."""
    config = toy_job(toy.parent, make=False).config
    assert config.calibration is not None
    config = config.model_copy(update={"calibration": config.calibration.model_copy(update={"micro_batch": 2})})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dsv4q.quantize.run_device", lambda *_: (DEVICE, WAYS[way]))
        run(Job(toy, out, config, device=DEVICE.type))
    return {name: (out / name).read_bytes() for name in finished_files(out)}


@pytest.fixture(scope="module")
def with_room(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return made(toy, tmp_path_factory.mktemp("room") / "out", "with room")


@pytest.mark.parametrize("way", list(WAYS)[1:])
def test_every_way_to_use_a_gpu_gives_the_same_bytes(
    toy: Path, with_room: dict[str, bytes], tmp_path: Path, way: str
) -> None:
    assert made(toy, tmp_path / "out", way) == with_room


def planned(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str]:
    code = 0
    try:
        main([str(a) for a in arguments])
    except SystemExit as stopped:
        code = int(stopped.code or 0)
    found = capsys.readouterr()
    return code, found.out + found.err


def test_plan_says_what_a_gpu_of_the_users_size_will_do(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = planned(capsys, "plan", toy, "--config", CONFIGS / "toy.yaml", "--gpu-memory", "16GB")
    assert code == 0
    assert "GPU        of 16.00 GB: " in said and "experts at a time are decoded from their packed form" in said


def test_plan_says_where_residual_streams_are_with_so_many_ranks(
    toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text((CONFIGS / "toy.yaml").read_text().replace("micro_batch: 4", "micro_batch: 1"))
    ways = make_plan(open_source(toy), load_config(config)).estimate.gpu
    without = next(use for use in ways if not use.keeps_streams).nbytes + CUDA_BYTES
    for ranks, where in ((1, "residual streams in host memory"), (4, "residual streams stay there")):
        code, said = planned(capsys, "plan", toy, "--config", config, "--gpu-memory", without, "--ranks", ranks)
        assert code == 0 and where in said


@pytest.mark.parametrize("command", ["plan", "quantize"])
def test_a_gpu_that_is_too_small_is_refused_with_the_number_that_would_do(
    toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    where = [toy] if command == "plan" else [toy, tmp_path / "out"]
    config = ("--config", CONFIGS / "toy.yaml")
    code, said = planned(capsys, command, *where, *config, "--gpu-memory", "10MB")
    enough = said.partition("expected: ")[2].partition(" bytes")[0].replace(",", "")
    assert (code, "The GPU has too little memory" in said) == (1, True)
    assert not (tmp_path / "out").exists()
    assert planned(capsys, "plan", toy, *config, "--gpu-memory", enough)[0] == 0
    assert planned(capsys, "plan", toy, *config, "--gpu-memory", int(enough) - 1)[0] == 1


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("16GB", 16_000_000_000), ("16 gib", 17_179_869_184), ("1.5TB", 1_500_000_000_000), ("8G", 8_000_000_000),
     ("123", 123), ("5 kB", 5000), ("7B", 7)],
)  # fmt: skip
def test_sizes_are_read_as_people_write_them(text: str, nbytes: int) -> None:
    assert bytes_of(text) == nbytes


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "16XB", "1e9", "16GBs"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no number of bytes"):
        bytes_of(text)
