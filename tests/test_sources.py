"""Sources as users have them: in caches, behind links, half downloaded. What is fine is read, what is not is named."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from users import FIRST, INDEX, LAST, config, dsv4q, in_hub_cache, small_source


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_source(tmp_path_factory.mktemp("sources") / "source")


@pytest.fixture
def source(pristine: Path, tmp_path: Path) -> Path:
    """A whole toy of one's own to spoil."""
    return Path(shutil.copytree(pristine, tmp_path / "source"))


# ------------------------------------------------------------------------------------------------ links


def test_every_command_reads_a_snapshot_of_the_hugging_face_cache(tmp_path: Path) -> None:
    snapshot = in_hub_cache(small_source(tmp_path / "native", native=True), tmp_path / "hub")
    settings, made = config(tmp_path), tmp_path / "made"
    assert dsv4q("plan", snapshot, "-c", settings).code == 0
    assert dsv4q("quantize", snapshot, made, "-c", settings, "--device", "cpu").code == 0
    artifact = in_hub_cache(made, tmp_path / "artifacts")
    assert dsv4q("verify-shards", artifact, "--deep", "--source", snapshot, "--device", "cpu").code == 0
    assert dsv4q("report", artifact, "-o", tmp_path / "page.html").code == 0
    data = ("--samples", 2, "--length", 16, "--device", "cpu")
    assert dsv4q("eval", artifact, "--reference", snapshot, "--data", snapshot / "chat_samples.jsonl", *data).code == 0
    assert dsv4q("diff", artifact, made, "--device", "cpu").code == 0
    assert dsv4q("dequantize", snapshot, tmp_path / "plain").code == 0
    rehearsed = dsv4q("rehearse", tmp_path / "try", "-c", settings, "--source", snapshot, "--device", "cpu")
    assert rehearsed.code == 0


