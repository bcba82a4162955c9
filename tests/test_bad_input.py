"""Bad input: each kind gets one clear error through the real command, before expensive work, and loses nothing."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from dsv4q.__main__ import main
from dsv4q.checkpoint.journal import Journal
from dsv4q.made_up.toy import ToyConfig, write_toy
from dsv4q.verify.judge import verify
from runs import CONFIGS

INDEX = "model.safetensors.index.json"
FIRST = "model-00001-of-00004.safetensors"
TOY: dict[str, Any] = yaml.safe_load((CONFIGS / "toy.yaml").read_text())


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad_input") / "source"
    write_toy(folder)
    return folder


@pytest.fixture
def source(pristine: Path, tmp_path: Path) -> Path:
    """A whole toy of one's own to spoil."""
    return Path(shutil.copytree(pristine, tmp_path / "source"))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def quantize(source: Path, out: Path, config: dict[str, Any] | None = None, *options: str) -> tuple[int, str]:
    """Exit code and stderr of `dsv4q quantize`; nothing may be on stdout unless all went well."""
    path = source.parent / "config.yaml"
    path.write_text(yaml.safe_dump(TOY if config is None else config))
    return dsv4q("quantize", source, out, "-c", path, "--device", "cpu", "-q", *options)


def dsv4q(*arguments: object) -> tuple[int, str]:
    said, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(errors), pytest.raises(SystemExit) as stopped:
        main([str(a) for a in arguments])
    assert said.getvalue() == ""
    return (stopped.value.code if isinstance(stopped.value.code, int) else 0), errors.getvalue()


def state(folder: Path) -> dict[str, tuple[int, int]]:
    """Path -> size and mtime of everything in a folder."""
    return {str(p): (p.lstat().st_size, p.lstat().st_mtime_ns) for p in sorted([folder, *folder.rglob("*")])}


def blocks_done(out: Path) -> int:
    journal = out / ".dsv4q" / "journal.jsonl"
    return journal.read_bytes().count(b"\n") - 1 if journal.is_file() else 0


def block_of(name: str) -> str:
    """The block of a tensor of the embedding, a layer or a draft."""
    return "embed" if name.startswith("embed.") else ".".join(name.split(".")[:2])


def check_refusal(code: int, error: str, words: tuple[str, ...]) -> None:
    """One error that has all the `words` and says where."""
    assert code == 1, error
    assert error.startswith("error: ") and error.count("error: ") == 1 and "Traceback" not in error
    assert "\n  where: " in error
    missing = [word for word in words if word not in error]
    assert missing == [], error


def assert_refused(source: Path, out: Path, words: tuple[str, ...], *more: Any) -> None:
    """The run is refused before OUT has anything in it, and the source stays as it is."""
    before, there = state(source), state(out) if out.exists() else None
    check_refusal(*quantize(source, out, *more), words)
    assert state(source) == before
    assert (state(out) if out.exists() else None) == there


# ------------------------------------------------------------------------------------------------ tools to spoil with


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def shard_of(source: Path, tensor: str) -> Path:
    return source / json.loads((source / INDEX).read_text())["weight_map"][tensor]


