"""The judge: healthy artifacts pass, and each planted defect is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch

import artifact_maker as maker
from artifact_maker import CONFIG, INDEX, edit, edit_config, edit_json, read
from dsv4q.__main__ import main
from dsv4q.checkpoint.folder import load_model_config
from dsv4q.checkpoint.native import scan_source
from dsv4q.console import Console
from dsv4q.errors import DeviceError, SourceError
from dsv4q.formats.encode import nvfp4_decode, nvfp4_encode
from dsv4q.layout import Dims
from dsv4q.report.show import show_verification
from dsv4q.verify.case import Contract
from dsv4q.verify.judge import Difference, Judge, VerifyResult, verify, verify_headers
from dsv4q.verify.result import Log

EXPERT = "layers.1.ffn.experts.2"
WQ_A = "layers.0.attn.wq_a"
SHARD = "model-00001-of-00003.safetensors"


@pytest.fixture(scope="session")
def tensors() -> maker.Tensors:
    return maker.random_source()


@pytest.fixture(scope="session")
def source(tensors: maker.Tensors, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return maker.write_source(tmp_path_factory.mktemp("source") / "bf16", tensors)


@pytest.fixture(scope="session")
def made(tensors: maker.Tensors, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("made")
    return {
        "nvfp4": maker.write_artifact(root / "nvfp4", tensors),
        "int4": maker.write_artifact(root / "int4", tensors, experts="int4"),
        "fp8": maker.write_artifact(root / "fp8", tensors, experts="fp8"),
        "pow2": maker.write_artifact(root / "pow2", tensors, pow2=True),
        "without head copies": maker.write_artifact(root / "bare", tensors, copies=False),
        "without mtp": maker.write_artifact(root / "main", tensors, mtp=False),
    }


@pytest.fixture
def artifact(made: dict[str, Path], tmp_path: Path) -> Path:
    return maker.copy(made["nvfp4"], tmp_path / "artifact")


def judged(artifact: Path, source: Path | None = None, deep: bool = False) -> VerifyResult:
    """What `verify` says; the same judge, fed shard by shard as in a rehearsal, must say it of the same tensors."""
    result = verify(artifact, source=source, deep=deep, progress=None)
    if not {d.check for d in result.differences} & {"files", "index", "headers"}:  # of which one shard says nothing
        found = {(d.check, d.tensor) for d in result.differences if d.check != "source" or d.tensor}
        assert fed_shard_by_shard(artifact, source, deep, plain=result.kind == "plain") == found
    return result


def fed_shard_by_shard(
    artifact: Path, source: Path | None, deep: bool, *, plain: bool = False
) -> set[tuple[str, str | None]]:
    """(check, tensor) of every difference. Each shard is gone before the next one comes."""
    log, config = Log(), load_model_config(artifact)
    contract = Contract.of(config, Dims.from_config(config), log, plain=plain)
    device = torch.device("cpu") if deep or source else None
    with (
        TemporaryDirectory(dir=artifact.parent) as alone,
        nullcontext() if source is None else scan_source(source) as original,
    ):
        judge = Judge(Path(alone), contract, log, source=original, deep=deep, device=device, quick=True)
        for shard in sorted(artifact.glob("*.safetensors")):
            (Path(alone) / shard.name).hardlink_to(shard)
            judge.shard(shard.name, b"", lambda: None)
            (Path(alone) / shard.name).unlink()
    judge.finish()
    return {(difference.check, difference.tensor) for difference in log.differences}


def verify_shards(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict[str, Any]]:
    """Exit code and result of the real command."""
    with pytest.raises(SystemExit) as stopped:
        main(["verify-shards", *map(str, arguments), "--json"])
    return stopped.value.code or 0, json.loads(capsys.readouterr().out)  # type: ignore[return-value]


def only(result: VerifyResult) -> Difference:
    assert len(result.differences) == 1, [difference.text() for difference in result.differences]
    return result.differences[0]


# ------------------------------------------------------------------------------------------------ healthy


@pytest.mark.parametrize("kind", ["nvfp4", "int4", "fp8", "pow2", "without head copies", "without mtp"])
def test_a_healthy_artifact_passes_deep_and_source(made: dict[str, Path], source: Path, kind: str) -> None:
    result = judged(made[kind], source, deep=True)
    assert result.ok, [difference.text() for difference in result.differences]
    assert result.checks["encoding"] == 42
    assert set(result.errors) == {"routed expert", "attention projection"}


def test_counts_are_those_of_the_files(made: dict[str, Path]) -> None:
    result = verify_headers(made["nvfp4"])
    tensors = read(made["nvfp4"])
    assert (result.tensors, result.shards) == (len(tensors), 3)
    assert result.bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert result.mtp_tensors == sum(name.startswith("mtp.") for name in tensors)


@pytest.fixture(scope="session")
def grid(tensors: maker.Tensors, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, maker.Tensors]:
    """A source whose experts are on NVFP4's grid, -0 among them; an artifact that stores each -0 as +0; the weights."""
    root = tmp_path_factory.mktemp("grid")
    weights = maker.on_grid(tensors, Dims.from_config(CONFIG))
    source = maker.write_source(root / "source", weights)
    return source, maker.write_artifact(root / "stock", weights, pow2=True), weights


def test_weights_on_the_grid_are_exact_where_negative_zeros_are_kept(
    grid: tuple[Path, Path, maker.Tensors], tmp_path: Path
) -> None:
    artifact = maker.copy(grid[1], tmp_path / "a")
    maker.keeping_negative_zeros(artifact, grid[2])
    result = judged(artifact, grid[0], deep=True)
    assert result.ok
    assert result.errors["routed expert"]["exact"] == result.errors["routed expert"]["tensors"] == 27
    assert result.errors["routed expert"]["max_abs_error"] == 0


def test_a_tensor_that_lost_its_negative_zeros_passes_but_is_not_exact(
    grid: tuple[Path, Path, maker.Tensors],
) -> None:
    result = judged(grid[1], grid[0], deep=True)
    with_them = sum(bool(((t == 0) & t.signbit()).any()) for n, t in grid[2].items() if _is_main_expert(n))
    assert result.ok
    assert result.errors["routed expert"]["exact"] == 27 - with_them < 27
    assert result.errors["routed expert"]["max_abs_error"] == 0


def _is_main_expert(name: str) -> bool:
    return name.startswith("layers.") and ".ffn.experts." in name


def test_a_mixture_of_kept_and_lost_negative_zeros_in_one_tensor_fails(
    grid: tuple[Path, Path, maker.Tensors], tmp_path: Path
) -> None:
    artifact, name = maker.copy(grid[1], tmp_path / "a"), f"{EXPERT}.w1.weight_packed"
    lost = read(artifact)[name]
    maker.keeping_negative_zeros(artifact, grid[2])
    kept = read(artifact)[name]
    row, column = (kept != lost).nonzero()[0].tolist()
    kept[row, column] = lost[row, column]
    edit(artifact, {name: kept})
    difference = only(judged(artifact, grid[0]))
    assert (difference.check, difference.tensor) == ("encoding", name)
    assert difference.found.startswith(f"1 of {kept.numel():,} bytes differ, the first at [{row}, {column}]")


