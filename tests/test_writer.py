"""The writer: planned bytes at their planned place, in any order; refusals of the disk."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import stat
from collections.abc import Collection
from pathlib import Path

import pytest
from safetensors import deserialize

from dsv4q.checkpoint.source import scan
from dsv4q.checkpoint.writer import BackgroundWriter, ShardWriter, block_digest, check_finished_shards
from dsv4q.config import load_config
from dsv4q.errors import DiskError, OutputError
from dsv4q.made_up.toy import ToyConfig
from dsv4q.plan.plan import Plan, make_plan
from runs import CONFIGS


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    file = tmp_path_factory.mktemp("plan") / "config.json"
    file.write_text(json.dumps(ToyConfig(n_routed_experts=2).as_config_json()))
    with scan(file) as checkpoint:
        return make_plan(checkpoint, load_config(CONFIGS / "toy.yaml"))


def content(name: str, nbytes: int) -> bytes:
    """Bytes that only this tensor has."""
    return hashlib.shake_128(name.encode()).digest(nbytes)


def put_all(plan: Plan, out: Path, seed: int = 0) -> None:
    """Write every tensor in some order, sync, finish."""
    tensors = list(plan.tensors)
    random.Random(seed).shuffle(tensors)
    writer = ShardWriter(out, plan)
    for tensor in tensors:
        writer.put(tensor.name, content(tensor.name, tensor.nbytes))
    for block in plan.blocks:
        writer.sync(block)
    assert writer.finish_blocks(plan.blocks) == [s.file for s in plan.shards]
    writer.close()


def fail(error: int) -> OSError:
    return OSError(error, os.strerror(error))


@pytest.mark.parametrize("seed", [0, 1])
def test_tensors_put_in_any_order_lie_where_safetensors_looks_for_them(plan: Plan, tmp_path: Path, seed: int) -> None:
    put_all(plan, tmp_path, seed)
    for shard in plan.shards:
        found = dict(deserialize((tmp_path / shard.file).read_bytes()))
        assert set(found) == {t.name for t in shard.tensors}
        for tensor in shard.tensors:
            entry = found[tensor.name]
            assert (entry["dtype"], tuple(entry["shape"])) == (tensor.dtype, tensor.shape)
            assert bytes(entry["data"]) == content(tensor.name, tensor.nbytes)


def test_a_file_is_header_and_tensors_with_nothing_between_or_behind(plan: Plan, tmp_path: Path) -> None:
    put_all(plan, tmp_path)
    for shard in plan.shards:
        planned = shard.header + b"".join(content(t.name, t.nbytes) for t in shard.tensors)
        assert (tmp_path / shard.file).read_bytes() == planned


def test_a_shard_is_partial_until_the_last_of_its_blocks_is_done(plan: Plan, tmp_path: Path) -> None:
    first = plan.shards[0]
    blocks = list(dict.fromkeys(t.block for t in first.tensors))
    writer = ShardWriter(tmp_path, plan)
    for tensor in first.tensors:
        writer.put(tensor.name, bytes(tensor.nbytes))
    assert writer.finish_blocks(blocks[:-1]) == [] and (tmp_path / f"{first.file}.partial").is_file()
    assert writer.finish_blocks(blocks[-1:]) == [first.file]
    assert sorted(p.name for p in tmp_path.iterdir()) == [first.file]
    writer.close()


def test_shards_are_readable_for_all_under_any_umask(plan: Plan, tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        put_all(plan, tmp_path)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(p.stat().st_mode) for p in tmp_path.iterdir()} == {0o644}


@pytest.mark.parametrize("wrong", [-1, 1])
def test_bytes_of_another_length_than_planned_are_a_defect_of_ours(plan: Plan, tmp_path: Path, wrong: int) -> None:
    tensor = plan.tensors[0]
    with pytest.raises(AssertionError, match=tensor.name):
        ShardWriter(tmp_path, plan).put(tensor.name, bytes(tensor.nbytes + wrong))
    assert not list(tmp_path.iterdir())


def test_the_digest_of_a_sync_depends_on_the_bytes_and_not_on_their_order(plan: Plan, tmp_path: Path) -> None:
    one, other = plan.block_tensors("layers.0")[:2]

    def digest(folder: str, puts: list[tuple[str, bytes]]) -> str:
        (tmp_path / folder).mkdir()
        writer = ShardWriter(tmp_path / folder, plan)
        for name, data in puts:
            writer.put(name, data)
        found = writer.sync(one.block)
        writer.close()
        return found

    puts = [(one.name, bytes(one.nbytes)), (other.name, bytes(other.nbytes))]
    changed = [puts[0], (other.name, b"\1" + bytes(other.nbytes - 1))]
    assert digest("a", puts) == digest("b", puts[::-1]) != digest("c", changed)


def test_a_second_writer_keeps_what_the_first_has_put(plan: Plan, tmp_path: Path) -> None:
    one, other = plan.shards[0].tensors[:2]
    for tensor in (one, other):
        writer = ShardWriter(tmp_path, plan)
        writer.put(tensor.name, content(tensor.name, tensor.nbytes))
        writer.sync(tensor.block)
        writer.close()
    data = (tmp_path / f"{plan.shards[0].file}.partial").read_bytes()[len(plan.shards[0].header) :]
    assert data.startswith(content(one.name, one.nbytes) + content(other.name, other.nbytes))


def test_writes_that_the_system_cuts_short_are_continued(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, shard = os.pwritev, plan.shards[0]
    monkeypatch.setattr(os, "pwritev", lambda handle, data, offset: real(handle, [bytes(data[0][:1000])], offset))
    writer = ShardWriter(tmp_path, plan)
    for tensor in shard.tensors:
        writer.put(tensor.name, content(tensor.name, tensor.nbytes))
    writer.close()
    planned = shard.header + b"".join(content(t.name, t.nbytes) for t in shard.tensors)
    assert (tmp_path / f"{shard.file}.partial").read_bytes() == planned


@pytest.mark.parametrize(
    ("call", "error"),
    [("pwritev", errno.ENOSPC), ("truncate", errno.EFBIG), ("fsync", errno.EIO), ("pwritev", errno.EDQUOT)],
)
def test_a_disk_that_refuses_is_named_with_the_file(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, error: int
) -> None:
    def refuse(*_: object) -> None:
        raise fail(error)

    monkeypatch.setattr(os, call, refuse)
    tensor, writer = plan.shards[0].tensors[0], ShardWriter(tmp_path, plan)
    with pytest.raises(DiskError) as caught:
        writer.put(tensor.name, bytes(tensor.nbytes))
        writer.sync(tensor.block)
    assert caught.value.found == os.strerror(error) and plan.shards[0].file in str(caught.value.where)
    writer.close()


def test_a_folder_that_takes_no_file_is_a_disk_error(plan: Plan, tmp_path: Path) -> None:
    tensor = plan.tensors[0]
    with pytest.raises(DiskError, match="No such file"):
        ShardWriter(tmp_path / "gone", plan).put(tensor.name, bytes(tensor.nbytes))


@pytest.mark.parametrize("damage", ["gone", "short", "header", "fine"])
def test_only_shards_that_are_as_they_were_left_are_gone_on_with(plan: Plan, tmp_path: Path, damage: str) -> None:
    put_all(plan, tmp_path)
    path, shard = tmp_path / plan.shards[1].file, plan.shards[1]
    data = path.read_bytes()
    damaged = {"short": data[:-1], "header": data[:20] + b"X" + data[21:], "fine": data}
    path.write_bytes(damaged.get(damage, data))
    if damage == "gone":
        path.unlink()
    if damage == "fine":
        check_finished_shards(tmp_path, plan, plan.blocks)
        return
    with pytest.raises(OutputError) as caught:
        check_finished_shards(tmp_path, plan, plan.blocks)
    assert shard.file in str(caught.value.where) and "--no-resume" in str(caught.value)


def test_a_shard_without_finished_tensors_need_not_be_there(plan: Plan, tmp_path: Path) -> None:
    check_finished_shards(tmp_path, plan, [])
    with pytest.raises(OutputError, match="no such file"):
        check_finished_shards(tmp_path, plan, ["embed"])


def test_a_partial_shard_that_was_cut_is_not_given_its_name(plan: Plan, tmp_path: Path) -> None:
    first = plan.shards[0]
    writer = ShardWriter(tmp_path, plan)
    for tensor in first.tensors:
        writer.put(tensor.name, bytes(tensor.nbytes))
    os.truncate(tmp_path / f"{first.file}.partial", first.nbytes - 1)
    with pytest.raises(OutputError, match="changed behind our back"):
        writer.finish_blocks(t.block for t in first.tensors)
    assert not (tmp_path / first.file).exists()


def test_the_digest_of_a_sync_counts_each_tensor_once(plan: Plan, tmp_path: Path) -> None:
    one, writer = plan.block_tensors("embed")[0], ShardWriter(tmp_path, plan)
    writer.put(one.name, bytes(one.nbytes))
    assert writer.sync("embed") == {one.name: hashlib.sha256(bytes(one.nbytes)).hexdigest()}
    assert writer.sync("embed") == {}
    writer.close()


def test_the_digest_of_a_block_is_that_of_its_lines_in_order() -> None:
    assert block_digest({"b": "2", "a": "1"}) == hashlib.sha256(b"a 1\nb 2\n").hexdigest()


# ----------------------------------------------------------------------------------------------- write behind


def write_behind(plan: Plan, out: Path, budget: int, threads: int = 4) -> list[tuple[str, str]]:
    """Write all blocks through a BackgroundWriter; (block, digest) in the order in which they became durable."""
    out.mkdir()
    writer, done = ShardWriter(out, plan), []
    with BackgroundWriter(writer, threads=threads, budget=budget) as behind:
        for block in plan.blocks:
            for tensor in plan.block_tensors(block):
                behind.put(tensor.block, [(tensor.name, content(tensor.name, tensor.nbytes))])
            behind.finish(block, lambda found, _, block=block: done.append((block, block_digest(found))))
    writer.close()
    return done


@pytest.mark.parametrize(("budget", "threads"), [(1, 1), (1, 8), (10_000, 3), (1 << 30, 8)])
def test_writing_behind_gives_the_bytes_and_digests_of_writing_at_once(
    plan: Plan, tmp_path: Path, budget: int, threads: int
) -> None:
    (tmp_path / "once").mkdir()
    put_all(plan, tmp_path / "once")
    done = write_behind(plan, tmp_path / "behind", budget, threads)
    assert [block for block, _ in done] == list(plan.blocks)
    assert done == write_behind(plan, tmp_path / "again", 1, 1)
    for shard in plan.shards:
        assert (tmp_path / "behind" / shard.file).read_bytes() == (tmp_path / "once" / shard.file).read_bytes()


def test_a_disk_that_fails_behind_us_stops_the_run_and_no_block_is_told_done(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise fail(errno.ENOSPC)

    monkeypatch.setattr(os, "pwritev", refuse)
    with pytest.raises(DiskError, match="No space left"):
        write_behind(plan, tmp_path / "out", budget=1 << 30)
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_a_block_that_cannot_be_made_durable_is_not_told_done(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: int) -> None:
        raise fail(errno.EIO)

    told: list[str] = []
    monkeypatch.setattr(os, "fsync", refuse)
    tensor, writer = plan.block_tensors("embed")[0], ShardWriter(tmp_path, plan)
    with pytest.raises(DiskError), BackgroundWriter(writer) as behind:
        behind.put(tensor.block, [(tensor.name, bytes(tensor.nbytes))])
        behind.finish("embed", lambda *_: told.append("embed"))
    writer.close()
    assert told == []


def test_a_block_that_is_being_finished_when_the_run_fails_is_still_told_done(plan: Plan, tmp_path: Path) -> None:
    told: list[str] = []
    tensor, writer = plan.block_tensors("embed")[0], ShardWriter(tmp_path, plan)
    with pytest.raises(KeyboardInterrupt), BackgroundWriter(writer) as behind:
        behind.put(tensor.block, [(tensor.name, bytes(tensor.nbytes))])
        behind.finish("embed", lambda *_: told.append("embed"))
        raise KeyboardInterrupt
    writer.close()
    assert told == ["embed"]


def test_tensors_of_the_next_block_are_not_part_of_the_digest_before_it(plan: Plan, tmp_path: Path) -> None:
    assert len({digest for _, digest in write_behind(plan, tmp_path / "out", 1 << 30)}) == len(plan.blocks)


# ------------------------------------------------------------------------------------------------ several ranks


def test_a_writer_syncs_the_files_that_it_is_told_to(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = next(b for b in plan.blocks if len({s.file for s in plan.shards for t in s.tensors if t.block == b}) > 1)
    asked: list[list[str]] = []
    synced: list[str] = []

    def first_of(files: Collection[str]) -> list[str]:
        asked.append(sorted(files))
        return sorted(files)[:1]

    def fsync(handle: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)

    monkeypatch.setattr(os, "fsync", fsync)
    writer = ShardWriter(tmp_path, plan)
    writer.to_sync = first_of
    for tensor in plan.block_tensors(block):
        writer.put(tensor.name, content(tensor.name, tensor.nbytes))
    assert len(writer.sync(block)) == len(plan.block_tensors(block))
    assert len(asked[0]) == 2 and synced == [f"{asked[0][0]}.partial"]
    writer.sync(block)
    assert asked[1] == []  # one that has written nothing is asked too: the others wait for it
    writer.close()


def test_a_rank_that_names_no_shard_closes_what_another_has_named(plan: Plan, tmp_path: Path) -> None:
    leader, other = ShardWriter(tmp_path, plan), ShardWriter(tmp_path, plan)
    other.names_shards = False
    for number, tensor in enumerate(plan.tensors):
        (leader, other)[number % 2].put(tensor.name, content(tensor.name, tensor.nbytes))
    assert leader.finish_blocks(plan.blocks) == [shard.file for shard in plan.shards]
    assert (other.finish_blocks(plan.blocks), open_shards(tmp_path)) == ([], [])


def open_shards(out: Path) -> list[str]:
    """Files of OUT that this process has open."""
    links = [os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.exists()]
    return [link for link in links if link.startswith(f"{out}/")]
