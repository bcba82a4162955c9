"""The model card: license of the source, serve command, what is stored how."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from dsv4q.checkpoint.source import scan
from dsv4q.config import Output, load_config
from dsv4q.engines.compat import serving
from dsv4q.made_up.toy import ToyConfig, with_draft
from dsv4q.plan.draft import LEFT_OUT, DraftForm
from dsv4q.plan.modelcard import model_card, source_license
from dsv4q.plan.plan import make_plan
from dsv4q.plan.small_files import carried_files
from runs import CONFIGS

MIT = "MIT License\n\nCopyright (c) somebody\n"


def card(folder: Path, name: str, draft: str = "mtp") -> str:
    (folder / "config.json").write_text(json.dumps(with_draft(ToyConfig(), draft).as_config_json()))
    config = load_config(CONFIGS / f"{name}.yaml").model_copy(update={"output": Output(shards=2)})
    with scan(folder) as checkpoint:
        return model_card(make_plan(checkpoint, config), folder)


@pytest.mark.parametrize(
    ("files", "identifier", "told"),
    [
        ({"LICENSE": MIT}, "mit", "[LICENSE](LICENSE)"),
        ({"LICENCE.txt": MIT}, "mit", "[LICENCE.txt](LICENCE.txt)"),
        ({"COPYING": "GNU"}, None, "[COPYING](COPYING)"),
        ({"README.md": "---\nlicense: apache-2.0\n---\n# A"}, "apache-2.0", "apache-2.0"),
        ({"README.md": "---\nlicense: mit\n---\n", "LICENSE": "Other words"}, "mit", "[LICENSE](LICENSE)"),
        ({"README.md": "---\nlicense: [\n---\n"}, None, "without a license file"),
        ({"README.md": "no front matter", "LICENSED_TO": "me", "NOTICE": "thanks"}, None, "without a license file"),
        ({}, None, "without a license file"),
    ],
)
def test_the_license_is_that_of_the_source(
    tmp_path: Path, files: dict[str, str], identifier: str | None, told: str
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    found, sentence = source_license(tmp_path)
    assert found == identifier and told in sentence


@pytest.mark.parametrize("name", ["LICENSE", "LICENCE.txt", "COPYING"])
def test_the_license_file_that_the_card_links_to_is_carried_along(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(MIT)
    assert f"({name})" in source_license(tmp_path)[1] and carried_files(tmp_path) == [Path(name)]


def test_with_mtp_the_card_serves_with_speculation_and_without_it_does_not(tmp_path: Path) -> None:
    with_mtp, without = card(tmp_path, "nvfp4-fp8-mtp"), card(tmp_path, "nvfp4-fp8")
    option = """--speculative-config '{"method":"mtp","num_speculative_tokens":2}'"""
    assert option in with_mtp and "MTP block" in with_mtp
    assert "speculative-config" not in without and "no speculative decoding" in without


def test_the_card_of_a_dspark_artifact_serves_with_that_method_and_never_with_mtp(tmp_path: Path) -> None:
    text = card(tmp_path, "nvfp4-fp8-mtp", "dspark")
    assert """--speculative-config '{"method":"dspark","num_speculative_tokens":5}'""" in text
    assert '"mtp"' not in text and "MTP block" not in text
    assert "| draft, routed experts | NVFP4" in text and "| DSpark draft, the rest | as the source has it |" in text


@pytest.mark.parametrize("form", [DraftForm("mtp", tokens=2), DraftForm("dspark", tokens=5), LEFT_OUT], ids=str)
def test_the_serve_command_is_one_shell_command_with_the_options_of_the_contract(form: DraftForm) -> None:
    words = serving("vLLM", form.kind, form.tokens, 4).command.replace("\\\n", " ").split()
    assert words[:3] == ["vllm", "serve", "ARTIFACT"] and "\n" not in words
    for option in ("--tensor-parallel-size 4", "--kv-cache-dtype fp8", "--max-model-len 65536",
                   "--tokenizer-mode deepseek_v4", "--reasoning-parser deepseek_v4", "--tool-call-parser deepseek_v4",
                   "--enable-auto-tool-choice", "--trust-remote-code"):  # fmt: skip
        assert option in " ".join(words)


@pytest.mark.parametrize(
    ("name", "told", "untold"),
    [
        ("nvfp4-fp8-mtp", ["| routed experts | NVFP4", "FP8 E4M3, blocks of 128x128", "SM 10.x"], ["INT4"]),
        ("w4a16-fp8-mtp", ["| routed experts | INT4, groups of 128", "weight-only"], ["NVFP4", "SM 10.x"]),
    ],
)
def test_the_card_says_what_is_stored_how(tmp_path: Path, name: str, told: list[str], untold: list[str]) -> None:
    text = card(tmp_path, name)
    assert all(words in text for words in told) and not any(words in text for words in untold)


def test_the_front_matter_is_yaml_with_the_license(tmp_path: Path) -> None:
    (tmp_path / "LICENSE").write_text(MIT)
    front = yaml.safe_load(card(tmp_path, "toy").split("---")[1])
    assert front["license"] == "mit" and "compressed-tensors" in front["tags"]