def test_exactness_in_all_is_the_sum_of_the_classes(grid: tuple[Path, Path, maker.Tensors]) -> None:
    result = judged(grid[1], grid[0])
    in_all = result.exactness()
    assert in_all is not None and in_all["tensors"] == 42
    for key, add in (("tensors", sum), ("exact", sum), ("max_abs_error", max)):
        assert in_all[key] == add(errors[key] for errors in result.errors.values())


def test_max_abs_error_is_that_of_the_weights(made: dict[str, Path], source: Path, tensors: maker.Tensors) -> None:
    stored, most = read(made["nvfp4"]), 0.0
    for name, weight in tensors.items():
        module = name.removesuffix(".weight")
        if _is_main_expert(name):
            scales = (stored[f"{module}.weight_scale"], stored[f"{module}.weight_global_scale"])
            decoded = nvfp4_decode(stored[f"{module}.weight_packed"], *scales)
            most = max(most, float((weight.float() - decoded).abs().max()))
    assert judged(made["nvfp4"], source).errors["routed expert"]["max_abs_error"] == most > 0


def test_exact_tensors_are_told_to_people(
    grid: tuple[Path, Path, maker.Tensors], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact = maker.copy(grid[1], tmp_path / "a")
    maker.keeping_negative_zeros(artifact, grid[2])
    show_verification(judged(artifact, grid[0]), Console())
    told = capsys.readouterr().out
    assert "routed expert: 27 of 27 tensors exact, max abs error 0\n" in told
    assert "attention projection: 0 of 15 tensors exact, max abs error 0.0" in told
    assert "in all: 27 of 42 tensors exact, max abs error 0.0" in told


def test_without_a_source_nothing_is_said_about_exactness(made: dict[str, Path]) -> None:
    assert judged(made["nvfp4"], deep=True).exactness() is None


def test_relative_error_is_that_of_the_weights(made: dict[str, Path], source: Path, tensors: maker.Tensors) -> None:
    stored, worst = read(made["nvfp4"]), 0.0
    for name in (name for name in stored if name.startswith("layers.") and name.endswith("attn.wkv.weight")):
        scale = stored[f"{name}_scale"].float().repeat_interleave(128, 0).repeat_interleave(128, 1)
        weight = tensors[name].double()
        decoded = stored[name].double() * scale[: weight.shape[0], : weight.shape[1]].double()
        worst = max(worst, float((weight - decoded).norm() / weight.norm()))
    stats = judged(made["nvfp4"], source).errors["attention projection"]
    assert worst <= stats["max_relative_error"] < 0.03
    assert stats["mean_relative_error"] <= stats["max_relative_error"]


def test_progress_ends_at_the_total(made: dict[str, Path], source: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    result = verify(made["nvfp4"], source=source, deep=True, progress=lambda *call: calls.append(call))
    assert calls[-1][1] == calls[-1][2] == result.bytes


def test_result_is_plain_json(artifact: Path, source: Path) -> None:
    edit(artifact, {f"{EXPERT}.w1.weight_scale": None})
    plain = json.loads(json.dumps(judged(artifact, source, deep=True).as_dict()))
    assert plain["ok"] is False
    assert plain["difference_count"] == 1
    assert plain["differences"][0]["tensor"] == f"{EXPERT}.w1.weight_scale"


def test_header_checks_do_not_import_torch(made: dict[str, Path]) -> None:
    import subprocess
    import sys

    code = (
        "import sys; from pathlib import Path; from dsv4q.verify.judge import verify_headers;"
        "assert verify_headers(Path(sys.argv[1])).ok; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(made["nvfp4"])], check=True)


@pytest.mark.parametrize("kind", ["absent folder", "no config.json", "another model"])
def test_what_is_not_an_artifact_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    if kind != "absent folder":
        (tmp_path / "x").mkdir()
    if kind == "another model":
        (tmp_path / "x" / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(SourceError):
        verify_headers(tmp_path / "x")


# ------------------------------------------------------------------------------------------------ tensors


def _drop_expert(root: Path) -> None:
    edit(root, {name: None for name in read(root) if name.startswith(f"{EXPERT}.")})


def test_a_missing_expert_is_named_tensor_by_tensor(artifact: Path) -> None:
    _drop_expert(artifact)
    result = judged(artifact)
    assert {d.check for d in result.differences} == {"tensors"}
    assert len(result.differences) == 12
    assert all(d.tensor and d.tensor.startswith(EXPERT) and d.found == "no such tensor" for d in result.differences)


@pytest.mark.parametrize(
    "name",
    [
        f"{EXPERT}.w1.weight_scale",
        f"{EXPERT}.w2.weight_global_scale",
        f"{EXPERT}.w3.input_global_scale",
        f"{WQ_A}.weight_scale",
        "layers.1.ffn.gate.bias",
        "layers.0.ffn.gate.tid2eid",
    ],
)
def test_a_missing_tensor_is_named(artifact: Path, name: str) -> None:
    edit(artifact, {name: None})
    difference = only(judged(artifact))
    assert (difference.check, difference.tensor, difference.found) == ("tensors", name, "no such tensor")


@pytest.mark.parametrize(
    ("name", "change", "expected", "found"),
    [
        (f"{EXPERT}.w1.weight_scale", lambda t: t.view(torch.uint8), "F8_E4M3", "U8"),
        (f"{EXPERT}.w1.weight_packed", lambda t: t.view(torch.int8), "U8", "I8"),
        (f"{EXPERT}.w1.weight_global_scale", lambda t: t.reshape(()), "F32 [1]", "F32 []"),
        (f"{EXPERT}.w1.input_global_scale", lambda t: t.to(torch.bfloat16), "F32", "BF16"),
        (f"{WQ_A}.weight", lambda t: t.view(torch.uint8), "F8_E4M3", "U8"),
        (f"{WQ_A}.weight_scale", lambda t: t.flatten(), "[1, 1]", "[1]"),
        ("layers.1.ffn.gate.bias", lambda t: t.to(torch.bfloat16), "F32", "BF16"),
        ("layers.1.attn.attn_sink", lambda t: t.to(torch.bfloat16), "F32", "BF16"),
        ("layers.1.ffn.shared_experts.w1.weight", lambda t: t.to(torch.float8_e4m3fn), "BF16", "F8_E4M3"),
        ("mtp.0.ffn.gate.bias", lambda t: t.to(torch.bfloat16), "F32", "BF16"),
        ("mtp.0.head.weight", lambda t: t.float(), "BF16", "F32"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_dtype_or_shape_is_named(
    artifact: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor], expected: str, found: str
) -> None:
    edit(artifact, {name: change(read(artifact)[name])})
    difference = only(judged(artifact))
    assert difference.tensor == name
    assert expected in difference.expected
    assert found in difference.found


def test_one_attention_scale_in_another_dtype_is_named(artifact: Path) -> None:
    edit(artifact, {f"{WQ_A}.weight_scale": read(artifact)[f"{WQ_A}.weight_scale"].float()})
    assert only(judged(artifact)).tensor == f"{WQ_A}.weight_scale"


def test_all_attention_scales_in_f32_are_fine(artifact: Path, source: Path) -> None:
    made = maker.fp8(read(source)[f"{WQ_A}.weight"].float())
    assert made["weight_scale"].dtype == torch.float32
    scales = {n: t for n, t in read(artifact).items() if ".attn.w" in n and n.endswith("weight_scale")}
    edit(artifact, {name: torch.exp2(torch.ceil(torch.log2(scale.float()))) for name, scale in scales.items()})
    assert judged(artifact).ok


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        (f"{WQ_A}.weight_scale", f"{WQ_A}.weight_scale_inv", f"a scale is called {WQ_A}.weight_scale"),
        (f"{WQ_A}.weight_scale", f"{WQ_A}.scale", f"a scale is called {WQ_A}.weight_scale"),
        ("embed.weight", "model.embed_tokens.weight", "transformers' name"),
        (f"{WQ_A}.weight", "model.layers.0.self_attn.q_a_proj.weight", "transformers' name"),
        (f"{EXPERT}.w1.weight_packed", "model.layers.1.mlp.experts.2.gate_proj.weight_packed", "transformers' name"),
    ],
)
def test_a_wrong_name_is_told_with_the_right_one(artifact: Path, old: str, new: str, told: str) -> None:
    edit(artifact, {old: None, new: read(artifact)[old]})
    missing, extra = judged(artifact).differences
    assert (missing.tensor, extra.tensor) == (old, new)
    assert told in extra.expected


def test_an_extra_tensor_is_named(artifact: Path) -> None:
    edit(artifact, {f"{EXPERT}.w1.weight_zero_point": torch.zeros(1)})
    difference = only(judged(artifact))
    assert (difference.tensor, difference.expected) == (f"{EXPERT}.w1.weight_zero_point", "no such tensor")


# ------------------------------------------------------------------------------------------------ mtp


@pytest.mark.parametrize("name", ["mtp.0.enorm.weight", "mtp.0.ffn.experts.1.w2.weight", "mtp.0.hc_head_fn"])
def test_a_missing_mtp_tensor_is_named(artifact: Path, name: str) -> None:
    edit(artifact, {name: None})
    difference = only(judged(artifact))
    assert (difference.check, difference.tensor) == ("mtp", name)


def test_mtp_missing_as_a_whole_is_counted_exactly(artifact: Path) -> None:
    edit(artifact, {name: None for name in read(artifact) if name.startswith("mtp.")})
    result = judged(artifact)
    assert len(result.differences) == 38
    assert {d.check for d in result.differences} == {"mtp"}


def test_a_quantized_mtp_linear_is_named(artifact: Path, tensors: maker.Tensors) -> None:
    module = "mtp.0.attn.wq_a"
    edit(artifact, {f"{module}.{suffix}": t for suffix, t in maker.fp8(tensors[f"{module}.weight"]).items()})
    wrong, extra = judged(artifact).differences
    assert (wrong.check, wrong.tensor, wrong.found) == ("mtp", f"{module}.weight", "F8_E4M3 [48, 64]")
    assert (extra.check, extra.tensor) == ("mtp", f"{module}.weight_scale")


def test_mtp_embed_is_a_fatal_name(artifact: Path) -> None:
    edit(artifact, {"mtp.0.embed.weight": read(artifact)["embed.weight"]})
    difference = only(judged(artifact))
    assert (difference.check, difference.tensor) == ("mtp", "mtp.0.embed.weight")
    assert "mtp.0.emb.tok_emb.weight" in difference.expected


@pytest.mark.parametrize("name", ["mtp.0.emb.tok_emb.weight", "mtp.0.head.weight"])
def test_one_head_copy_without_the_other_is_named(artifact: Path, name: str) -> None:
    edit(artifact, {name: None})
    assert only(judged(artifact)).tensor == name


def test_mtp_tensors_that_config_denies_are_named(artifact: Path) -> None:
    edit_json(artifact, "config.json", lambda config: config.update(num_nextn_predict_layers=0))
    result = judged(artifact)
    assert {d.check for d in result.differences} == {"mtp"}
    assert len(result.differences) == result.mtp_tensors == 40


# ------------------------------------------------------------------------------------------------ index and files


def test_an_index_that_names_another_shard_is_told(artifact: Path) -> None:
    name = "layers.0.attn_norm.weight"
    edit_json(artifact, INDEX, lambda i: i["weight_map"].update({name: "model-00002-of-00003.safetensors"}))
    difference = only(judged(artifact))
    assert (difference.check, difference.tensor, difference.found) == ("index", name, f"in {SHARD}")


def test_a_tensor_that_the_index_omits_is_named(artifact: Path) -> None:
    edit_json(artifact, INDEX, lambda index: index["weight_map"].pop("norm.weight"))
    difference = only(judged(artifact))
    assert (difference.check, difference.tensor, difference.expected) == (
        "index",
        "norm.weight",
        "an entry in the index",
    )


def test_an_index_entry_without_a_tensor_is_named(artifact: Path) -> None:
    edit_json(artifact, INDEX, lambda index: index["weight_map"].update({"ghost.weight": SHARD}))
    difference = only(judged(artifact))
    assert (difference.check, difference.tensor, difference.found) == ("index", "ghost.weight", "in no shard")


def test_a_tensor_in_two_shards_is_named(artifact: Path) -> None:
    from safetensors.torch import load_file, save_file

    other = artifact / "model-00003-of-00003.safetensors"
    save_file({**load_file(other), "embed.weight": load_file(artifact / SHARD)["embed.weight"]}, other)
    other.chmod(0o644)
    edit_json(artifact, INDEX, lambda i: i["metadata"].update(total_size=i["metadata"]["total_size"] + 24 * 64 * 2))
    difference = only(judged(artifact))
    assert (difference.check, difference.tensor, difference.expected) == ("index", "embed.weight", "one copy")


@pytest.mark.parametrize("wrong", [1, None, "123", 1.5, True])
def test_a_wrong_total_size_is_told(artifact: Path, wrong: object) -> None:
    edit_json(artifact, INDEX, lambda index: index["metadata"].update(total_size=wrong))
    difference = only(judged(artifact))
    assert (difference.check, difference.file, difference.found) == ("index", INDEX, repr(wrong))


def test_a_missing_index_is_told(artifact: Path) -> None:
    (artifact / INDEX).unlink()
    assert (only(judged(artifact)).check, only(judged(artifact)).file) == ("files", INDEX)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}'])
def test_a_broken_index_is_told_without_a_traceback(artifact: Path, text: str) -> None:
    (artifact / INDEX).write_text(text)
    assert "index" in {d.check for d in judged(artifact).differences}


def test_a_missing_shard_is_told_once(artifact: Path) -> None:
    (artifact / SHARD).unlink()
    difference = only(judged(artifact))
    assert (difference.check, difference.file) == ("files", SHARD)


def test_a_shard_of_another_series_is_named(artifact: Path) -> None:
    (artifact / "model-00004-of-00004.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    assert {d.file for d in judged(artifact).differences} == {"model-00004-of-00004.safetensors"}


def test_a_truncated_shard_is_told(artifact: Path, source: Path) -> None:
    shard = artifact / SHARD
    shard.write_bytes(shard.read_bytes()[:-100])
    result = judged(artifact, source, deep=True)
    assert (only(result).check, only(result).file) == ("headers", SHARD)


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: b"",
        lambda raw: raw[:5],
        lambda raw: (2**62).to_bytes(8, "little") + raw[8:],
        lambda raw: raw[:8] + b"\xff" + raw[9:],
        lambda raw: raw[:8] + b"[" + raw[9:],
        lambda raw: raw + b"\0",
    ],
    ids=["empty", "five bytes", "huge length", "not UTF-8", "not JSON", "a byte too many"],
)
def test_a_damaged_header_is_told_once(artifact: Path, source: Path, damage: Callable[[bytes], bytes]) -> None:
    shard = artifact / SHARD
    shard.write_bytes(damage(shard.read_bytes()))
    result = judged(artifact, source, deep=True)
    assert (only(result).check, only(result).file) == ("headers", SHARD)


@pytest.mark.parametrize(
    "info",
    [
        7,
        {"dtype": "F4", "shape": [1], "data_offsets": [0, 1]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1]},
        {"dtype": "F32", "shape": [1], "data_offsets": [0]},
    ],
    ids=str,
)
def test_a_header_entry_that_contradicts_itself_is_named(artifact: Path, info: object) -> None:
    shard = artifact / SHARD
    raw = shard.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.dumps({**json.loads(raw[8 : 8 + length]), "bad": info}).encode()
    shard.write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + length :])
    difference = only(judged(artifact))
    assert (difference.check, difference.tensor, difference.file) == ("headers", "bad", SHARD)