def edit_header(shard: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a shard's header and leave its data."""
    raw = shard.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    shard.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


def edit_tensors(source: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change all tensors of a checkpoint at will; shards and index stay sound."""
    weight_map: dict[str, str] = json.loads((source / INDEX).read_text())["weight_map"]
    tensors: dict[str, torch.Tensor] = {}
    for file in set(weight_map.values()):
        tensors |= load_file(source / file)
    change(tensors)
    weight_map = {name: weight_map.get(name, FIRST) for name in tensors}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name, where in weight_map.items() if where == file}, source / file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    (source / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))


def put(source: Path, name: str, value: float) -> tuple[int, float]:
    """Write the middle element of a tensor; returns its number and what was there."""
    shard = shard_of(source, name)
    tensors = load_file(shard)
    flat = tensors[name].reshape(-1)
    element = len(flat) // 2
    before = float(flat[element])
    flat[element] = value
    save_file(tensors, shard)
    return element, before


def without(tensors: dict[str, torch.Tensor], *beginnings: str) -> None:
    for name in [name for name in tensors if name.startswith(beginnings)]:
        del tensors[name]


def to_dspark(tensors: dict[str, torch.Tensor]) -> None:
    without(tensors, "mtp.0.enorm", "mtp.0.hnorm")
    tensors["mtp.0.markov_head.weight"] = torch.zeros(4, 4, dtype=torch.bfloat16)


def transformers_names(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if ".attn.wq_a." in name and name.startswith("layers.")]:
        tensors[f"model.{name.replace('.attn.wq_a.', '.self_attn.q_a_proj.')}"] = tensors.pop(name)


def no_mtp(config: dict[str, Any]) -> None:
    config["num_nextn_predict_layers"] = 0


def point(tensor: str, file: str) -> Callable[[Path], None]:
    """Let the index put a tensor into another file."""
    return lambda source: edit_json(source / INDEX, lambda index: index["weight_map"].update({tensor: file}))


def overlap(header: dict[str, Any]) -> None:
    """Let the last tensor lie where another one of its size does."""
    entries = [entry for name, entry in header.items() if name != "__metadata__"]
    last = max(entries, key=lambda entry: entry["data_offsets"])
    twin = next(e for e in entries if e is not last and (e["dtype"], e["shape"]) == (last["dtype"], last["shape"]))
    last["data_offsets"] = twin["data_offsets"]


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


# ------------------------------------------------------------------------------------------------ source

W1 = "layers.1.ffn.experts.3.w1.weight"
GATE = "layers.3.ffn.gate.weight"

SPOILED: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "index missing": (lambda s: (s / INDEX).unlink(), ("index is missing", INDEX, "4 shards")),
    "index names a file that is not there": (
        lambda s: (s / FIRST).unlink(),
        ("is not there", FIRST, "a shard with", "found: no such file"),
    ),
    "index names a file outside by ..": (
        point(W1, "../elsewhere.safetensors"),
        ("file name is refused", INDEX, "../elsewhere.safetensors", "climbs out"),
    ),
    "index names an absolute path": (
        point(W1, "/etc/elsewhere.safetensors"),
        ("file name is refused", "/etc/elsewhere.safetensors", "absolute"),
    ),
    "index is not JSON": (lambda s: (s / INDEX).write_text("{"), ("index is not valid JSON", INDEX)),
    "index has no weight_map": (lambda s: (s / INDEX).write_text("{}"), ("no weight_map", INDEX)),
    "index puts a tensor where it is not": (
        point(W1, "model-00004-of-00004.safetensors"),
        ("where it is not", W1, "model-00004"),
    ),
    "index forgets a tensor": (
        lambda s: edit_json(s / INDEX, lambda i: i["weight_map"].pop(W1)),
        ("that the index does not name", W1),
    ),
    "shard truncated": (
        lambda s: os.truncate(s / FIRST, 1_000_000),
        ("truncated", FIRST, "expected: 3,7", "found: 1,000,000 bytes"),
    ),
    "shard truncated inside the header": (lambda s: os.truncate(s / FIRST, 100), ("ends inside its header", FIRST)),
    "shard empty": (lambda s: os.truncate(s / FIRST, 0), ("too short", FIRST, "found: 0 bytes")),
    "shard is a folder": (
        lambda s: ((s / FIRST).unlink(), (s / FIRST).mkdir()),
        ("not a regular file", FIRST, "a folder"),
    ),
    "header damaged": (lambda s: overwrite(s / FIRST, 40, b"\xff" * 8), ("header is not valid JSON", FIRST)),
    "header of an impossible length": (
        lambda s: overwrite(s / FIRST, 0, struct.pack("<Q", 2**60)),
        ("impossible length", FIRST, "1 to 100,000,000 bytes", f"{2**60:,}"),
    ),
    "bytes after the last tensor": (
        lambda s: (s / FIRST).write_bytes((s / FIRST).read_bytes() + b"more"),
        ("bytes after its last tensor", FIRST),
    ),
    "tensors overlap": (lambda s: edit_header(s / FIRST, overlap), ("overlaps", FIRST, "layers.")),
    "tensor of another size than its shape": (
        lambda s: edit_header(shard_of(s, W1), lambda h: h[W1].update(shape=[64, 256])),
        ("do not fit its dtype and shape", W1, "32,768 bytes", "65,536 bytes"),
    ),
    "tensor missing": (
        lambda s: edit_tensors(s, lambda t: t.pop(GATE)),
        ("missing", GATE, "BF16 [8, 256]", "no such tensor"),
    ),
    "tensor too many": (
        lambda s: edit_tensors(s, lambda t: t.update({"layers.1.attn.bias": torch.ones(3)})),
        ("too many", "layers.1.attn.bias", "F32 [3]"),
    ),
    "tensor of another dtype": (
        lambda s: edit_tensors(s, lambda t: t.update({GATE: t[GATE].float()})),
        ("another dtype", GATE, "expected: layers.3.ffn.gate.weight BF16", "found: layers.3.ffn.gate.weight F32"),
    ),
    "tensor of another shape": (
        lambda s: edit_tensors(s, lambda t: t.update({GATE: t[GATE][:7].clone()})),
        ("another shape", GATE, "BF16 [8, 256]", "BF16 [7, 256]"),
    ),
    "experts missing": (
        lambda s: edit_tensors(s, lambda t: without(t, "layers.2.ffn.experts.6.", "layers.2.ffn.experts.7.")),
        ("2 routed experts of layers.2 are missing: 6-7", "8 experts", "found: 6"),
    ),
    "layer missing": (
        lambda s: edit_tensors(s, lambda t: without(t, "layers.4.")),
        ("layers.4 is missing as a whole", "none of them"),
    ),
    "names of transformers": (
        lambda s: edit_tensors(s, transformers_names),
        ("transformers' names", "layers.0.attn.wq_a.weight", "model.layers.0.self_attn.q_a_proj.weight"),
    ),
    "another kind of model": (
        lambda s: edit_json(s / "config.json", lambda c: c.update(model_type="llama")),
        ("not a DeepSeek-V4", "config.json: model_type", "expected: deepseek_v4", "found: 'llama'"),
    ),
    "config.json missing": (lambda s: (s / "config.json").unlink(), ("no config.json", "config.json")),
    "config.json is not JSON": (lambda s: (s / "config.json").write_text("{,}"), ("not valid JSON", "config.json")),
    "config.json without a size": (
        lambda s: edit_json(s / "config.json", lambda c: c.pop("hidden_size")),
        ("no usable hidden_size", "no such key"),
    ),
    "config.json with another size": (
        lambda s: edit_json(s / "config.json", lambda c: c.update(q_lora_rank=64)),
        ("another shape", "[64, 256]", "[128, 256]"),
    ),
    "files have MTP but config.json has none": (
        lambda s: edit_json(s / "config.json", no_mtp),
        ("num_nextn_predict_layers", "53 mtp.* tensors", "config.json has no MTP layer"),
    ),
    "config.json has MTP but the files have none": (
        lambda s: edit_tensors(s, lambda t: without(t, "mtp.")),
        ("no mtp.* tensor", "53 mtp.* tensors", "num_nextn_predict_layers: 1"),
    ),
    "a DSpark draft": (lambda s: edit_tensors(s, to_dspark), ("DSpark draft, not MTP", "markov_head", "enorm")),
    "no tokenizer": (lambda s: (s / "tokenizer.json").unlink(), ("no tokenizer", "tokenizer.json")),
    "broken tokenizer": (lambda s: (s / "tokenizer.json").write_text("{}"), ("tokenizer", "tokenizer.json")),
    "no weights at all": (
        lambda s: [p.unlink() for p in s.glob("model*")],
        ("no safetensors files",),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SPOILED)
def test_a_spoiled_source_is_refused(case: str, source: Path, out: Path) -> None:
    spoil, words = SPOILED[case]
    spoil(source)
    assert_refused(source, out, words)
    assert not out.exists()


def test_a_source_that_is_not_there_is_refused(tmp_path: Path, out: Path) -> None:
    check_refusal(*quantize(tmp_path / "nowhere", out), ("no config.json", "nowhere"))


def test_keeping_the_mtp_block_of_a_source_without_one_is_refused(source: Path, out: Path) -> None:
    edit_json(source / "config.json", no_mtp)
    edit_tensors(source, lambda t: without(t, "mtp."))
    assert_refused(source, out, ("keeps the draft but the source has none", "draft.keep"))


@pytest.mark.slow
def test_an_artifact_as_a_source_is_refused(source: Path, tmp_path: Path, out: Path) -> None:
    assert quantize(source, tmp_path / "artifact") == (0, "")
    shutil.copy(source / "chat_samples.jsonl", tmp_path / "artifact")
    assert_refused(tmp_path / "artifact", out, ("quantized artifact", "505 compressed-tensors tensors", "BF16"))


# ------------------------------------------------------------------------------------------------ values


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("embed.weight", float("nan")),
        ("layers.1.attn.wkv.weight", float("inf")),
        (W1, float("nan")),
        ("layers.0.attn_norm.weight", float("-inf")),
        ("layers.1.hc_ffn_base", float("nan")),
        ("mtp.0.ffn.experts.0.w2.weight", float("nan")),
    ],
)
def test_nan_and_inf_in_a_weight_are_named_and_the_repaired_source_goes_on(
    name: str, value: float, source: Path, out: Path
) -> None:
    element, right = put(source, name, value)
    before = state(source)
    words = ("NaN or Inf", name, shard_of(source, name).name, f"first at element {element}")
    check_refusal(*quantize(source, out), words)
    assert state(source) == before
    assert not (out / INDEX).exists()
    done = blocks_done(out)
    put(source, name, right)
    assert quantize(source, out) == (0, "")
    again = json.loads((out / "report.json").read_text())["blocks"]
    # The draft is read before any layer is computed, and is finished with the first of them.
    assert len(again) == 8 and done == {"embed": 0, "layers.0": 1, "layers.1": 4, "mtp.0": 1}[block_of(name)]


@pytest.mark.slow
def test_activations_that_become_infinite_are_named_by_layer(source: Path, out: Path) -> None:
    edit_tensors(source, lambda t: t["layers.1.ffn_norm.weight"].fill_(3e38))
    before = state(source)
    check_refusal(*quantize(source, out), ("non-finite", "layers.1", "expected: finite"))
    assert state(source) == before and not (out / INDEX).exists()
    assert blocks_done(out) == 4


@pytest.mark.slow
def test_activations_that_become_infinite_behind_an_expert_are_named_by_layer(source: Path, out: Path) -> None:
    edit_tensors(source, lambda t: t["layers.2.ffn.experts.0.w2.weight"].fill_(3e38))
    check_refusal(*quantize(source, out), ("non-finite", "layers.2"))
    assert not (out / INDEX).exists()


# ------------------------------------------------------------------------------------------------ data


def lines(*rows: object) -> str:
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


ROWS = [{"text": f"row {i} " * 40} for i in range(100)]
DATA: dict[str, tuple[str | None, tuple[str, ...]]] = {
    "absent": (None, ("no such data set", "where: data.jsonl", "looked for in")),
    "empty": ("", ("empty", "data.jsonl", "at least one row")),
    "blank": ("\n\n  \n", ("empty", "data.jsonl")),
    "too short": (lines(*ROWS[:2]), ("too short", "data.jsonl", "8 samples of 128 tokens = 1024", "found:")),
    "without the column": (lines({"prompt": "x"}), ("no column", "data.jsonl", "messages or text", "found: prompt")),
    "not JSON": ("hello\n", ("not valid JSON", "data.jsonl, line 1")),
    "not JSON further down": (lines(*ROWS[:3], "{oops"), ("not valid JSON", "data.jsonl, line ")),
    "with an unknown role": (
        lines({"messages": [{"role": "robot", "content": "x"}]}),
        ("unknown role", "line 1: messages[0].role", "system, user or assistant", "'robot'"),
    ),
    "with a number for text": (lines({"text": 5}), ("no text", "line 1", "a string", "found: 5")),
    "with half a surrogate pair": ('{"text": "\\ud800 alone"}\n', ("surrogate", "line 1")),
}


@pytest.mark.parametrize("case", DATA)
@pytest.mark.parametrize("by", ["option", "config"])
def test_bad_calibration_data_is_refused(
    case: str, by: str, source: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, words = DATA[case]
    monkeypatch.chdir(tmp_path)
    if text is not None:
        Path("data.jsonl").write_text(text)
    config = {**TOY, "calibration": {**TOY["calibration"], "dataset": "data.jsonl"}}
    assert_refused(source, out, words, *((None, "--data", "data.jsonl") if by == "option" else (config,)))


def test_a_folder_without_data_is_refused(source: Path, out: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    assert_refused(source, out, ("holds no data file", str(tmp_path / "data")), None, "--data", str(tmp_path / "data"))


def test_a_split_that_is_not_there_is_refused(source: Path, out: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train-0.jsonl").write_text(lines(*ROWS))
    chosen = {**TOY["calibration"], "dataset": str(tmp_path / "data"), "split": "test"}
    assert_refused(source, out, ("no such split", "expected: test", "found: train"), {**TOY, "calibration": chosen})


def test_data_for_a_config_that_calibrates_nothing_is_refused(source: Path, out: Path) -> None:
    config = yaml.safe_load((CONFIGS / "w4a16-fp8-mtp.yaml").read_text())
    assert_refused(source, out, ("calibrates nothing", "--data"), config, "--data", "data.jsonl")


def test_a_tokenizer_of_another_model_is_refused(pristine: Path, tmp_path: Path, out: Path) -> None:
    write_toy(tmp_path / "narrow", ToyConfig(vocab_size=300))
    shutil.copy(pristine / "tokenizer.json", tmp_path / "narrow")
    words = ("tokenizer and the model do not fit", "vocab_size = 300", "token id ")
    code, error = quantize(tmp_path / "narrow", out)
    assert code == 1 and all(word in error for word in words), error
    assert not out.exists()


def test_a_tokenizer_without_the_chat_tokens_is_refused(source: Path, out: Path) -> None:
    text = (source / "tokenizer.json").read_text()
    (source / "tokenizer.json").write_text(text.replace("<｜User｜>", "<｜Reader｜>"))
    assert_refused(source, out, ("lacks a token", "tokenizer.json", "<｜User｜>"))


# ------------------------------------------------------------------------------------------------ machine


def test_a_disk_that_is_too_small_is_refused(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type(shutil.disk_usage("/"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 1_000_000, 1_000_000))
    assert_refused(source, out, ("too little free disk", "found: 1,000,000 bytes", "expected: "))


@pytest.mark.slow
def test_a_disk_that_fills_up_is_named_and_the_run_goes_on_later(
    source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, left = os.pwritev, [250]

    def pwritev(handle: int, data: Any, offset: int) -> int:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        return real(handle, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", pwritev)
        code, error = quantize(source, out)
    check_refusal(code, error, ("No space left on device", "model-0000"))
    assert not (out / INDEX).exists() and blocks_done(out) >= 1
    assert quantize(source, out) == (0, "")
    assert verify(out, source=source, deep=False, progress=None).ok


@pytest.mark.parametrize("device", ["cuda:99", "tpu"])
def test_a_device_that_is_not_there_is_refused(device: str, source: Path, out: Path) -> None:
    assert_refused(source, out, ("no such device", "--device", "auto, cpu, cuda or cuda:N"), None, "--device", device)


# ------------------------------------------------------------------------------------------------ output


@pytest.mark.parametrize("place", ["source", "source/out", "source/a/b/c", "."])
def test_output_in_the_source_or_around_it_is_refused(
    place: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(TOY))
    before = state(source)
    check_refusal(*dsv4q("quantize", source, place, "-c", "config.yaml"), ("overlap", f"where: {place}"))
    assert state(source) == before


def test_output_in_the_source_by_way_of_a_link_is_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(source)
    assert_refused(source, tmp_path / "link" / "out", ("overlap",))


def test_output_that_holds_something_else_is_refused_and_untouched(source: Path, out: Path) -> None:
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    assert_refused(source, out, ("not empty", "thesis.tex", "new or empty folder"))
    assert (out / "thesis.tex").read_text() == "years of work"


def test_output_that_holds_another_checkpoint_is_refused_and_untouched(source: Path, out: Path) -> None:
    shutil.copytree(source, out)
    assert_refused(source, out, ("not empty", "new or empty folder"))
    (out / "report.json").write_text('["not ours"]')
    assert_refused(source, out, ("that dsv4q did not make", "report.json"))


def test_output_that_is_a_file_is_refused(source: Path, out: Path) -> None:
    out.write_text("mine")
    before = state(source)
    check_refusal(*quantize(source, out), ("not a folder", str(out)))
    assert (out.read_text(), state(source)) == ("mine", before)


def test_output_below_a_file_is_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    assert_refused(source, tmp_path / "file" / "out", ("cannot be made", "file"))


@pytest.mark.slow
def test_a_finished_artifact_that_lost_a_shard_is_not_called_complete(source: Path, out: Path) -> None:
    assert quantize(source, out) == (0, "")
    (out / "model-00002-of-00004.safetensors").unlink()
    code, error = quantize(source, out)
    assert code == 3 and "model-00002-of-00004.safetensors" in error


@pytest.fixture
def unfinished(source: Path, out: Path) -> Iterator[Path]:
    """A run that stopped at its third layer, for NaN: embedding, head, draft and two layers are done."""
    put(source, "layers.2.attn.wq_a.weight", float("nan"))
    assert quantize(source, out)[0] == 1
    yield out


def test_a_second_run_at_once_is_refused_and_the_first_goes_on(source: Path, unfinished: Path) -> None:
    identity = Journal.identity_of(unfinished)
    assert identity is not None
    first = Journal.open(unfinished, identity, resume=True)
    try:
        assert_refused(source, unfinished, ("Another run", str(unfinished)))
    finally:
        first.close()
    assert len(first.done) == 5


def test_a_resume_with_another_config_is_refused(source: Path, unfinished: Path) -> None:
    config = {**TOY, "activations": {"headroom": 4.0}}
    assert_refused(source, unfinished, ("another config", "config.activations.headroom", "2.0", "4.0"), config)


# ------------------------------------------------------------------------------------------------ config and recipe

ALL = [r"re:.*\.mlp\.experts\.\d+\..*"]
GROUPS = ("recipe", "quant_stage", "quant_modifiers", "QuantizationModifier", "config_groups")
NOT_MTP = r"re:^mtp\..*"


def changed(path: tuple[str, ...], value: object) -> dict[str, Any]:
    """The toy's config with one key set, or dropped where `value` is None."""
    config = json.loads(json.dumps(TOY))
    place = config
    for key in path[:-1]:
        place = place[key]
    if value is None:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return config


WRONG: dict[str, tuple[tuple[str, ...], object, tuple[str, ...]]] = {
    "unknown key": (("shards",), 5, ("Unknown key", "config.yaml: shards")),
    "unknown key further in": (("draft", "kep"), True, ("Unknown key", "draft.kep")),
    "unknown key in the recipe": ((*GROUPS, "experts", "weights", "bits"), 4, ("nknown key", "weights.bits")),
    "no recipe": (("recipe",), None, ("recipe", "required")),
    "no config group": (GROUPS, {}, ("no config group",)),
    "value of another type": (("output", "shards"), "many", ("output.shards", "'many'")),
    "value out of range": (("activations", "headroom"), 0.5, ("activations.headroom", "0.5")),
    "no shard": (("output", "shards"), 0, ("output.shards", "0")),
    "more shards than pieces": (("output", "shards"), 5000, ("More shards", "output.shards", "at most", "5000")),
    "draft contradiction": (("draft",), {"keep": False, "experts": "nvfp4"}, ("contradict", "draft", "experts")),
    "fallback without routed": (("activations", "fallback"), "layer_max", ("fallback", "experts: all")),
    "routed without fallback": (("activations", "experts"), "routed", ("fallback", "layer_max")),
    "no calibration": (("calibration",), None, ("no calibration section",)),
    "target that matches nothing": (
        (*GROUPS, "attention", "targets"),
        [r"re:.*\.self_attn\.qkv_proj$"],
        ("matches nothing", "config_groups.attention.targets", "qkv_proj"),
    ),
    "one target of several that matches nothing": (
        (*GROUPS, "experts", "targets"),
        [*ALL, "model.layers.77.mlp.experts.0.gate_proj"],
        ("matches nothing", "model.layers.77"),
    ),
    "target that is no pattern": ((*GROUPS, "experts", "targets"), ["re:*("], ("not a regular expression", "re:*(")),
    "target of what must stay": (
        (*GROUPS, "attention", "targets"),
        [r"re:.*\.self_attn\..*"],
        ("must stay as they are", "attention", "indexer"),
    ),
    "two groups for one module": (
        (*GROUPS, "attention", "targets"),
        [*ALL, r"re:.*\.self_attn\.(q_a_proj|q_b_proj|kv_proj|o_a_proj|o_b_proj)$"],
        ("Two config groups", "experts", "attention"),
    ),
    "group that splits a fused pair": (
        (*GROUPS, "attention", "targets"),
        [r"re:.*\.self_attn\.(q_a_proj|q_b_proj|o_a_proj|o_b_proj)$"],
        ("splits modules", "wq_a, wkv"),
    ),
    "ignore that splits a fused pair": (
        (*GROUPS[:-1], "ignore"),
        ["lm_head", NOT_MTP, r"re:.*\.up_proj$"],
        ("splits modules", "w1, w2, w3"),
    ),
    "columns that fit no block": (
        (*GROUPS, "attention", "weights"),
        {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 96]},
        ("does not fit", "multiple of 96", "shape [128, 256]"),
    ),
    "strategy without its size": (
        (*GROUPS, "experts"),
        {"targets": ALL, "weights": {"num_bits": 4, "strategy": "group"}},
        ("group_size",),
    ),
    "weights with dynamic scales": (
        (*GROUPS, "experts", "weights", "dynamic"), True, ("weights cannot be dynamic",),
    ),
    "another modifier": (
        GROUPS[:3], {"GPTQModifier": {"targets": "Linear"}}, ("exactly one QuantizationModifier", "GPTQModifier"),
    ),
    "preset that is not there": (
        (*GROUPS[:3], "QuantizationModifier"), {"scheme": {"NVFP5": ALL}}, ("llmcompressor refuses", "scheme"),
    ),
    "argument that the modifier lacks": (
        (*GROUPS[:-1], "dampening"), 0.01, ("argument that dsv4q does not know", "dampening"),
    ),
    "observer that is not there": (
        (*GROUPS, "experts", "weights", "observer"), "nothing_like_it", ("observer", "nothing_like_it"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_config_is_refused_and_the_key_is_named(case: str, source: Path, out: Path) -> None:
    path, value, words = WRONG[case]
    assert_refused(source, out, words, changed(path, value))
    assert not out.exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("recipe: [", ("not valid YAML",)),
        ("- a\n- b\n", ("not a mapping", "list")),
        ("", ("not a mapping",)),
        ("\ud83d".encode("utf-8", "surrogatepass").decode("latin-1"), ("not",)),
    ],
)
def test_a_config_that_is_no_yaml_mapping_is_refused(
    text: str, words: tuple[str, ...], source: Path, out: Path, tmp_path: Path
) -> None:
    (tmp_path / "broken.yaml").write_text(text)
    check_refusal(*dsv4q("quantize", source, out, "-c", tmp_path / "broken.yaml"), ("broken.yaml", *words))
    assert not out.exists()


def test_a_config_that_is_not_there_is_refused(source: Path, out: Path, tmp_path: Path) -> None:
    check_refusal(*dsv4q("quantize", source, out, "-c", tmp_path / "none.yaml"), ("no such config", "none.yaml"))


def test_several_problems_are_counted_in_the_first_error(source: Path, out: Path) -> None:
    (source / "chat_samples.jsonl").write_text("")
    os.truncate(source / FIRST, 1_000_000)
    assert_refused(source, out, ("truncated", "1 more problem", "with --dry-run lists them all"))
    code, error = quantize(source, out, None, "--dry-run")
    assert code == 1 and "is truncated" in error and "data is empty" in error and error.count("error: ") == 2


def test_there_are_at_least_thirty_cases() -> None:
    assert len(SPOILED) + len(DATA) + len(WRONG) >= 30