def test_a_linked_folder_and_links_to_another_disk_make_the_same_bytes(source: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    linked = tmp_path / "linked"
    linked.symlink_to(source)
    settings = config(tmp_path)
    assert dsv4q("quantize", source, tmp_path / "a", "-c", settings, "--device", "cpu").code == 0
    shutil.move(source / LAST, disk / "anything.bin")
    (source / LAST).symlink_to(disk / "anything.bin")
    assert dsv4q("quantize", linked, tmp_path / "b", "-c", settings, "--device", "cpu").code == 0
    assert (tmp_path / "a" / LAST).read_bytes() == (tmp_path / "b" / LAST).read_bytes()


def test_the_repository_folder_of_the_cache_is_told_from_its_snapshot(pristine: Path, tmp_path: Path) -> None:
    snapshot = in_hub_cache(pristine, tmp_path / "hub")
    said = dsv4q("plan", snapshot.parent.parent, "-c", config(tmp_path))
    assert said.code == 1
    assert str(snapshot) in said.err


def test_a_hub_id_as_a_source_is_told_how_to_download(tmp_path: Path) -> None:
    said = dsv4q("plan", "deepseek-ai/DeepSeek-V4-Flash", "-c", config(tmp_path))
    assert said.code == 1
    assert "hf download deepseek-ai/DeepSeek-V4-Flash" in said.err


# ------------------------------------------------------------------------------------------------ stopped downloads


@pytest.mark.parametrize(
    "remains",
    [
        f"{FIRST}.aria2", f"{LAST}.incomplete", f"{LAST}.3f9a.incomplete", f"{FIRST}.part", f"{FIRST}.crdownload",
        f"{FIRST}.tmp", f"{FIRST}.partial", f"{FIRST}_.gstmp", f".{FIRST}.aB3dE9", f"{FIRST}.9Fc8b3A1",
        "tokenizer.json.part", f"{INDEX}.aria2", "config.json.incomplete",
    ],
)  # fmt: skip
def test_what_an_unfinished_download_leaves_beside_a_file_is_refused(
    remains: str, source: Path, tmp_path: Path
) -> None:
    (source / remains).write_bytes(b"")
    said = dsv4q("quantize", source, tmp_path / "out", "-c", config(tmp_path), "--device", "cpu")
    assert said.code == 1
    assert "download is not finished" in said.err
    assert remains in said.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", [".cache/huggingface/download/Zx9.77ab.incomplete", "._____temp/shard"])
def test_what_a_downloader_keeps_within_the_folder_is_refused(place: str, source: Path, tmp_path: Path) -> None:
    (source / place).parent.mkdir(parents=True)
    (source / place).write_bytes(b"half")
    said = dsv4q("plan", source, "-c", config(tmp_path))
    assert said.code == 1
    assert place in said.err


def test_an_unfinished_blob_behind_a_link_is_refused(pristine: Path, tmp_path: Path) -> None:
    snapshot = in_hub_cache(pristine, tmp_path / "hub")
    blob = (snapshot / FIRST).resolve()
    blob.with_name(f"{blob.name}.incomplete").write_bytes(b"")
    said = dsv4q("plan", snapshot, "-c", config(tmp_path))
    assert said.code == 1
    assert f"{blob.name}.incomplete" in said.err


def test_files_that_only_look_like_remains_are_let_be(source: Path, tmp_path: Path) -> None:
    for name in (f"{FIRST}.sha256", f"{FIRST}.metadata", "notes.part", "pytorch_model.bin.aria2", f"{FIRST}.lock"):
        (source / name).write_bytes(b"")
    (source / ".cache" / "huggingface" / "download").mkdir(parents=True)
    (source / ".cache" / "huggingface" / "download" / f"{FIRST}.metadata").write_bytes(b"")
    assert dsv4q("plan", source, "-c", config(tmp_path)).code == 0


def test_holes_in_a_shard_are_named_by_their_tensors(source: Path, tmp_path: Path) -> None:
    size, kept = (source / LAST).stat().st_size, 1 << 18
    with (source / LAST).open("r+b") as shard:
        shard.truncate(kept)
        shard.truncate(size)
    said = dsv4q("quantize", source, tmp_path / "out", "-c", config(tmp_path), "--device", "cpu")
    assert said.code == 1
    assert "hole where its data should be" in said.err
    assert LAST in said.err
    assert "--sparse=never" in said.err


def test_space_that_was_only_allocated_counts_as_a_hole(source: Path, tmp_path: Path) -> None:
    size = (source / LAST).stat().st_size
    with (source / LAST).open("r+b") as shard:
        shard.truncate(1 << 18)
        os.posix_fallocate(shard.fileno(), 0, size)
    said = dsv4q("plan", source, "-c", config(tmp_path))
    assert said.code == 1
    assert "hole where its data should be" in said.err


def test_headers_alone_can_be_planned_with_and_not_quantized(source: Path, tmp_path: Path) -> None:
    for file in (FIRST, LAST):
        size, header = (source / file).stat().st_size, int.from_bytes((source / file).read_bytes()[:8], "little")
        os.truncate(source / file, 8 + header)
        os.truncate(source / file, size)
    settings = config(tmp_path)
    planned = dsv4q("plan", source, "-c", settings)
    assert planned.code == 0
    assert "headers, but no data" in planned.err
    said = dsv4q("quantize", source, tmp_path / "out", "-c", settings, "--device", "cpu")
    assert said.code == 1
    assert "headers, but no data" in said.err


@pytest.mark.parametrize("file", [FIRST, INDEX, "config.json", "tokenizer.json"])
def test_a_git_lfs_pointer_is_called_that(file: str, source: Path, tmp_path: Path) -> None:
    oid = "4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393"
    (source / file).write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize 12345\n")
    said = dsv4q("plan", source, "-c", config(tmp_path))
    assert said.code == 1
    assert "Git LFS pointer" in said.err
    assert "git lfs pull" in said.err
    assert file in said.err


# ------------------------------------------------------------------------------------------------ only odd


def test_a_wrong_total_size_is_a_warning_and_the_run_goes_on(source: Path, tmp_path: Path) -> None:
    index = json.loads((source / INDEX).read_text())
    index["metadata"]["total_size"] = 17
    (source / INDEX).write_text(json.dumps(index))
    settings = config(tmp_path)
    planned = dsv4q("plan", source, "-c", settings, "--json")
    assert planned.code == 0
    assert "total_size" in json.loads(planned.out)["warnings"][0]["what"]
    said = dsv4q("quantize", source, tmp_path / "out", "-c", settings, "--device", "cpu")
    assert said.code == 0
    assert "warning: The index's total_size" in said.err
    assert "total_size" in json.loads((tmp_path / "out" / "report.json").read_text())["warnings"][0]["what"]


# ------------------------------------------------------------------------------------------------ other conversions


def rewritten(source: Path, change: Callable[[str, torch.Tensor], tuple[str, torch.Tensor]]) -> None:
    """Change every name and tensor of a source, in shards and index."""
    weight_map = {}
    for file in (FIRST, LAST):
        tensors = dict(change(name, tensor) for name, tensor in load_file(source / file).items())
        save_file(tensors, source / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    (source / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_weights_of_a_wider_type_are_told_to_become_bf16(dtype: torch.dtype, source: Path, tmp_path: Path) -> None:
    rewritten(source, lambda name, t: (name, t.to(dtype) if t.dtype is torch.bfloat16 else t))
    said = dsv4q("plan", source, "-c", config(tmp_path))
    assert said.code == 1
    assert "store these as BF16" in said.err
    assert "keeping F32 tensors F32" not in said.err


def test_f32_tensors_that_became_bf16_are_told_to_stay(source: Path, tmp_path: Path) -> None:
    rewritten(source, lambda name, t: (name, t.to(torch.bfloat16) if t.dtype is torch.float32 else t))
    said = dsv4q("plan", source, "-c", config(tmp_path))
    assert said.code == 1
    assert "keeping F32 tensors F32" in said.err
    assert "store these as BF16" not in said.err


@pytest.mark.parametrize("prefix", ["model.", "module.", "language_model.model."])
def test_names_behind_a_prefix_are_one_error(prefix: str, source: Path, tmp_path: Path) -> None:
    rewritten(source, lambda name, t: (prefix + name, t))
    said = dsv4q("plan", source, "-c", config(tmp_path))
    assert said.code == 1
    assert f"have names with {prefix} before them" in said.err
    assert said.err.count("error: ") == 1


def test_a_config_that_transformers_saved_is_called_that(source: Path, tmp_path: Path) -> None:
    path = source / "config.json"
    saved = json.loads(path.read_text())
    del saved["compress_ratios"]
    path.write_text(json.dumps(saved | {"layer_types": ["sliding_attention"] * 2, "rope_parameters": {}}))
    said = dsv4q("plan", source, "-c", config(tmp_path))
    assert said.code == 1
    assert "saved by transformers" in said.err
    assert "config.json of the release" in said.err


# ------------------------------------------------------------------------------------------------ which source it was


def pins(source: Path, folder: Path) -> list[dict[str, str | None]]:
    """What report.json and a verification say of the source; the model card and the last line have the same."""
    folder.mkdir()
    out = folder / "out"
    assert dsv4q("quantize", source, out, "-c", config(folder), "--device", "cpu").code == 0
    reported = json.loads((out / "report.json").read_text())["source"]["pin"]
    line = ("verify-shards", out, "--source", source, "--device", "cpu")
    verified = json.loads(dsv4q(*line, "--json").out)["source_pin"]
    card, last = (out / "README.md").read_text(), dsv4q(*line).out.splitlines()[-1]
    for value in filter(None, reported.values()):
        assert value in card
        assert value in last
    return [reported, verified]


def test_a_snapshot_is_pinned_by_its_revision_and_digests(pristine: Path, tmp_path: Path) -> None:
    snapshot = in_hub_cache(pristine, tmp_path / "hub")
    reported, verified = pins(snapshot, tmp_path / "a")
    assert reported == verified
    assert (reported["repository"], reported["revision"]) == ("deepseek-ai/DeepSeek-V4-Small", snapshot.name)
    assert reported["config_sha256"] == hashlib.sha256((pristine / "config.json").read_bytes()).hexdigest()
    assert reported["index_sha256"] == hashlib.sha256((pristine / INDEX).read_bytes()).hexdigest()


@pytest.mark.parametrize("kind", ["local-dir", "git"])
def test_a_download_and_a_clone_are_pinned_by_what_lies_beside_the_files(
    kind: str, source: Path, tmp_path: Path
) -> None:
    commit = "89abcdef" * 5
    file = ".cache/huggingface/download/config.json.metadata" if kind == "local-dir" else ".git/refs/heads/main"
    (source / file).parent.mkdir(parents=True)
    (source / file).write_text(f"{commit}\n0123\n1.5\n")
    if kind == "git":
        (source / ".git" / "HEAD").write_text("ref: refs/heads/main\n")
    assert pins(source, tmp_path / "a")[0]["revision"] == commit


def test_the_digest_of_the_tensors_sees_a_name_a_dtype_and_a_shape_and_nothing_else(
    source: Path, tmp_path: Path
) -> None:
    def digest() -> str:
        found: str = json.loads(dsv4q("plan", source, "-c", config(tmp_path), "--json").out)["source"]["pin"][
            "tensors_sha256"
        ]
        return found

    before = digest()
    rewritten(source, lambda name, t: (name, t + 1))
    assert digest() == before
    seen = {before}
    for change in (
        lambda name, t: (f"{name}.x" if name == "norm.weight" else name, t),
        lambda name, t: (name, t.to(torch.float16) if name == "embed.weight" else t),
        lambda name, t: (name, t.T.contiguous() if name == "head.weight" else t),
    ):
        rewritten(source, change)
        seen.add(digest())
    assert len(seen) == 4