@pytest.mark.parametrize("name", ["model-00002-of-00003.safetensors.partial", ".dsv4q"])
def test_remains_of_an_unfinished_run_are_named(artifact: Path, name: str) -> None:
    (artifact / name).mkdir()
    difference = only(judged(artifact))
    assert (difference.check, difference.file) == ("files", name)


def test_a_missing_recipe_is_told(artifact: Path) -> None:
    (artifact / "recipe.yaml").unlink()
    assert only(judged(artifact)).file == "recipe.yaml"


def test_a_file_that_others_cannot_read_is_told(artifact: Path) -> None:
    (artifact / SHARD).chmod(0o600)
    difference = only(judged(artifact))
    assert (difference.check, difference.file, difference.found) == ("files", SHARD, "0600")


# ------------------------------------------------------------------------------------------------ config.json


def _set(*path: str, value: object) -> Callable[[dict[str, Any]], None]:
    def change(config: dict[str, Any]) -> None:
        for key in path[:-1]:
            config = config[key]
        config[path[-1]] = value

    return change


def _delete(*path: str) -> Callable[[dict[str, Any]], None]:
    def change(config: dict[str, Any]) -> None:
        for key in path[:-1]:
            config = config[key]
        del config[path[-1]]

    return change


ATTENTION, EXPERTS = ("config_groups", "attention"), ("config_groups", "experts")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (_delete("quant_method"), "quant_method"),
        (_set("quantization_status", value="frozen"), "quantization_status"),
        (_set("format", value="nvfp4-pack-quantized"), "format: 'mixed-precision'"),
        (_delete("version"), "version"),
        (_set("block_size", value=1), "quantization_config"),
        (_set("kv_cache_scheme", value={"num_bits": 8}), "kv_cache_scheme"),
        (_delete(*EXPERTS, "weights"), "experts.weights"),
        (_set(*EXPERTS, "actorder", value=None), "config_groups.experts"),
        (_set(*EXPERTS, "weights", "is_mx", value=False), "config_groups.experts.weights"),
        (_set(*EXPERTS, "weights", "group_size", value=32), "weights.group_size: 16"),
        (_set(*EXPERTS, "weights", "scale_dtype", value="torch.uint8"), "weights.scale_dtype"),
        (_set(*EXPERTS, "weights", "observer", value="dsv4q_exact"), "observer: null or a stock one"),
        (_set(*EXPERTS, "weights", "observer_kwargs", value=None), "observer_kwargs"),
        (_set(*EXPERTS, "input_activations", "dynamic", value=True), "dynamic: 'local'"),
        (_set(*ATTENTION, "input_activations", value=None), "attention.input_activations"),
        (_set(*ATTENTION, "input_activations", "dynamic", value=False), "dynamic: True"),
        (_set(*ATTENTION, "input_activations", "dynamic", value=1), "dynamic: True"),
        (_set(*ATTENTION, "input_activations", "group_size", value=64), "group_size: 128"),
        (_set(*ATTENTION, "weights", "block_structure", value=[64, 64]), "block_structure: [128, 128]"),
        (_set(*ATTENTION, "output_activations", value={}), "output_activations: null"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_quantization_field_is_named(
    artifact: Path, change: Callable[[dict[str, Any]], None], told: str
) -> None:
    edit_config(artifact, change)
    config = [d for d in judged(artifact).differences if d.check == "config"]
    assert len(config) == 1
    assert told in config[0].expected
    assert config[0].file == "config.json"


@pytest.mark.parametrize("group", ["attention", "experts"])
def test_a_group_without_format_is_named(artifact: Path, group: str) -> None:
    edit_config(artifact, _delete("config_groups", group, "format"))
    assert f"config_groups.{group}.format" in judged(artifact).differences[0].expected


@pytest.mark.parametrize("value", [None, [], {"attention": 3}])
def test_groups_that_are_none_are_told_without_a_traceback(artifact: Path, value: object) -> None:
    edit_config(artifact, _set("config_groups", value=value))
    assert "config" in {d.check for d in judged(artifact).differences}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (_set(*EXPERTS, "weights", "strategy", value="token"), "experts: a scheme that compressed-tensors knows"),
        (_set(*EXPERTS, "weights", "num_bits", value=5), "experts: a scheme that compressed-tensors knows"),
        (_set(*EXPERTS, "weights", value={"group_size": 24}), "linears that experts can store"),
        (_set(*EXPERTS, "weights", "dynamic", value=True), "experts.weights.dynamic: False"),
        (_set(*EXPERTS, "format", value="dense"), "experts.format: one of"),
        (_set(*EXPERTS, "input_activations", value={"num_bits": "many"}), "experts: a scheme that compressed-tensors"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_scheme_that_compressed_tensors_refuses_is_named(
    made: dict[str, Path], tmp_path: Path, change: Callable[[dict[str, Any]], None], told: str
) -> None:
    artifact = maker.copy(made["fp8"], tmp_path / "a")
    edit_config(artifact, change)
    assert any(told in d.expected and d.file == "config.json" for d in judged(artifact).differences)


def test_a_scheme_other_than_that_of_the_tensors_is_named(made: dict[str, Path], tmp_path: Path) -> None:
    artifact = maker.copy(made["fp8"], tmp_path / "a")
    edit_config(artifact, _set(*EXPERTS, "weights", "block_structure", value=[16, 16]))
    differences = judged(artifact).differences
    assert {d.tensor for d in differences} == {n for n in read(artifact) if ".experts." in n and n.endswith("_scale")}
    assert {d.expected for d in differences} == {"BF16 [2, 4]", "BF16 [4, 2]"}


@pytest.mark.parametrize("byte", [0x7F, 0xFF])
def test_a_nan_among_the_values_of_any_scheme_is_named(made: dict[str, Path], tmp_path: Path, byte: int) -> None:
    artifact, name = maker.copy(made["fp8"], tmp_path / "a"), f"{EXPERT}.w1.weight"
    weight = read(artifact)[name]
    weight.view(torch.uint8)[3, 4] = byte
    edit(artifact, {name: weight})
    difference = only(judged(artifact, deep=True))
    assert (difference.check, difference.tensor) == ("values", name)
    assert "1 of" in difference.found and "[3, 4]" in difference.found


def test_another_source_gives_other_values_in_any_scheme(
    made: dict[str, Path], source: Path, tensors: maker.Tensors, tmp_path: Path
) -> None:
    artifact = maker.copy(made["fp8"], tmp_path / "a")
    edit(artifact, {f"{EXPERT}.w1.{s}": t for s, t in maker.fp8_blocks(tensors[f"{EXPERT}.w3.weight"]).items()})
    result = judged(artifact, source)
    assert (only(result).check, only(result).tensor) == ("encoding", f"{EXPERT}.w1.weight")
    assert result.errors["routed expert"]["max_relative_error"] > 1


def test_a_missing_quantization_config_is_told(artifact: Path) -> None:
    edit_json(artifact, "config.json", _delete("quantization_config"))
    assert judged(artifact).differences[0].expected == "quantization_config: an object"


def _targets(group: str, *entries: str) -> Callable[[dict[str, Any]], None]:
    return _set("config_groups", group, "targets", value=list(entries))


def _ignoring(*entries: str) -> Callable[[dict[str, Any]], None]:
    return lambda config: config["ignore"].extend(entries)


def _not_ignoring(entry: str) -> Callable[[dict[str, Any]], None]:
    return lambda config: config["ignore"].remove(entry)


DRAFT = r"re:^model\.layers\.3\..*"


@pytest.mark.parametrize(
    ("change", "told", "named"),
    [
        (
            _targets("attention", r"re:.*self_attn\.(q_a|q_b|kv|o_a|o_b)_proj$"),
            "both vocabularies",
            "layers.0.attn.wq_a",
        ),
        (_targets("experts", r"re:.*\.ffn\.experts\.\d+\.w[123]$"), "both vocabularies", "gate_proj"),
        (_targets("attention", r"re:^layers\..*attn\.(wq_a|wq_b|wkv|wo_a|wo_b)$"), "both vocabularies", "model.layers"),
        (_targets("attention", "Linear"), "shared experts left unquantized", "shared_experts"),
        (
            _targets("attention", r"re:.*\.attn\..*", maker.ATTENTION_TARGET),
            "compressors left unquantized",
            "compressor",
        ),
        (
            _targets("attention", r"re:.*attn.*(wq_b|q_b_proj)$", maker.ATTENTION_TARGET),
            "indexers left",
            "indexer.wq_b",
        ),
        (_targets("experts", maker.EXPERT_TARGET, r"re:.*shared_experts.*w1$"), "shared experts left", "w1"),
        (_targets("experts", maker.EXPERT_TARGET, "head"), "heads left unquantized", "head"),
        (_targets("experts", maker.EXPERT_TARGET, "layers.7.none"), "targets that match something", "layers.7.none"),
        (_not_ignoring(DRAFT), "the MTP draft left unquantized", "model.layers.3"),
        (_not_ignoring(r"re:^mtp\..*"), "the MTP draft left unquantized", "mtp.0"),
        (_not_ignoring(r"re:^model\.mtp\..*"), "the MTP draft left unquantized", "model.mtp.0"),
        (_ignoring(r"re:.*\.wq_a$"), "wq_a and wkv", "layers.0"),
        (_ignoring(r"re:.*\.experts\.1\.w3$"), "w1 and w3", "experts.1.w1"),
        (_ignoring(r"re:.*layers\.1\.attn.*"), "no ignore entry that matches a targeted linear", "layers.1.attn.wq_a"),
        (
            _targets("experts", maker.EXPERT_TARGET, maker.ATTENTION_TARGET),
            "one group per linear",
            "layers.0.attn.wq_a",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_targets_and_ignore_are_played_through(
    artifact: Path, change: Callable[[dict[str, Any]], None], told: str, named: str
) -> None:
    edit_config(artifact, change)
    hits = [d for d in judged(artifact).differences if d.check == "targets" and told in d.expected]
    assert hits
    assert any(named in d.found for d in hits)


def test_literal_ignore_entries_are_not_demanded(artifact: Path) -> None:
    edit_config(artifact, _set("ignore", value=[r"re:^(model\.)?mtp\.", r"re:^model\.layers\.(3|4)\."]))
    assert judged(artifact).ok


def test_a_broken_regular_expression_is_named(artifact: Path) -> None:
    edit_config(artifact, _ignoring("re:*("))
    assert "re:*(" in judged(artifact).differences[0].found


def test_targets_that_drop_one_projection_are_told(artifact: Path) -> None:
    edit_config(artifact, _targets("attention", maker.ATTENTION_TARGET.replace("wo_b|", "").replace("|wo_b", "")))
    assert any("both vocabularies" in d.expected for d in judged(artifact).differences)


def test_a_layer_may_be_left_out_by_the_targets(artifact: Path, source: Path, tensors: maker.Tensors) -> None:
    target = maker.ATTENTION_TARGET.replace("re:.*", r"re:.*layers\.[01]")
    edit_config(artifact, _targets("attention", target))
    quantized = [n for n in read(artifact) if n.startswith("layers.2.attn.w")]
    modules = {name.rpartition(".")[0] for name in quantized}
    edit(artifact, dict.fromkeys(quantized) | {f"{m}.weight": tensors[f"{m}.weight"] for m in modules})
    assert judged(artifact, source, deep=True).ok


# ------------------------------------------------------------------------------------------------ values


@pytest.mark.parametrize("kind", ["NaN", "infinite", "zero", "negative"])
@pytest.mark.parametrize(
    "suffix", [f"{EXPERT}.w1.weight_global_scale", f"{EXPERT}.w2.input_global_scale", f"{WQ_A}.weight_scale"]
)
def test_an_impossible_scale_is_named(artifact: Path, suffix: str, kind: str) -> None:
    value = {"NaN": float("nan"), "infinite": float("inf"), "zero": 0.0, "negative": -1.0}[kind]
    edit(artifact, {suffix: torch.full_like(read(artifact)[suffix], value)})
    scales = [d for d in judged(artifact, deep=True).differences if d.check == "scales"]
    assert [d.tensor for d in scales] == [suffix]
    assert f"are {kind}" in scales[0].found


@pytest.mark.parametrize(
    ("byte", "kind"), [(0x7F, "NaN"), (0xFF, "NaN"), (0x00, "zero"), (0x80, "zero"), (0xB8, "negative")]
)
def test_an_impossible_block_scale_is_named_with_its_place(artifact: Path, byte: int, kind: str) -> None:
    name = f"{EXPERT}.w1.weight_scale"
    scale = read(artifact)[name]
    scale.view(torch.uint8)[3, 1] = byte
    edit(artifact, {name: scale})
    difference = only(judged(artifact, deep=True))
    assert (difference.check, difference.tensor) == ("scales", name)
    assert f"1 of {scale.numel()} are {kind}, the first at [3, 1]" in difference.found


def test_header_checks_alone_do_not_read_values(artifact: Path) -> None:
    edit(artifact, {f"{EXPERT}.w1.weight_global_scale": torch.tensor([float("nan")])})
    assert judged(artifact).ok


@pytest.mark.parametrize("suffix", ["weight_global_scale", "input_global_scale"])
def test_w1_and_w3_with_different_global_scales_are_named(artifact: Path, suffix: str) -> None:
    name = f"{EXPERT}.w3.{suffix}"
    edit(artifact, {name: read(artifact)[name] * 1.0001})
    difference = only(judged(artifact, deep=True))
    assert (difference.check, difference.tensor) == ("pairs", name)


@pytest.mark.parametrize("byte", [0x7F, 0xFF])
def test_a_nan_among_fp8_weights_is_named_with_its_place(artifact: Path, byte: int) -> None:
    weight = read(artifact)[f"{WQ_A}.weight"]
    weight.view(torch.uint8)[5, 7] = byte
    edit(artifact, {f"{WQ_A}.weight": weight})
    difference = only(judged(artifact, deep=True))
    assert (difference.check, difference.tensor) == ("values", f"{WQ_A}.weight")
    assert "[5, 7]" in difference.found


def test_a_wrong_weight_shape_is_named(made: dict[str, Path], tmp_path: Path) -> None:
    artifact = maker.copy(made["int4"], tmp_path / "a")
    name = f"{EXPERT}.w1.weight_shape"
    edit(artifact, {name: read(artifact)[name].flip(0)})
    assert only(judged(artifact, deep=True)).tensor == name


@pytest.mark.parametrize("name", ["layers.1.ffn.gate.bias", "mtp.0.attn.wq_a.weight", "embed.weight"])
def test_a_nan_in_an_untouched_tensor_is_named(artifact: Path, name: str) -> None:
    tensor = read(artifact)[name]
    tensor.view(-1)[1] = float("nan")
    edit(artifact, {name: tensor})
    difference = only(judged(artifact, deep=True))
    assert (difference.check, difference.tensor, difference.found) == ("values", name, "1 others")


def test_a_hash_table_with_a_ghost_expert_is_named(artifact: Path) -> None:
    name = "layers.0.ffn.gate.tid2eid"
    edit(artifact, {name: read(artifact)[name] + 1})
    assert only(judged(artifact, deep=True)).tensor == name


# ------------------------------------------------------------------------------------------------ against the source


@pytest.mark.parametrize(
    "name",
    [
        "embed.weight",
        "layers.1.ffn.gate.weight",
        "layers.0.ffn.gate.tid2eid",
        "layers.2.attn.compressor.ape",
        "layers.1.ffn.shared_experts.w2.weight",
        "mtp.0.ffn.experts.2.w3.weight",
        "mtp.0.h_proj.weight",
        "mtp.0.emb.tok_emb.weight",
        "mtp.0.head.weight",
    ],
)
def test_a_flipped_bit_in_an_untouched_tensor_is_named(artifact: Path, source: Path, name: str) -> None:
    tensor = read(artifact)[name].contiguous()
    tensor.view(-1).view(torch.uint8)[9] ^= 1
    edit(artifact, {name: tensor})
    difference = only(judged(artifact, source))
    assert (difference.check, difference.tensor) == ("bytes", name)
    assert difference.found == f"1 of {tensor.nbytes:,} bytes differ, the first at byte 9 of the tensor"


def test_a_router_bias_that_went_through_bf16_is_named(artifact: Path, source: Path) -> None:
    name = "layers.1.ffn.gate.bias"
    edit(artifact, {name: read(artifact)[name].bfloat16().float()})
    difference = only(judged(artifact, source))
    assert (difference.check, difference.tensor) == ("bytes", name)


def test_head_copies_taken_from_each_other_are_named(artifact: Path, source: Path) -> None:
    stored = read(artifact)
    edit(artifact, {"mtp.0.head.weight": stored["embed.weight"], "mtp.0.emb.tok_emb.weight": stored["head.weight"]})
    found = {d.tensor for d in judged(artifact, source).differences}
    assert found == {"mtp.0.head.weight", "mtp.0.emb.tok_emb.weight"}


def test_swapped_experts_are_named(artifact: Path, source: Path) -> None:
    stored = read(artifact)
    one, two = "layers.1.ffn.experts.0", "layers.1.ffn.experts.1"
    names = [name.removeprefix(one) for name in stored if name.startswith(f"{one}.")]
    edit(
        artifact, {f"{one}{n}": stored[f"{two}{n}"] for n in names} | {f"{two}{n}": stored[f"{one}{n}"] for n in names}
    )
    assert judged(artifact, deep=True).ok
    result = judged(artifact, source)
    assert {d.check for d in result.differences} == {"encoding"}
    assert {d.tensor for d in result.differences} == {
        f"{e}.{w}.weight_packed" for e in (one, two) for w in ("w1", "w2", "w3")
    }


def test_swapped_nibbles_are_named(artifact: Path, source: Path) -> None:
    name = f"{EXPERT}.w2.weight_packed"
    packed = read(artifact)[name]
    edit(artifact, {name: packed << 4 | packed >> 4})
    difference = only(judged(artifact, source))
    assert (difference.check, difference.tensor) == ("encoding", name)


def test_one_flipped_nibble_is_found_at_its_place(artifact: Path, source: Path) -> None:
    name = f"{EXPERT}.w1.weight_packed"
    packed = read(artifact)[name]
    packed[4, 3] ^= 0x10
    edit(artifact, {name: packed})
    found = only(judged(artifact, source)).found
    assert found.startswith(f"1 of {packed.numel():,} bytes differ, the first at [4, 3]: 0x{int(packed[4, 3]):02x}")


def test_one_flipped_bit_in_attention_is_named(artifact: Path, source: Path) -> None:
    weight = read(artifact)[f"{WQ_A}.weight"]
    weight.view(torch.uint8)[0, 0] ^= 0x80
    edit(artifact, {f"{WQ_A}.weight": weight})
    difference = only(judged(artifact, source))
    assert (difference.check, difference.tensor) == ("encoding", f"{WQ_A}.weight")


def test_integers_rounded_down_are_named(made: dict[str, Path], source: Path, tmp_path: Path) -> None:
    artifact = maker.copy(made["int4"], tmp_path / "a")
    name = f"{EXPERT}.w1.weight_packed"
    packed = read(artifact)[name]
    packed[0, 0] ^= 1
    edit(artifact, {name: packed})
    assert (only(judged(artifact, source)).check, only(judged(artifact, source)).tensor) == ("encoding", name)


@pytest.mark.parametrize("factor", [0.5, 2.0, 4.0])
def test_scales_of_a_linear_wrong_by_a_factor_fail_though_reencoded(
    artifact: Path, source: Path, tensors: maker.Tensors, factor: float
) -> None:
    module = f"{EXPERT}.w2"
    stored = read(artifact)
    # E4M3 ends at 448: the global scale makes room, and the product is what counts.
    room = 1 / 4 if factor > 1 else 1.0
    stored[f"{module}.weight_global_scale"] *= room
    scale = (stored[f"{module}.weight_scale"].float() * factor * room).to(torch.float8_e4m3fn)
    edit(artifact, maker.reencoded_nvfp4(tensors[f"{module}.weight"], stored, module, scale))
    difference = only(judged(artifact, source, deep=True))
    assert (difference.check, difference.tensor) == ("error", f"{module}.weight_scale")


@pytest.mark.parametrize("kind", ["nvfp4", "pow2"])
@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_one_block_scale_wrong_by_two_fails_though_reencoded(
    made: dict[str, Path], source: Path, tensors: maker.Tensors, tmp_path: Path, kind: str, factor: float
) -> None:
    artifact = maker.copy(made[kind], tmp_path / "a")
    module, stored = f"{EXPERT}.w1", read(artifact)
    scale = stored[f"{module}.weight_scale"].float()
    row, column = divmod(int(scale.argmin()), scale.shape[1])
    scale[row, column] *= factor
    edit(artifact, maker.reencoded_nvfp4(tensors[f"{module}.weight"], stored, module, scale))
    difference = only(judged(artifact, source, deep=True))
    assert (difference.check, difference.tensor) == ("error", f"{module}.weight_scale")
    assert f"1 of {scale.numel()} scales, the first at [{row}, {column}]" in difference.found


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_attention_scales_wrong_by_two_fail_though_reencoded(
    artifact: Path, source: Path, tensors: maker.Tensors, factor: float
) -> None:
    wrong = maker.fp8(tensors[f"{WQ_A}.weight"], factor=factor)
    edit(artifact, {f"{WQ_A}.{suffix}": tensor for suffix, tensor in wrong.items()})
    difference = only(judged(artifact, source, deep=True))
    assert (difference.check, difference.tensor) == ("error", f"{WQ_A}.weight_scale")


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_integer_scales_wrong_by_two_fail_though_reencoded(
    made: dict[str, Path], source: Path, tensors: maker.Tensors, tmp_path: Path, factor: float
) -> None:
    artifact = maker.copy(made["int4"], tmp_path / "a")
    wrong = maker.int4(tensors[f"{EXPERT}.w1.weight"], factor)
    edit(artifact, {f"{EXPERT}.w1.{suffix}": tensor for suffix, tensor in wrong.items()})
    difference = only(judged(artifact, source, deep=True))
    assert (difference.check, difference.tensor) == ("error", f"{EXPERT}.w1.weight_scale")


def test_a_range_shrunk_by_a_fifth_is_accepted(artifact: Path, source: Path, tensors: maker.Tensors) -> None:
    """As far as the stock observers go that search for the least error."""
    shrunk = maker.fp8(tensors[f"{WQ_A}.weight"], factor=0.8)
    edit(artifact, {f"{WQ_A}.{suffix}": tensor for suffix, tensor in shrunk.items()})
    assert judged(artifact, source, deep=True).ok


def test_ranges_widened_where_it_pays_are_accepted(artifact: Path, source: Path, tensors: maker.Tensors) -> None:
    """As the stock observers made for NVFP4 do: the better of 1 and 1.5 times the range, block by block."""
    module, stored = f"{EXPERT}.w2", read(artifact)
    stored[f"{module}.weight_global_scale"] /= 2
    weight, global_scale = tensors[f"{module}.weight"], stored[f"{module}.weight_global_scale"]
    plain = stored[f"{module}.weight_scale"].float() / 2
    wide = (plain * 1.5).to(torch.float8_e4m3fn).float()
    errors = []
    for scale in (plain, wide):
        decoded = nvfp4_decode(nvfp4_encode(weight, scale, global_scale), scale, global_scale)
        errors.append((weight.float() - decoded).unflatten(-1, (-1, 16)).square().sum(-1))
    best = torch.where(errors[1] < errors[0], wide, plain)
    assert 10 < int((best == wide).sum()) < best.numel()
    edit(
        artifact, {f"{module}.weight_global_scale": global_scale} | maker.reencoded_nvfp4(weight, stored, module, best)
    )
    assert judged(artifact, source, deep=True).ok


def test_a_scale_larger_than_needed_is_fine_where_nothing_is_lost(tensors: maker.Tensors, tmp_path: Path) -> None:
    weights = dict(tensors)
    for name in (f"{EXPERT}.w1.weight", f"{EXPERT}.w3.weight"):
        weights[name] = torch.where(tensors[name] > 0, 2.0**-5, -(2.0**-6)).to(torch.bfloat16)
    source = maker.write_source(tmp_path / "source", weights)
    artifact = maker.write_artifact(tmp_path / "out", weights, pow2=True)
    scale = read(artifact)[f"{EXPERT}.w1.weight_scale"].float() * 2
    edit(artifact, maker.reencoded_nvfp4(weights[f"{EXPERT}.w1.weight"], read(artifact), f"{EXPERT}.w1", scale))
    assert judged(artifact, source, deep=True).ok


def test_another_source_is_noticed_everywhere(made: dict[str, Path], tensors: maker.Tensors, tmp_path: Path) -> None:
    other = maker.write_source(
        tmp_path / "other", {n: t * 2 if t.is_floating_point() else t for n, t in tensors.items()}
    )
    result = judged(made["nvfp4"], other)
    assert sum(d.check == "bytes" for d in result.differences) == result.checks["bytes"] - 1  # tid2eid is the same
    assert sum(d.check in ("error", "encoding") for d in result.differences) >= 42


def test_a_config_key_that_did_not_come_along_is_named(artifact: Path, source: Path) -> None:
    edit_json(artifact, "config.json", _delete("architectures"))
    difference = only(judged(artifact, source))
    assert (difference.check, difference.file, difference.found) == ("source", "config.json", "'no such key'")


def test_a_tokenizer_that_did_not_come_along_is_named(artifact: Path, source: Path) -> None:
    (artifact / "tokenizer.json").unlink()
    assert only(judged(artifact, source)).file == "tokenizer.json"


def test_a_damaged_source_is_told_without_a_traceback(made: dict[str, Path], source: Path, tmp_path: Path) -> None:
    broken = maker.copy(source, tmp_path / "source")
    (broken / "model-00001-of-00002.safetensors").write_bytes(b"\0" * 9)
    assert "source" in {d.check for d in judged(made["nvfp4"], broken).differences}


HALF = "model-00002-of-00002.safetensors"
"""The source's second shard."""


def _cut(path: Path, most: int) -> tuple[int, set[str]]:
    """Cut a shard off in the middle of its data; its bytes before, and the tensors that are no longer whole."""
    raw = path.read_bytes()
    base = 8 + int.from_bytes(raw[:8], "little")
    entries = {n: e for n, e in json.loads(raw[8:base]).items() if n != "__metadata__"}
    end = base + (len(raw) - base) * most // 100
    path.write_bytes(raw[:end])
    return len(raw), {name for name, entry in entries.items() if base + entry["data_offsets"][1] > end}


@pytest.mark.parametrize("most", [10, 50, 99])
def test_of_a_truncated_source_the_rest_is_compared(
    artifact: Path, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], most: int
) -> None:
    whole = judged(artifact, source).checks
    broken = maker.copy(source, tmp_path / "source")
    size, lost = _cut(broken / HALF, most)
    tensor = read(artifact)["embed.weight"].contiguous()
    tensor.view(-1).view(torch.uint8)[9] ^= 1
    edit(artifact, {"embed.weight": tensor})
    code, result = verify_shards(capsys, artifact, "--source", broken, "--deep")
    of_source, planted = sorted(result["differences"], key=lambda d: d["check"], reverse=True)
    assert (code, of_source["check"], of_source["file"]) == (3, "source", str(broken / HALF))
    assert of_source["expected"].startswith(f"{size:,} bytes, the end of ")
    assert of_source["found"].startswith("A shard is truncated: ")
    assert of_source["found"].endswith(f"; {len(lost)} of its tensors not compared; download this file again")
    assert (planted["check"], planted["tensor"]) == ("bytes", "embed.weight")
    compared = result["checks"]["bytes"] + result["checks"]["encoding"]
    copies = {"mtp.0.head.weight": "head.weight", "mtp.0.emb.tok_emb.weight": "embed.weight"}
    twice = sum(main_name in lost for main_name in copies.values())
    assert compared == whole["bytes"] + whole["encoding"] - len(lost) - twice


def test_a_shard_that_the_source_lacks_is_told_once(
    artifact: Path, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = maker.copy(source, tmp_path / "source")
    lost = sum(file == HALF for file in json.loads((broken / INDEX).read_text())["weight_map"].values())
    (broken / HALF).unlink()
    code, result = verify_shards(capsys, artifact, "--source", broken)
    (difference,) = result["differences"]
    assert (code, difference["check"], difference["file"]) == (3, "source", str(broken / HALF))
    assert f"; {lost} of its tensors not compared; " in difference["found"]
    assert 0 < result["checks"]["bytes"] < 160


def test_a_source_that_is_none_is_refused(
    artifact: Path, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = maker.copy(source, tmp_path / "source")
    (broken / "config.json").unlink()
    code, result = verify_shards(capsys, artifact, "--source", broken)
    assert (code, result["error"]["kind"]) == (1, "SourceError")


# ------------------------------------------------------------------------------------------------ shard by shard


@pytest.mark.parametrize("other", [SHARD, "model-00003-of-00003.safetensors"])
@pytest.mark.parametrize("defect", [None, "weight_global_scale", "input_global_scale"])
def test_w1_and_w3_that_come_in_different_shards_are_compared(
    artifact: Path, source: Path, other: str, defect: str | None
) -> None:
    maker.move(artifact, f"{EXPERT}.w1.", "model-00002-of-00003.safetensors")
    maker.move(artifact, f"{EXPERT}.w3.", other)
    found = set()
    if defect is not None:
        name = f"{EXPERT}.w3.{defect}"
        edit(artifact, {name: read(artifact)[name] * 1.0001})
        found = {("pairs", name)}
    assert {(d.check, d.tensor) for d in judged(artifact, deep=True).differences} == found


def test_a_linear_in_two_shards_is_judged_as_a_whole_or_told(artifact: Path, source: Path) -> None:
    maker.move(artifact, f"{EXPERT}.w2.weight_scale", SHARD)
    assert verify(artifact, source=source, deep=True, progress=None).ok
    assert fed_shard_by_shard(artifact, source, deep=True) == {("tensors", f"{EXPERT}.w2")}


@pytest.mark.parametrize("device", ["tpu", "cuda:99", "cpu:x"])
def test_a_device_that_is_none_is_refused_by_name(made: dict[str, Path], device: str) -> None:
    with pytest.raises(DeviceError) as caught:
        verify(made["nvfp4"], source=None, deep=True, progress=None, device=device)
    assert device in str(caught.value)


# ------------------------------------------------------------------------------------------------ plain checkpoints


@pytest.fixture
def plain(source: Path, tmp_path: Path) -> Path:
    return maker.copy(source, tmp_path / "plain")


def test_a_plain_bf16_checkpoint_passes_without_a_recipe(plain: Path, source: Path) -> None:
    result = judged(plain, source, deep=True)
    assert result.ok, [difference.text() for difference in result.differences]
    assert result.kind == "plain"
    assert result.checks["bytes"] == result.checks["values"] == result.tensors
    assert result.errors == {}


def test_a_missing_tensor_of_a_plain_checkpoint_is_named(plain: Path) -> None:
    edit(plain, {f"{EXPERT}.w1.weight": None})
    difference = only(judged(plain))
    assert (difference.check, difference.tensor) == ("tensors", f"{EXPERT}.w1.weight")


@pytest.mark.parametrize(
    ("name", "dtype"), [("layers.1.ffn.gate.bias", torch.bfloat16), (f"{EXPERT}.w2.weight", torch.float32)]
)
def test_a_tensor_of_another_dtype_in_a_plain_checkpoint_is_named(plain: Path, name: str, dtype: torch.dtype) -> None:
    edit(plain, {name: read(plain)[name].to(dtype)})
    assert only(judged(plain)).tensor == name


def test_a_head_copy_has_no_place_in_a_plain_checkpoint(plain: Path) -> None:
    edit(plain, {"mtp.0.head.weight": read(plain)["head.weight"]})
    assert only(judged(plain)).tensor == "mtp.0.head.weight"


def test_a_nan_in_a_plain_checkpoint_is_named(plain: Path) -> None:
    weight = read(plain)[f"{EXPERT}.w3.weight"]
    weight[2, 3] = float("nan")
    edit(plain, {f"{EXPERT}.w3.weight": weight})
    assert judged(plain).ok
    assert only(judged(plain, deep=True)).tensor == f"{EXPERT}.w3.weight"


def test_other_bytes_in_a_plain_checkpoint_are_named(plain: Path, source: Path) -> None:
    weight = read(plain)[f"{EXPERT}.w3.weight"]
    edit(plain, {f"{EXPERT}.w3.weight": weight * 2})
    difference = only(judged(plain, source))
    assert (difference.check, difference.tensor) == ("bytes", f"{EXPERT}.w3.weight")


def test_shards_of_a_plain_checkpoint_have_the_names_of_a_series(plain: Path) -> None:
    old, new = "model-00002-of-00002.safetensors", "rest.safetensors"
    (plain / old).rename(plain / new)
    edit_json(plain, INDEX, lambda i: i.update(weight_map={n: f.replace(old, new) for n, f in i["weight_map"].items()}))
    assert {d.file for d in judged(plain).differences} == {old, new}


def test_an_artifact_that_lost_its_quantization_config_is_not_taken_for_a_plain_one(artifact: Path) -> None:
    edit_json(artifact, "config.json", lambda config: config.pop("quantization_config"))
    result = judged(artifact)
    assert result.kind == "quantized"
    assert result.differences[0].expected == "quantization_config: an object"


def test_a_tensor_of_many_pieces_is_compared_piece_by_piece(
    plain: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dsv4q.verify.untouched.PIECE", 64)
    weight = read(plain)["embed.weight"]
    weight.view(-1).view(torch.uint8)[[130, 131, 1000]] ^= 1
    edit(plain, {"embed.weight": weight})
    found = only(judged(plain, source, deep=True)).found
    assert found == f"3 of {weight.nbytes:,} bytes differ, the first at byte 130 of the tensor"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", ["nvfp4", "int4", "fp8", "pow2"])
def test_a_gpu_finds_what_the_cpu_finds(made: dict[str, Path], source: Path, kind: str) -> None:
    there = verify(made[kind], source=source, deep=True, progress=None, device="cuda")
    here = judged(made[kind], source, deep=True)
    assert (there.differences, there.checks) == (here.differences, here.checks)
    for role, errors in here.errors.items():
        assert there.errors[role] == pytest.approx(errors, rel=1e-6)
