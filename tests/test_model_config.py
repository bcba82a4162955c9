"""config.json and the files beside it on their way into the artifact: what is not true there does not go on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from users import Said, calibrated, config, dsv4q, edit_config, small_source


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_source(tmp_path_factory.mktemp("model_config") / "source", native=True)


@pytest.fixture
def source(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "source"))


def made(source: Path) -> tuple[Said, dict[str, Any]]:
    """What quantize says, and the config.json that it writes."""
    out = source.parent / "out"
    said = dsv4q("quantize", source, out, "-c", config(source.parent), "--device", "cpu")
    assert said.code == 0
    assert dsv4q("verify-shards", out, "--source", source, "--device", "cpu").code == 0
    return said, json.loads((out / "config.json").read_text())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("_name_or_path", "/home/alice/models/secret"),
        ("_name_or_path", "somebody/model"),
        ("cache_dir", "~/.cache/models"),
        ("extra", {"weights": ["file:///mnt/nas/vision"]}),
        ("resumed_from", "C:\\Users\\alice\\model"),
        ("parent", "../other"),
    ],
)
def test_a_private_path_does_not_go_on_and_is_said(key: str, value: object, source: Path) -> None:
    edit_config(source, **{key: value})
    said, written = made(source)
    assert key not in written
    assert f"config.json: {key}" in said.err


def test_names_that_are_no_paths_go_on(source: Path) -> None:
    edit_config(source, note="and/or", links={"home": "https://example.org/x"})
    said, written = made(source)
    assert (written["note"], written["links"]["home"]) == ("and/or", "https://example.org/x")
    assert "warning" not in said.err


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("value", ["float32", "float16", None])
def test_another_dtype_becomes_that_of_the_weights(key: str, value: str | None, source: Path) -> None:
    edit_config(source, **{key: value})
    said, written = made(source)
    assert written[key] == "bfloat16"
    assert f"config.json: {key}" in said.err


def test_dequantize_writes_the_same_keys(source: Path, tmp_path: Path) -> None:
    edit_config(source, _name_or_path="/home/alice/x", dtype="float32")
    assert dsv4q("dequantize", source, tmp_path / "plain").code == 0
    written = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert "_name_or_path" not in written
    assert written["dtype"] == "bfloat16"


# ------------------------------------------------------------------------------------------------ code

AUTO_MAP = {"AutoConfig": "configuration_v4.V4Config", "AutoModelForCausalLM": "modeling_v4.V4ForCausalLM"}


def test_an_auto_map_goes_on_with_its_python_files(source: Path) -> None:
    edit_config(source, auto_map=AUTO_MAP)
    for name in ("configuration_v4.py", "modeling_v4.py", "helper.py"):
        (source / name).write_text(f"# {name}\n")
    _, written = made(source)
    assert written["auto_map"] == AUTO_MAP
    assert (source.parent / "out" / "helper.py").read_text() == "# helper.py\n"
    assert (source.parent / "out" / "modeling_v4.py").is_file()


def test_an_auto_map_without_its_python_files_does_not_go_on(source: Path) -> None:
    edit_config(source, auto_map=AUTO_MAP)
    (source / "configuration_v4.py").write_text("")
    said, written = made(source)
    assert "auto_map" not in written
    assert "modeling_v4.py is not in the source" in said.err


def test_an_auto_map_to_another_repository_goes_on(source: Path) -> None:
    edit_config(source, auto_map={"AutoConfig": "somebody/code--configuration_v4.V4Config"})
    said, written = made(source)
    assert "auto_map" in written
    assert "warning" not in said.err


# ------------------------------------------------------------------------------------------------ tokenizer


@pytest.mark.parametrize("command", ["plan", "quantize"])
def test_a_missing_tokenizer_is_a_problem_where_data_are_tokenized(command: str, source: Path, tmp_path: Path) -> None:
    (source / "tokenizer.json").unlink()
    out = [tmp_path / "out"] if command == "quantize" else []
    said = dsv4q(command, source, *out, "-c", calibrated(tmp_path))
    assert said.code == 1
    assert "has no tokenizer" in said.err
    assert not (tmp_path / "out").exists()


def test_a_missing_tokenizer_is_a_warning_where_none_is_needed(source: Path, tmp_path: Path) -> None:
    (source / "tokenizer.json").unlink()
    planned = dsv4q("plan", source, "-c", config(tmp_path))
    assert planned.code == 0
    assert "warning: The checkpoint has no tokenizer" in planned.err
    said, _ = made(source)
    assert "warning: The checkpoint has no tokenizer" in said.err


# ------------------------------------------------------------------------------------------------ rope_scaling

YARN = {"type": "yarn", "factor": 16, "original_max_position_embeddings": 65536, "beta_fast": 32, "beta_slow": 1}


@pytest.mark.parametrize(
    ("scaling", "where", "found"),
    [
        ({key: value for key, value in YARN.items() if key != "factor"}, "rope_scaling.factor", "absent"),
        ({**YARN, "factor": "16"}, "rope_scaling.factor", '"16"'),
        ({**YARN, "beta_fast": None}, "rope_scaling.beta_fast", "null"),
        ({"type": "linear"}, "rope_scaling.factor", "absent"),
        ({**YARN, "type": "su"}, "rope_scaling", '"su"'),
        ("yarn", "rope_scaling", '"yarn"'),
    ],
)
def test_a_rope_scaling_that_cannot_be_computed_is_named_before_the_run(
    scaling: object, where: str, found: str, source: Path, tmp_path: Path
) -> None:
    edit_config(source, rope_scaling=scaling)
    said = dsv4q("quantize", source, tmp_path / "out", "-c", calibrated(tmp_path))
    assert said.code == 1 and not (tmp_path / "out").exists()
    assert f"config.json: {where}\n" in said.err and found in said.err


def test_no_rope_scaling_is_taken(source: Path) -> None:
    edit_config(source, rope_scaling=None)
    assert made(source)[1]["rope_scaling"] is None


def test_eval_names_a_config_that_transformers_does_not_take(source: Path, tmp_path: Path) -> None:
    edit_config(source, rope_scaling={"type": "yarn"})
    said = dsv4q("eval", source, "--reference", source, "--samples", 1, "--length", 8, "--device", "cpu")
    assert said.code == 1
    assert "error: transformers cannot build the model" in said.err and f"{source / 'config.json'}" in said.err
