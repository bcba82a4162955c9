"""source.py: what lies on disk is read exactly, and each kind of damage is one named problem."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dsv4q.checkpoint.against_layout import compare_with_layout, draft_kind
from dsv4q.checkpoint.source import INDEX, Checkpoint, open_checkpoint, scan
from dsv4q.errors import SourceError
from dsv4q.layout import DTYPE_BYTES, Dims, TensorSpec, source_tensors

A, B = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def raw_shard(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def info(begin: int, end: int, dtype: str = "U8", shape: list[Any] | None = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


def one_shard(root: Path, header: object, data: bytes = b"", length: int | None = None) -> Checkpoint:
    """A checkpoint of a config.json and one shard, scanned."""
    root.mkdir(exist_ok=True)
    (root / "config.json").write_text("{}")
    (root / "model.safetensors").write_bytes(raw_shard(header, data, length))
    return scan(root)


def write_index(root: Path, weight_map: Mapping[str, object], **metadata: object) -> None:
    (root / INDEX).write_text(json.dumps({"metadata": metadata, "weight_map": weight_map}))


@pytest.fixture
def healthy(tmp_path: Path) -> Path:
    """Two shards that safetensors itself wrote: a, b | c, d."""
    root = tmp_path / "checkpoint"
    root.mkdir()
    (root / "config.json").write_text('{"model_type": "deepseek_v4"}')
    save_file({"a": torch.arange(6.0).reshape(2, 3), "b": torch.arange(4).to(torch.bfloat16)}, root / A)
    save_file({"c": torch.arange(8), "d": torch.arange(16, dtype=torch.uint8)}, root / B)
    write_index(root, {"a": A, "b": A, "c": B, "d": B}, total_size=24 + 8 + 64 + 16)
    return root


def only(problems: Iterable[SourceError], *parts: str) -> SourceError:
    """The one problem there is; its text holds every part."""
    (problem,) = problems
    for part in parts:
        assert part in problem.text(), problem.text()
    return problem


# ------------------------------------------------------------------------------------------------ healthy


def test_healthy_checkpoint_has_no_problem(healthy: Path) -> None:
    checkpoint = open_checkpoint(healthy)
    assert checkpoint.problems == ()
    assert checkpoint.has_weights
    assert set(checkpoint.tensors) == {"a", "b", "c", "d"}
    assert checkpoint.files == {A: (healthy / A).stat().st_size, B: (healthy / B).stat().st_size}


@pytest.mark.parametrize("name", ["a", "b", "c", "d"])
def test_bytes_read_are_those_that_safetensors_reads(healthy: Path, name: str) -> None:
    with scan(healthy) as checkpoint, safe_open(healthy / checkpoint.tensors[name].file, "pt") as reference:
        expected = reference.get_tensor(name).flatten().view(torch.uint8).numpy().tobytes()
        assert checkpoint.read(name).tobytes() == expected


DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U64": torch.uint64, "U32": torch.uint32,
    "U16": torch.uint16, "U8": torch.uint8, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu, "BOOL": torch.bool,
}  # fmt: skip


@pytest.mark.parametrize("dtype", list(DTYPE_BYTES))
def test_tensor_has_dtype_shape_and_bits_that_safetensors_gives(tmp_path: Path, dtype: str) -> None:
    raw = torch.arange(6 * DTYPE_BYTES[dtype], dtype=torch.uint8) % (2 if dtype == "BOOL" else 251)
    expected = raw.view(DTYPES[dtype]).reshape(2, 3)
    save_file({"t": expected}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    checkpoint = scan(tmp_path)
    tensor = checkpoint.tensor("t")
    assert checkpoint.tensors["t"].dtype == dtype
    assert (tensor.dtype, tensor.shape) == (expected.dtype, expected.shape)
    assert torch.equal(tensor.view(torch.uint8), expected.view(torch.uint8))


def test_tensor_owns_its_memory(healthy: Path) -> None:
    checkpoint = scan(healthy)
    checkpoint.tensor("a").zero_()
    assert torch.equal(checkpoint.tensor("a"), torch.arange(6.0).reshape(2, 3))


def test_scalar_and_empty_tensors_are_read(tmp_path: Path) -> None:
    save_file({"scalar": torch.tensor(2.5), "empty": torch.empty(0, 4)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.tensor("scalar").item() == 2.5
    assert checkpoint.tensor("empty").shape == (0, 4)
    assert checkpoint.read("empty").nbytes == 0


def test_read_into_fills_a_buffer_of_the_caller(healthy: Path) -> None:
    buffer = torch.zeros(16, dtype=torch.uint8)
    scan(healthy).read_into("d", memoryview(buffer.numpy()))
    assert buffer.tolist() == list(range(16))


def test_a_part_of_a_tensor_and_what_was_fetched_of_it_are_its_bytes(healthy: Path) -> None:
    part, whole = bytearray(5), torch.zeros(2, 3)
    with scan(healthy) as checkpoint:
        checkpoint.read_part("d", 7, memoryview(part))
        checkpoint.fetched("a")(whole)
    assert list(part) == [7, 8, 9, 10, 11]
    assert torch.equal(whole, torch.arange(6.0).reshape(2, 3))


def test_buffer_of_another_size_is_a_defect_of_the_caller(healthy: Path) -> None:
    with pytest.raises(ValueError, match="16 bytes, the buffer 15"):
        scan(healthy).read_into("d", memoryview(bytearray(15)))


def test_unknown_name_is_refused_by_name(healthy: Path) -> None:
    with pytest.raises(SourceError, match="no such tensor"):
        scan(healthy).read("nope")


def test_shard_that_shrinks_after_the_scan_is_refused(healthy: Path) -> None:
    checkpoint = scan(healthy)
    os.truncate(healthy / B, (healthy / B).stat().st_size - 1)
    with pytest.raises(SourceError, match="changed while it was in use"):
        checkpoint.read("d")


def test_short_read_of_an_open_shard_is_refused(healthy: Path) -> None:
    checkpoint = scan(healthy)
    last = max(("c", "d"), key=lambda name: checkpoint.tensors[name].start)
    checkpoint.read(last)
    os.truncate(healthy / B, (healthy / B).stat().st_size - 1)
    with pytest.raises(SourceError, match="ends inside a tensor"):
        checkpoint.read(last)


def test_threads_read_the_same_bytes(healthy: Path) -> None:
    with scan(healthy) as checkpoint, ThreadPoolExecutor(4) as pool:
        names = ["a", "b", "c", "d"] * 50
        assert list(pool.map(checkpoint.read, names)) == [checkpoint.read(name) for name in names]


def test_close_closes_the_files(healthy: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with scan(healthy) as checkpoint:
        checkpoint.read("a"), checkpoint.read("c")
        assert len(os.listdir("/proc/self/fd")) == before + 2
    assert len(os.listdir("/proc/self/fd")) == before


def test_headers_longer_than_the_first_read_are_read_whole(tmp_path: Path) -> None:
    header = {f"{'long.' * 40}{i}": info(i, i + 1) for i in range(2000)}
    checkpoint = one_shard(tmp_path, header, bytes(2000))
    assert checkpoint.problems == ()
    assert len(checkpoint.tensors) == 2000


def test_module_does_not_import_torch() -> None:
    code = "import dsv4q.checkpoint.source, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ------------------------------------------------------------------------------------------------ fingerprint


def test_fingerprint_is_json_and_repeats(healthy: Path) -> None:
    print_ = scan(healthy).fingerprint()
    assert json.loads(json.dumps(print_)) == print_ == scan(healthy).fingerprint()


def test_fingerprint_does_not_depend_on_the_folder(healthy: Path, tmp_path: Path) -> None:
    shutil.copytree(healthy, tmp_path / "copy")
    assert scan(tmp_path / "copy").fingerprint() == scan(healthy).fingerprint()


@pytest.mark.parametrize("place", [0, 7, -1])
def test_fingerprint_sees_changed_weights(tmp_path: Path, place: int) -> None:
    size = 1 << 20
    data = bytearray(size)
    before = one_shard(tmp_path, {"t": info(0, size)}, bytes(data)).fingerprint()
    data[place] = 1
    assert one_shard(tmp_path, {"t": info(0, size)}, bytes(data)).fingerprint() != before


def test_fingerprint_is_the_same_under_other_white_space(healthy: Path) -> None:
    before = scan(healthy).fingerprint()
    (healthy / "config.json").write_text('{ "model_type":  "deepseek_v4" }\n')
    assert scan(healthy).fingerprint() == before


def test_fingerprint_sees_a_changed_config(healthy: Path) -> None:
    before = scan(healthy).fingerprint()
    (healthy / "config.json").write_text('{"model_type": "deepseek_v4", "more": 1}')
    assert scan(healthy).fingerprint() != before


# ------------------------------------------------------------------------------------------------ config.json


@pytest.mark.parametrize("as_file", [True, False])
def test_config_alone_is_a_checkpoint_without_weights(tmp_path: Path, as_file: bool) -> None:
    (tmp_path / "config.json").write_text('{"a": 1}')
    checkpoint = scan(tmp_path / "config.json" if as_file else tmp_path)
    assert (checkpoint.has_weights, checkpoint.config, checkpoint.root) == (False, {"a": 1}, tmp_path)
    assert checkpoint.fingerprint()["files"] == {}


def test_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"no config\.json"):
        scan(tmp_path)


@pytest.mark.parametrize("text", [b"{", b"\xff\xfe", b"[" * 100_000, b'{"n": ' + b"9" * 5000 + b"}", b"[]"])
def test_damaged_config_is_refused(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(SourceError, match=r"config\.json"):
        scan(tmp_path)


def test_shard_given_as_config_is_refused_without_reading_it(tmp_path: Path) -> None:
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(SourceError, match="too large"):
        scan(tmp_path / "model.safetensors")


# ------------------------------------------------------------------------------------------------ index


def test_missing_index_of_several_shards_is_a_problem(healthy: Path) -> None:
    (healthy / INDEX).unlink()
    checkpoint = scan(healthy)
    only(checkpoint.problems, "index is missing", A)
    assert len(checkpoint.tensors) == 4


def test_missing_index_of_a_lone_shard_of_a_series_is_a_problem(healthy: Path) -> None:
    (healthy / INDEX).unlink()
    (healthy / B).unlink()
    only(scan(healthy).problems, "index is missing")


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (b"{", "not valid JSON"),
        (b"\xff", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[]", "no weight_map"),
        (b"{}", "no weight_map"),
        (b'{"weight_map": []}', "no weight_map"),
        (b'{"weight_map": {}}', "no weight_map"),
    ],
)
def test_damaged_index_is_a_problem(healthy: Path, text: bytes, what: str) -> None:
    (healthy / INDEX).write_bytes(text)
    only(scan(healthy).problems, what, INDEX)


def test_index_entry_that_is_no_string_is_a_problem(healthy: Path) -> None:
    write_index(healthy, {"a": A, "b": A, "c": B, "d": 7})
    problems = [p.text() for p in scan(healthy).problems]
    assert any("no file name" in p and f"{INDEX}: d" in p and "7" in p for p in problems)


def test_same_key_twice_in_the_index_is_a_problem(healthy: Path) -> None:
    (healthy / INDEX).write_text(f'{{"weight_map": {{"a": "{A}", "a": "{A}", "b": "{A}", "c": "{B}", "d": "{B}"}}}}')
    only(scan(healthy).problems, "same key twice", f"{INDEX}: a")


def test_index_naming_an_absent_file_is_a_problem(healthy: Path) -> None:
    (healthy / B).unlink()
    checkpoint = scan(healthy)
    only(checkpoint.problems, "not there", B, "2 tensors")
    assert checkpoint.unread == {"c", "d"}


ESCAPES = {
    "../outside.safetensors": "climbs out",
    "sub/../../outside.safetensors": "climbs out",
    "/etc/outside.safetensors": "absolute",
    "sub\\outside.safetensors": "backslash",
    "nul\0.safetensors": "NUL",
    "\ud800.safetensors": "unprintable",
    "./model.safetensors": "plain form",
    "config.json": "not a .safetensors",
    "": "not a .safetensors",
}


@pytest.mark.parametrize("file", list(ESCAPES))
def test_file_name_that_leaves_the_folder_is_refused(healthy: Path, file: str) -> None:
    (healthy.parent / "outside.safetensors").write_bytes((healthy / B).read_bytes())
    write_index(healthy, {"a": A, "b": A, "c": file, "d": file})
    checkpoint = scan(healthy)
    problem = next(p for p in checkpoint.problems if "file name is refused" in p.what)
    assert ESCAPES[file] in problem.text()
    assert set(checkpoint.files) == {A}


def test_symlinks_out_of_the_folder_are_followed(healthy: Path) -> None:
    (healthy / B).rename(healthy.parent / "blob")
    (healthy / B).symlink_to("../blob")
    checkpoint = scan(healthy)
    assert checkpoint.problems == ()
    assert bytes(checkpoint.read("d")) == bytes(range(16))


def test_a_linked_folder_is_followed(healthy: Path) -> None:
    outside = healthy.parent / "outside"
    outside.mkdir()
    (healthy / B).rename(outside / B)
    (healthy / "sub").symlink_to(outside)
    write_index(healthy, {"a": A, "b": A, "c": f"sub/{B}", "d": f"sub/{B}"})
    assert scan(healthy).problems == ()


def test_a_link_to_nothing_is_a_problem(healthy: Path) -> None:
    (healthy / B).unlink()
    (healthy / B).symlink_to("../blobs/gone")
    only(scan(healthy).problems, "is not there", B)


def test_symlinks_that_stay_inside_are_followed(healthy: Path, tmp_path: Path) -> None:
    (healthy / B).rename(healthy / "blob")
    (healthy / B).symlink_to("blob")
    (tmp_path / "link").symlink_to(healthy)
    assert scan(tmp_path / "link").problems == ()


def test_symlink_loop_is_a_problem(healthy: Path) -> None:
    (healthy / B).unlink()
    (healthy / B).symlink_to(B)
    only(scan(healthy).problems, "cannot be opened", B)


def test_fifo_as_shard_is_a_problem_and_no_hang(healthy: Path) -> None:
    (healthy / B).unlink()
    os.mkfifo(healthy / B)
    only(scan(healthy).problems, "not a regular file", B, "pipe")


def test_folder_as_shard_is_a_problem(healthy: Path) -> None:
    (healthy / B).unlink()
    (healthy / B).mkdir()
    only(scan(healthy).problems, "not a regular file", B, "folder")


def test_fifo_as_index_is_a_problem_and_no_hang(healthy: Path) -> None:
    (healthy / INDEX).unlink()
    os.mkfifo(healthy / INDEX)
    only(scan(healthy).problems, "not a regular file", INDEX)


def test_shard_of_the_series_outside_the_index_is_a_problem(healthy: Path) -> None:
    write_index(healthy, {"a": A, "b": A})
    only(scan(healthy).problems, "not named by the index", B)


def test_other_safetensors_files_beside_the_index_are_let_be(healthy: Path) -> None:
    shutil.copy(healthy / A, healthy / "consolidated.safetensors")
    assert scan(healthy).problems == ()


def test_tensor_of_the_index_that_is_in_no_shard_is_a_problem(healthy: Path) -> None:
    write_index(healthy, {"a": A, "b": A, "c": B, "d": B, "e": B})
    only(scan(healthy).problems, "puts a tensor where it is not", f"{B}: e", "in no shard")


def test_tensor_in_another_shard_than_the_index_says_is_a_problem(healthy: Path) -> None:
    write_index(healthy, {"a": A, "b": B, "c": B, "d": B})
    only(scan(healthy).problems, "puts a tensor where it is not", f"{B}: b", f"in {A}")


def test_tensor_that_the_index_does_not_name_is_a_problem(healthy: Path) -> None:
    write_index(healthy, {"a": A, "c": B, "d": B})
    only(scan(healthy).problems, "does not name", f"{A}: b")


def test_tensor_in_two_shards_is_a_problem(healthy: Path) -> None:
    save_file({"c": torch.arange(8), "d": torch.zeros(16, dtype=torch.uint8), "a": torch.zeros(2, 3)}, healthy / B)
    write_index(healthy, {"a": A, "b": A, "c": B, "d": B})
    checkpoint = scan(healthy)
    only(checkpoint.problems, "lies in two shards", f"{B}: a", A)
    assert checkpoint.tensors["a"].file == A


@pytest.mark.parametrize("total", [111, 113, "112", True])
def test_wrong_total_size_is_a_warning(healthy: Path, total: object) -> None:
    write_index(healthy, {"a": A, "b": A, "c": B, "d": B}, total_size=total)
    checkpoint = scan(healthy)
    assert checkpoint.problems == ()
    only(checkpoint.warnings, "total_size", "expected: 112 bytes", f"found: {total!r}")


def test_total_size_may_be_absent_or_a_float(healthy: Path) -> None:
    for metadata in ({}, {"total_size": 112.0}):
        write_index(healthy, {"a": A, "b": A, "c": B, "d": B}, **metadata)
        checkpoint = scan(healthy)
        assert (checkpoint.problems, checkpoint.warnings) == ((), ())


# ------------------------------------------------------------------------------------------------ headers


@pytest.mark.parametrize("cut", [0, 7])
def test_shard_shorter_than_the_header_length_is_a_problem(healthy: Path, cut: int) -> None:
    os.truncate(healthy / B, cut)
    only(scan(healthy).problems, "too short", B, f"{cut} bytes")


@pytest.mark.parametrize("length", [0, 100_000_001, 2**64 - 1])
def test_impossible_header_length_is_a_problem(tmp_path: Path, length: int) -> None:
    only(one_shard(tmp_path, {}, length=length).problems, "impossible length", f"{length:,}")


def test_header_beyond_the_file_is_a_problem(tmp_path: Path) -> None:
    only(one_shard(tmp_path, {}, length=1000).problems, "ends inside its header", "1,008 bytes", "10 bytes")


@pytest.mark.parametrize("text", [b"\xff\xff", b"{", b'{"a": NaN}', b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"])
def test_header_that_is_not_json_is_a_problem(tmp_path: Path, text: bytes) -> None:
    only(one_shard(tmp_path, text).problems, "not valid JSON", "model.safetensors")


def test_header_that_is_no_object_is_a_problem(tmp_path: Path) -> None:
    only(one_shard(tmp_path, [1]).problems, "not a JSON object", "list")


def test_same_tensor_twice_in_a_header_is_a_problem(tmp_path: Path) -> None:
    entry = json.dumps(info(0, 4))
    only(one_shard(tmp_path, f'{{"t": {entry}, "t": {entry}}}'.encode(), bytes(4)).problems, "same key twice", ": t")


def test_metadata_of_another_form_is_a_problem(tmp_path: Path) -> None:
    only(one_shard(tmp_path, {"__metadata__": {"format": 1}}).problems, "__metadata__")


BAD_ENTRIES: dict[str, tuple[object, str]] = {
    "no object": (7, "wrong form"),
    "no dtype": ({"shape": [4], "data_offsets": [0, 4]}, "wrong form"),
    "shape no list": (info(0, 4) | {"shape": 4}, "wrong form"),
    "offsets absent": ({"dtype": "U8", "shape": [4]}, "wrong form"),
    "unknown dtype": (info(0, 4, "F13"), "unknown dtype"),
    "negative dimension": (info(0, 4, shape=[-4]), "impossible shape"),
    "fraction dimension": (info(0, 4, shape=[4.0]), "impossible shape"),
    "boolean dimension": (info(0, 4, shape=[True, 4]), "impossible shape"),
    "text dimension": (info(0, 4, shape=["4"]), "impossible shape"),
    "huge dimension": (info(0, 0, shape=[0, 2**63]), "impossible shape"),
    "too many dimensions": (info(0, 4, shape=[4] + [1] * 100_000), "impossible shape"),
    "one offset": (info(0, 4) | {"data_offsets": [0]}, "data_offsets"),
    "offset no integer": (info(0, 4) | {"data_offsets": [0, 4.0]}, "data_offsets"),
    "offset negative": (info(0, 4) | {"data_offsets": [-4, 0]}, "data_offsets"),
    "offsets backwards": (info(0, 4) | {"data_offsets": [4, 0]}, "data_offsets"),
    "size too small": (info(0, 4, shape=[3]), "do not fit"),
    "size of another dtype": (info(0, 4, "F32", [4]), "do not fit"),
}


@pytest.mark.parametrize("case", list(BAD_ENTRIES))
def test_damaged_header_entry_is_a_problem(tmp_path: Path, case: str) -> None:
    entry, what = BAD_ENTRIES[case]
    checkpoint = one_shard(tmp_path, {"t": entry}, bytes(4))
    only(checkpoint.problems, what, "model.safetensors: t")
    assert "t" in checkpoint.unread | checkpoint.tensors.keys()


@pytest.mark.parametrize("name", ["", "a\nb", "a\0b", "\ud800"])
def test_unprintable_tensor_name_is_a_problem_that_prints(tmp_path: Path, name: str) -> None:
    problem = only(one_shard(tmp_path, {name: info(0, 4)}, bytes(4)).problems, "name has characters")
    problem.text().encode()


def test_overlapping_tensors_are_a_problem(tmp_path: Path) -> None:
    header = {"a": info(0, 4), "b": info(2, 8)}
    only(
        one_shard(tmp_path, header, bytes(8)).problems,
        "overlaps",
        "model.safetensors: b",
        "2 bytes before the end of a",
    )


def test_tensor_inside_another_is_a_problem(tmp_path: Path) -> None:
    header = {"a": info(0, 8), "b": info(2, 4)}
    only(one_shard(tmp_path, header, bytes(8)).problems, "overlaps", ": b")


@pytest.mark.parametrize("begin", [1, 8])
def test_hole_before_a_tensor_is_a_problem(tmp_path: Path, begin: int) -> None:
    only(one_shard(tmp_path, {"t": info(begin, begin + 4)}, bytes(begin + 4)).problems, "hole", f"{begin} bytes after")


def test_truncated_shard_is_a_problem(healthy: Path) -> None:
    size = (healthy / B).stat().st_size
    os.truncate(healthy / B, size - 1)
    only(scan(healthy).problems, "truncated", B, f"{size:,} bytes", f"{size - 1:,} bytes; 1 of its 2 tensors")


def test_bytes_after_the_last_tensor_are_a_problem(tmp_path: Path) -> None:
    only(one_shard(tmp_path, {"t": info(0, 4)}, bytes(5)).problems, "bytes after its last tensor")


def test_absurd_offsets_are_a_problem(tmp_path: Path) -> None:
    checkpoint = one_shard(tmp_path, {"t": info(2**62, 2**62 + 4)}, bytes(4))
    assert any("truncated" in p.what for p in checkpoint.problems)


def test_many_problems_of_one_kind_become_one_with_the_count(tmp_path: Path) -> None:
    header = {f"t{i}": info(i, i + 1, "F13") for i in range(50)}
    only(one_shard(tmp_path, header, bytes(50)).problems, "unknown dtype (50 times)", "t0: F13", "47 more")


def test_scan_does_not_stop_at_the_first_problem(healthy: Path) -> None:
    os.truncate(healthy / A, 4)
    (healthy / B).unlink()
    write_index(healthy, {"a": A, "b": A, "c": B, "d": B, "x": "../x.safetensors"})
    assert len(scan(healthy).problems) == 3


def test_open_raises_the_first_problem_and_counts_the_others(healthy: Path) -> None:
    os.truncate(healthy / A, 4)
    (healthy / B).unlink()
    with pytest.raises(SourceError) as raised:
        open_checkpoint(healthy)
    assert raised.value.what == scan(healthy).problems[0].what
    assert "there is 1 more problem" in str(raised.value.hint)
    assert "dsv4q plan" in str(raised.value.hint)


any_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "__metadata__", "t"]), inner, max_size=4)
    ),
    max_leaves=12,
)
any_entry = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*DTYPE_BYTES, "X"]) | any_json,
        "shape": st.lists(st.integers(-1, 3) | st.integers(), max_size=3) | any_json,
        "data_offsets": st.lists(st.integers(0, 20) | st.integers(), min_size=2, max_size=2) | any_json,
    }
)
any_header = any_json | st.dictionaries(st.text(max_size=3), any_entry | any_json, max_size=4)
fuzz = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def check_reading(checkpoint: Checkpoint) -> None:
    """Whatever the file, problems print; and where there is none, everything is readable."""
    for problem in checkpoint.problems:
        problem.text().encode()
    if not checkpoint.problems:
        for name, entry in checkpoint.tensors.items():
            assert checkpoint.read(name).nbytes == entry.nbytes


@fuzz
@given(header=any_header, data=st.binary(max_size=24))
def test_any_json_as_header_gives_problems_and_never_an_exception(tmp_path: Path, header: object, data: bytes) -> None:
    check_reading(one_shard(tmp_path, header, data))


@fuzz
@given(raw=st.binary(max_size=64))
def test_any_bytes_as_shard_give_a_problem(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(raw)
    checkpoint = scan(tmp_path)
    assert checkpoint.problems
    check_reading(checkpoint)


@fuzz
@given(index=any_json | st.fixed_dictionaries({"weight_map": any_json | st.dictionaries(st.text(), st.text())}))
def test_any_json_as_index_gives_problems_and_never_an_exception(tmp_path: Path, index: object) -> None:
    one_shard(tmp_path, {"t": info(0, 4)}, bytes(4))
    (tmp_path / INDEX).write_text(json.dumps(index))
    checkpoint = scan(tmp_path)
    assert checkpoint.problems
    check_reading(checkpoint)


any_tiling = st.lists(
    st.tuples(
        st.sampled_from(list(DTYPE_BYTES)),
        st.lists(st.integers(0, 3), max_size=3),
        st.sampled_from([0, 0, 0, 0, -1, 1]),
        st.sampled_from([0, 0, 0, 0, -1, 1]),
    ),
    max_size=4,
)


@fuzz
@given(tiling=any_tiling, after=st.sampled_from([0, 0, -1, 1]))
def test_a_shard_has_problems_exactly_if_safetensors_refuses_it(tmp_path: Path, tiling: list[Any], after: int) -> None:
    header, cursor = {}, 0
    for i, (dtype, shape, gap, more) in enumerate(tiling):
        begin, size = max(0, cursor + gap), TensorSpec("", "", dtype, tuple(shape), "", "").nbytes
        cursor = begin + max(0, size + more)
        header[f"t{i}"] = info(begin, cursor, dtype, shape)
    checkpoint = one_shard(tmp_path, header, bytes(max(0, cursor + after)))
    try:
        with safe_open(tmp_path / "model.safetensors", "pt") as reference:
            accepted = set(reference.keys()) == set(checkpoint.tensors)
    except SafetensorError:
        accepted = False
    assert accepted == (checkpoint.problems == ())
    check_reading(checkpoint)


# ------------------------------------------------------------------------------------------------ draft


def test_names_without_mtp_have_no_draft() -> None:
    assert draft_kind(["embed.weight", "layers.0.attn.wkv.weight"]) == "none"


def test_enorm_and_hnorm_in_every_layer_make_mtp() -> None:
    names = [
        "mtp.0.enorm.weight",
        "mtp.0.hnorm.weight",
        "mtp.1.enorm.weight",
        "mtp.1.hnorm.weight",
        "mtp.1.norm.weight",
    ]
    assert draft_kind(names) == "mtp"
    assert draft_kind(names[1:]) == "unknown"


def test_markov_head_without_norms_makes_dspark() -> None:
    names = ["mtp.0.main_proj.weight", "mtp.2.markov_head.markov_w1.weight", "mtp.2.confidence_head.proj.weight"]
    assert draft_kind(names) == "dspark"
    assert draft_kind(names[:1]) == "dspark"
    assert draft_kind([*names, "mtp.0.enorm.weight"]) == "unknown"


# ------------------------------------------------------------------------------------------------ layout

CONFIG: dict[str, Any] = {
    "model_type": "deepseek_v4", "hidden_size": 32, "vocab_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2,
    "head_dim": 16, "q_lora_rank": 16, "o_groups": 2, "o_lora_rank": 8, "n_routed_experts": 6, "n_shared_experts": 1,
    "num_experts_per_tok": 2, "moe_intermediate_size": 16, "hc_mult": 2, "index_n_heads": 2, "index_head_dim": 8,
    "num_hash_layers": 1, "compress_ratios": [0, 4, 128, 0], "num_nextn_predict_layers": 1,
}  # fmt: skip

Tensors = dict[str, tuple[str, tuple[int, ...]]]


def layout_of(config: Mapping[str, Any] = CONFIG) -> Tensors:
    return {spec.name: (spec.dtype, spec.shape) for spec in source_tensors(Dims.from_config(config))}


def compare(root: Path, tensors: Tensors, config: Mapping[str, Any] = CONFIG) -> list[SourceError]:
    """Write a shard of true header and no zeros for data; scan it; compare it with the layout of `config`."""
    (root / "config.json").write_text(json.dumps(config))
    header, cursor = {}, 0
    for name, (dtype, shape) in tensors.items():
        size = TensorSpec(name, "", dtype, shape, "", "").nbytes
        header[name] = info(cursor, cursor + size, dtype, list(shape))
        cursor += size
    (root / "model.safetensors").write_bytes(raw_shard(header, b"\x01" * cursor))
    return compare_with_layout(open_checkpoint(root), Dims.from_config(config))


def without(tensors: Tensors, *prefixes: str) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(prefixes)}


def test_checkpoint_of_the_layout_has_no_difference(tmp_path: Path) -> None:
    assert compare(tmp_path, layout_of()) == []


def test_config_alone_has_no_difference(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert compare_with_layout(scan(tmp_path), Dims.from_config(CONFIG)) == []


def test_missing_tensor_is_named(tmp_path: Path) -> None:
    errors = compare(tmp_path, without(layout_of(), "layers.1.attn.wq_b.weight"))
    only(errors, "1 tensor of layers.1 is missing: layers.1.attn.wq_b.weight", "BF16 [32, 16]")


def test_missing_tensors_of_a_block_are_counted(tmp_path: Path) -> None:
    errors = compare(tmp_path, without(layout_of(), "layers.1.attn.w", "layers.1.attn.q"))
    only(errors, "6 tensors of layers.1 are missing: layers.1.attn.wq_a.weight", "and 3 more")


def test_missing_block_is_one_error(tmp_path: Path) -> None:
    only(compare(tmp_path, without(layout_of(), "layers.2.")), "layers.2 is missing as a whole")


def test_missing_experts_are_named(tmp_path: Path) -> None:
    gone = [f"layers.1.ffn.experts.{e}." for e in (0, 3, 4, 5)]
    errors = compare(tmp_path, without(layout_of(), *gone))
    only(errors, "4 routed experts of layers.1 are missing: 0, 3-5", "12 tensors")


def test_missing_projection_of_an_expert_is_no_missing_expert(tmp_path: Path) -> None:
    errors = compare(tmp_path, without(layout_of(), "layers.1.ffn.experts.3.w2", "layers.1.ffn.experts.4."))
    assert [e.what.split(":")[0] for e in errors] == [
        "1 routed expert of layers.1 is missing",
        "1 tensor of layers.1 is missing",
    ]


def test_extra_tensor_is_named(tmp_path: Path) -> None:
    tensors: Tensors = {**layout_of(), "layers.1.attn.extra.weight": ("BF16", (2,)), "rotary.inv_freq": ("F32", (2,))}
    first, second = compare(tmp_path, tensors)
    assert first.what == "1 tensor of layers.1 is too many: layers.1.attn.extra.weight"
    assert second.what == "1 tensor of no block is too many: rotary.inv_freq"


def test_tensors_of_a_layer_beyond_the_config_are_counted(tmp_path: Path) -> None:
    config = {**CONFIG, "num_hidden_layers": 2}
    count = sum(name.startswith("layers.2.") for name in layout_of())
    only(compare(tmp_path, layout_of(), config), f"{count} tensors of layers.2 are too many")


def test_wrong_dtype_is_named(tmp_path: Path) -> None:
    tensors: Tensors = {**layout_of(), "layers.1.attn.attn_sink": ("BF16", (2,))}
    problem = only(compare(tmp_path, tensors), "1 tensor of layers.1 is of another dtype: layers.1.attn.attn_sink")
    assert (problem.expected, problem.found) == ("layers.1.attn.attn_sink F32 [2]", "layers.1.attn.attn_sink BF16 [2]")


def test_wrong_shape_is_named(tmp_path: Path) -> None:
    tensors: Tensors = {**layout_of(), "embed.weight": ("BF16", (32, 16))}
    problem = only(compare(tmp_path, tensors), "1 tensor of embed is of another shape: embed.weight")
    assert (problem.expected, problem.found) == ("embed.weight BF16 [16, 32]", "embed.weight BF16 [32, 16]")


def test_mtp_in_files_but_not_in_config_is_one_error(tmp_path: Path) -> None:
    count = sum(name.startswith("mtp.") for name in layout_of())
    for config in ({**CONFIG, "num_nextn_predict_layers": 0}, {**CONFIG}):
        if config["num_nextn_predict_layers"]:
            del config["num_nextn_predict_layers"]
        errors = compare(tmp_path, layout_of(), config)
        only(errors, "config.json has no MTP layer", f"{count} mtp.* tensors", "num_nextn_predict_layers")


def test_mtp_in_config_but_not_in_files_is_one_error(tmp_path: Path) -> None:
    only(compare(tmp_path, without(layout_of(), "mtp.")), "config.json has MTP, but the files have no mtp.* tensor")


def test_incomplete_mtp_is_named_tensor_by_tensor(tmp_path: Path) -> None:
    only(compare(tmp_path, without(layout_of(), "mtp.0.e_proj")), "1 tensor of mtp.0 is missing: mtp.0.e_proj.weight")


def test_dspark_draft_is_named(tmp_path: Path) -> None:
    tensors = without(layout_of(), "mtp.0.enorm", "mtp.0.hnorm", "mtp.0.e_proj", "mtp.0.h_proj")
    tensors["mtp.0.markov_head.markov_w1.weight"] = ("BF16", (16, 4))
    for count in (0, 1):
        errors = compare(tmp_path, tensors, {**CONFIG, "num_nextn_predict_layers": count})
        only(errors, "DSpark draft, not MTP", "mtp.0.markov_head.markov_w1.weight")


def test_quantized_artifact_as_source_is_named(tmp_path: Path) -> None:
    tensors = without(layout_of(), "layers.0.ffn.experts.")
    for e in range(6):
        for p in ("w1", "w2", "w3"):
            module = f"layers.0.ffn.experts.{e}.{p}"
            tensors[f"{module}.weight_packed"] = ("U8", (16, 8))
            tensors[f"{module}.weight_scale"] = ("F8_E4M3", (16, 1))
    only(compare(tmp_path, tensors), "compressed-tensors format", "36 compressed-tensors tensors")


def test_transformers_names_are_one_error(tmp_path: Path) -> None:
    specs = source_tensors(Dims.from_config(CONFIG))
    tensors: Tensors = {spec.hf_name if not spec.is_mtp else spec.name: (spec.dtype, spec.shape) for spec in specs}
    only(compare(tmp_path, tensors), "transformers' names", "model.embed_tokens.weight", "embed.weight")


def test_tensors_of_an_unreadable_shard_are_not_called_missing_too(tmp_path: Path) -> None:
    compare(tmp_path, without(layout_of(), "layers.2."))
    names = {name: "model.safetensors" for name in layout_of()}
    write_index(tmp_path, {n: "lost.safetensors" if n.startswith("layers.2.") else f for n, f in names.items()})
    checkpoint = scan(tmp_path)
    only(checkpoint.problems, "not there", "lost.safetensors")
    assert compare_with_layout(checkpoint, Dims.from_config(CONFIG)) == []
