"""Several tensors read at once: the same bytes as one by one, in few calls, and the same named errors."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from dsv4q.checkpoint import files, reading
from dsv4q.checkpoint.native import NativeCheckpoint, open_source
from dsv4q.checkpoint.source import Checkpoint, scan
from dsv4q.errors import SourceError
from dsv4q.made_up.generated import GeneratedCheckpoint
from dsv4q.made_up.native import native_form
from dsv4q.made_up.packed import PackedCheckpoint
from dsv4q.made_up.toy import ToyConfig, write_toy
from dsv4q.verify.modelopt import ShownArtifact

FILE = "model.safetensors"
SIZES = [3, 1, 0, 7, 16, 5, 2, 11]
"""Bytes of the tensors a, b, c, ... that lie side by side in one file, in this order."""
NAMES = [chr(ord("a") + i) for i in range(len(SIZES))]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    root = tmp_path_factory.mktemp("bytes")
    (root / "config.json").write_text("{}")
    values = torch.randint(256, (sum(SIZES),), dtype=torch.uint8).split(SIZES)
    save_file({name: value.clone() for name, value in zip(NAMES, values, strict=True)}, root / FILE)
    return scan(root)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many buffers each call of preadv had."""
    seen: list[int] = []
    real = os.preadv

    def counted(handle: int, buffers: Sequence[memoryview], offset: int) -> int:
        seen.append(len(buffers))
        return real(handle, buffers, offset)

    monkeypatch.setattr(os, "preadv", counted)
    return seen


def read(checkpoint: Checkpoint, names: Sequence[str]) -> dict[str, bytes]:
    """What `read_many` gives of tensors."""
    buffers = {name: bytearray(checkpoint.tensors[name].nbytes) for name in names}
    checkpoint.read_many([(name, memoryview(buffer)) for name, buffer in buffers.items()])
    return {name: bytes(buffer) for name, buffer in buffers.items()}


def one_by_one(checkpoint: Checkpoint, names: Sequence[str]) -> dict[str, bytes]:
    return {name: bytes(checkpoint.read(name)) for name in names}


@given(st.lists(st.sampled_from(NAMES), unique=True), st.integers(1, 40), st.integers(1, 4), st.integers(1, 9))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_tensors_in_any_order_have_the_bytes_that_they_have_one_by_one(
    checkpoint: Checkpoint, names: list[str], in_one_call: int, buffers: int, at_most: int
) -> None:
    real = os.preadv

    def short(handle: int, into: Sequence[memoryview], offset: int) -> int:
        """A system that reads fewer bytes than it was asked for."""
        views: list[memoryview] = []
        left = at_most
        for view in into:
            views.append(view[:left])
            left -= len(views[-1])
        return real(handle, views, offset)

    expected = one_by_one(checkpoint, names)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "IN_ONE_CALL", in_one_call)
        patch.setattr(files, "BUFFERS", buffers)
        patch.setattr(os, "preadv", short)
        assert read(checkpoint, names) == expected


def test_what_lies_side_by_side_is_read_in_one_call(checkpoint: Checkpoint, calls: list[int]) -> None:
    read(checkpoint, list(reversed(NAMES)))
    assert calls == [sum(size > 0 for size in SIZES)]


def test_a_gap_makes_two_calls(checkpoint: Checkpoint, calls: list[int]) -> None:
    read(checkpoint, ["a", "b", "d", "f", "g"])  # c is empty, and e is left out
    assert calls == [3, 2]


def test_one_call_reads_no_more_than_its_bytes(
    checkpoint: Checkpoint, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "IN_ONE_CALL", 12)
    read(checkpoint, NAMES)
    assert len(calls) == 4  # abcd, e, fg, h: of 11, 16, 7 and 11 bytes; e is longer than one call may be, and alone


def test_a_file_that_ends_early_is_told_with_the_tensor_in_which_it_ends(tmp_path: Path) -> None:
    root = tmp_path / "cut"
    root.mkdir()
    (root / "config.json").write_text("{}")
    save_file({name: torch.zeros(8, dtype=torch.uint8) for name in "abc"}, root / FILE)
    found = scan(root)
    found.read("a")  # the file is open from here on
    os.truncate(root / FILE, found.tensors["b"].start + 3)
    with pytest.raises(SourceError, match="ends inside") as error:
        read(found, ["a", "b", "c"])
    assert str(error.value.where).endswith(": b") and str(error.value.found) == "3 bytes"


def test_a_buffer_of_another_size_is_refused_before_anything_is_read(checkpoint: Checkpoint, calls: list[int]) -> None:
    with pytest.raises(ValueError, match="d has 7 bytes, the buffer 6"):
        checkpoint.read_many([("a", memoryview(bytearray(3))), ("d", memoryview(bytearray(6)))])
    assert not calls


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkpoint]:
    folder = tmp_path_factory.mktemp("native") / "source"
    write_toy(folder, ToyConfig(), 0, native_form())
    yield open_source(folder)


def test_rows_of_quantized_tensors_are_their_weights_and_scales_as_they_lie_in_the_files(native: Checkpoint) -> None:
    rows = [[f"layers.1.ffn.experts.{e}.{w}.weight" for e in (2, 3, 5)] for w in ("w1", "w2", "w3")]
    for row, found in zip(rows, native.stored_rows(rows), strict=True):
        for at, name in enumerate(row):
            assert all(torch.equal(whole[at], one) for whole, one in zip(found, native.stored(name), strict=True))


def test_quantized_tensors_among_others_are_dequantized(native: Checkpoint) -> None:
    names = ["layers.1.ffn.experts.2.w1.weight", "layers.1.attn_norm.weight", "layers.1.attn.wq_a.weight"]
    assert isinstance(native, NativeCheckpoint) and names[0] in native.quantized and names[1] not in native.quantized
    assert read(native, names) == one_by_one(native, names)


@pytest.mark.parametrize("kind", [NativeCheckpoint, GeneratedCheckpoint, PackedCheckpoint, ShownArtifact])
def test_who_reads_in_a_way_of_its_own_reads_many_so_too(kind: type[Checkpoint]) -> None:
    assert {"read_into", "read_part"} & vars(kind).keys()
    assert "read_many" in vars(kind)


def test_every_kind_of_checkpoint_is_among_them() -> None:
    assert set(Checkpoint.__subclasses__()) == {NativeCheckpoint, GeneratedCheckpoint, PackedCheckpoint, ShownArtifact}
