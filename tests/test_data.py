"""Calibration data: encoding, order, packing, and a named refusal for each bad data set."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from tokenizers import Tokenizer

from dsv4q.data import tokens as data_module
from dsv4q.data.spec import DataSpec
from dsv4q.data.tokens import (
    ASSISTANT,
    BOS,
    EOS,
    USER,
    check_data,
    encode_chat,
    load_calibration,
    load_tokenizer,
)
from dsv4q.errors import DataError
from dsv4q.made_up.words import chat_samples, train_tokenizer

SPEC = DataSpec(dataset="rows.jsonl", samples=6, max_length=64, micro_batch=4, seed=3)


def replace(spec: DataSpec, **changes: Any) -> DataSpec:
    """Another spec, as checked as one that a user writes."""
    return DataSpec(**{**spec.model_dump(), **changes})


ONE = replace(SPEC, samples=1, max_length=4)
CHAT = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "Three of them."}]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_str(train_tokenizer(chat_samples(64), 512))


def write_rows(path: Path, rows: list[object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a good rows.jsonl."""
    write_rows(tmp_path / "rows.jsonl", [{"messages": messages} for messages in chat_samples(40)])
    return tmp_path


def refusal(action: Callable[[], object]) -> DataError:
    with pytest.raises(DataError) as error:
        action()
    return error.value


# Chat encoding


def test_chat_mode_closes_the_thought_at_once() -> None:
    messages = [{"role": "system", "content": "Be brief."}, *CHAT, {"role": "user", "content": "Why?"}]
    assert encode_chat(messages, "chat") == (
        "<｜begin▁of▁sentence｜>Be brief.<｜User｜>How many?<｜Assistant｜></think>Three of them.<｜end▁of▁sentence｜>"
        "<｜User｜>Why?"
    )


def test_thinking_mode_writes_the_thought() -> None:
    messages = [CHAT[0], {**CHAT[1], "reasoning_content": "I count."}]
    assert encode_chat(messages, "thinking") == (
        "<｜begin▁of▁sentence｜><｜User｜>How many?<｜Assistant｜><think>I count.</think>Three of them."
        "<｜end▁of▁sentence｜>"
    )


def test_thinking_mode_without_a_thought_writes_an_empty_one() -> None:
    assert "<｜Assistant｜><think></think>Three of them." in encode_chat(CHAT, "thinking")


def test_chat_mode_leaves_the_thought_out() -> None:
    assert encode_chat([CHAT[0], {**CHAT[1], "reasoning_content": "I count."}], "chat") == encode_chat(CHAT, "chat")


@pytest.mark.parametrize(
    ("messages", "where"),
    [
        ([], "messages"), ("hello", "messages"), (3, "messages"), (["hello"], "messages[0]"),
        ([{"role": "tool", "content": "x"}], "messages[0].role"), ([{"content": "x"}], "messages[0].role"),
        ([CHAT[0], {"role": "assistant", "content": None}], "messages[1].content"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content"),
        ([{**CHAT[1], "reasoning_content": 3}], "messages[0].reasoning_content"),
    ],
)  # fmt: skip
def test_messages_of_wrong_form_are_refused_by_place(messages: object, where: str) -> None:
    assert refusal(lambda: encode_chat(messages, "chat")).where == where


def test_unknown_chat_mode_is_refused() -> None:
    assert "think" in str(refusal(lambda: encode_chat(CHAT, "think")))


# DataSpec


@pytest.mark.parametrize(
    ("key", "value"), [("samples", 0), ("max_length", 0), ("micro_batch", -1), ("chat_mode", "x"), ("colour", "blue")]
)
def test_impossible_spec_is_refused_by_key(key: str, value: object) -> None:
    with pytest.raises(ValidationError) as caught:
        replace(SPEC, **{key: value})
    assert [error["loc"] for error in caught.value.errors()] == [(key,)]


def test_a_negative_seed_is_refused_by_key() -> None:
    assert refusal(lambda: replace(SPEC, seed=-1)).where == "calibration.seed"


def test_a_spec_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        SPEC.samples = 7  # type: ignore[misc]


# Packing, order, digest


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(st.text("ab é\n", min_size=1, max_size=30).filter(str.strip), min_size=1, max_size=12),
    samples=st.integers(1, 5),
    length=st.integers(1, 24),
    micro=st.integers(1, 4),
    seed=st.integers(0, 9),
)
def test_packing_follows_its_definition(
    tokenizer: Tokenizer,
    tmp_path_factory: pytest.TempPathFactory,
    texts: list[str],
    samples: int,
    length: int,
    micro: int,
    seed: int,
) -> None:
    path = write_rows(tmp_path_factory.getbasetemp() / "packing.jsonl", [{"text": text} for text in texts])
    spec = DataSpec(dataset=str(path), samples=samples, max_length=length, micro_batch=micro, seed=seed)
    pending = [
        tokenizer.encode(f"{BOS}{texts[i]}{EOS}", add_special_tokens=False).ids
        for i in data_module._shuffled(len(texts), seed)
    ]
    expected: list[list[int]] = []
    while pending and len(expected) < samples:
        sample: list[int] = []
        while pending and len(sample) < length:
            sample += pending.pop(0)
        expected += [sample[:length]] if len(sample) >= length else []
    if len(expected) < samples:
        assert "too short" in refusal(lambda: load_calibration(spec, tokenizer)).what
        return
    loaded = load_calibration(spec, tokenizer)
    assert torch.cat(loaded.batches).tolist() == expected
    assert [len(batch) for batch in loaded.batches[:-1]] == [micro] * (len(loaded.batches) - 1)
    assert loaded.conversations_used == len(texts) - len(pending)


def test_batches_are_rectangular_and_exact(folder: Path, tokenizer: Tokenizer) -> None:
    loaded = load_calibration(SPEC, tokenizer, folder)
    assert [tuple(batch.shape) for batch in loaded.batches] == [(4, 64), (2, 64)]
    assert {batch.dtype for batch in loaded.batches} == {torch.int64}
    assert loaded.tokens == 6 * 64 == SPEC.tokens
    assert str(folder / "rows.jsonl") in loaded.source


def test_every_sample_begins_with_a_conversation(folder: Path, tokenizer: Tokenizer) -> None:
    loaded = load_calibration(SPEC, tokenizer, folder)
    assert {int(sample[0]) for batch in loaded.batches for sample in batch} == {tokenizer.token_to_id(BOS)}


def test_micro_batch_changes_no_sample(folder: Path, tokenizer: Tokenizer) -> None:
    one = load_calibration(replace(SPEC, micro_batch=1), tokenizer, folder)
    six = load_calibration(replace(SPEC, micro_batch=6), tokenizer, folder)
    assert torch.equal(torch.cat(one.batches), six.batches[0])


def test_digest_is_over_shapes_and_ids(folder: Path, tokenizer: Tokenizer) -> None:
    loaded = load_calibration(SPEC, tokenizer, folder)
    expected = hashlib.sha256()
    for batch in loaded.batches:
        expected.update(f"{batch.shape[0]}x{batch.shape[1]}:".encode() + batch.numpy().astype("<i8").tobytes())
    assert loaded.digest == expected.hexdigest()


def test_same_spec_gives_the_same_digest(folder: Path, tokenizer: Tokenizer) -> None:
    assert load_calibration(SPEC, tokenizer, folder).digest == load_calibration(SPEC, tokenizer, folder).digest


@pytest.mark.parametrize("change", [{"seed": 4}, {"micro_batch": 3}, {"max_length": 63}, {"chat_mode": "thinking"}])
def test_any_change_of_the_spec_changes_the_digest(
    folder: Path, tokenizer: Tokenizer, change: dict[str, object]
) -> None:
    other = load_calibration(replace(SPEC, **change), tokenizer, folder)
    assert other.digest != load_calibration(SPEC, tokenizer, folder).digest


def test_shuffle_order_is_frozen() -> None:
    assert list(data_module._shuffled(8, 0)) == [6, 0, 4, 2, 1, 3, 7, 5]
    assert list(data_module._shuffled(8, 1)) == [1, 6, 0, 4, 5, 2, 7, 3]


@given(count=st.integers(0, 200), seed=st.integers(0, 2**32))
def test_shuffle_is_a_permutation(count: int, seed: int) -> None:
    assert sorted(data_module._shuffled(count, seed)) == list(range(count))


def test_truncation_and_padding_settings_of_the_tokenizer_file_have_no_effect(
    folder: Path, tokenizer: Tokenizer
) -> None:
    narrow = Tokenizer.from_str(tokenizer.to_str())
    narrow.enable_truncation(3)
    narrow.enable_padding(length=99)
    narrow.save(str(folder / "tokenizer.json"))
    loaded = load_calibration(SPEC, load_tokenizer(folder), folder)
    assert loaded.digest == load_calibration(SPEC, tokenizer, folder).digest


# Where rows come from


def test_messages_win_over_text_and_prompt(folder: Path, tokenizer: Tokenizer) -> None:
    row = {"prompt": "no", "text": "no", "messages": CHAT}
    write_rows(folder / "rows.jsonl", [row])
    loaded = load_calibration(ONE, tokenizer, folder)
    assert loaded.batches[0][0].tolist() == tokenizer.encode(encode_chat(CHAT, "chat")).ids[:4]


def test_blank_lines_and_blank_texts_are_passed_over(folder: Path, tokenizer: Tokenizer) -> None:
    blank = [{"messages": []}, {"messages": None}, {"messages": [{"role": "user", "content": " "}]}]
    rows = "\n".join(map(json.dumps, blank))
    (folder / "rows.jsonl").write_text(f'\n{{"text": "  "}}\r\n\n{{"text": "a b c d"}}\n\n{rows}\n{{"text": ""}}\n')
    check_data(ONE, folder)
    assert load_calibration(ONE, tokenizer, folder).conversations_used == 1


def test_last_line_without_newline_and_a_byte_order_mark_are_read(folder: Path, tokenizer: Tokenizer) -> None:
    (folder / "rows.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a b c d"}\n{"text": "a b c d"}')
    assert load_calibration(replace(ONE, samples=2), tokenizer, folder).conversations_used == 2


def parquet(folder: Path, rows: list[dict[str, object]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for part, start in enumerate(range(0, len(rows), 15)):
        file = folder / f"data/train_sft-{part:05d}-of-00003.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows[start : start + 15]), file, row_group_size=4)


def saved(folder: Path, rows: list[dict[str, object]]) -> None:
    from datasets import Dataset, DatasetDict

    table = Dataset.from_list(rows)
    DatasetDict({"train_sft": table, "test_sft": table.select([0])}).save_to_disk(str(folder))


def json_list(folder: Path, rows: list[dict[str, object]]) -> None:
    folder.mkdir()
    (folder / "train_sft.json").write_text(json.dumps(rows, indent=1))


def json_lines(folder: Path, rows: list[dict[str, object]]) -> None:
    write_rows(folder / "train_sft/a.jsonl", rows[:7])
    write_rows(folder / "train_sft/b.jsonl", rows[7:])
    write_rows(folder / "test_sft/a.jsonl", rows[:1])


@pytest.mark.parametrize("form", [parquet, saved, json_list, json_lines])
def test_every_form_of_folder_gives_the_tokens_of_the_jsonl_file(
    folder: Path, tokenizer: Tokenizer, form: Callable[[Path, list[dict[str, object]]], None]
) -> None:
    form(folder / "set", [{"messages": messages} for messages in chat_samples(40)])
    spec = replace(SPEC, dataset="set", split="train_sft")
    check_data(spec, folder)
    assert load_calibration(spec, tokenizer, folder).digest == load_calibration(SPEC, tokenizer, folder).digest


@pytest.mark.parametrize("form", [parquet, saved, json_list, json_lines])
def test_missing_split_is_refused_with_the_names_of_those_there(
    tmp_path: Path, tokenizer: Tokenizer, form: Callable[[Path, list[dict[str, object]]], None]
) -> None:
    form(tmp_path / "set", [{"messages": CHAT}] * 9)
    spec = replace(ONE, dataset="set", split="train")
    for action in (lambda: check_data(spec, tmp_path), lambda: load_calibration(spec, tokenizer, tmp_path)):
        error = refusal(action)
        assert "no such split" in error.what and "train_sft" in str(error.found)


def test_saved_data_of_several_splits_needs_a_choice(tmp_path: Path, tokenizer: Tokenizer) -> None:
    saved(tmp_path / "set", [{"messages": CHAT}])
    for action in (check_data, lambda spec, base: load_calibration(spec, tokenizer, base)):
        error = refusal(lambda act=action: act(replace(ONE, dataset="set"), tmp_path))
        assert error.found == "train_sft, test_sft"


def test_saved_single_table_needs_no_split(tmp_path: Path, tokenizer: Tokenizer) -> None:
    from datasets import Dataset

    Dataset.from_list([{"text": "a b c d"}]).save_to_disk(str(tmp_path / "set"))
    check_data(replace(ONE, dataset="set"), tmp_path)
    assert load_calibration(replace(ONE, dataset="set"), tokenizer, tmp_path).conversations_used == 1


def test_relative_path_starts_at_the_current_folder_without_a_base(
    folder: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    assert load_calibration(SPEC, tokenizer).digest == load_calibration(SPEC, tokenizer, folder).digest


def test_split_of_a_file_has_no_effect_and_the_source_says_so(folder: Path, tokenizer: Tokenizer) -> None:
    loaded = load_calibration(replace(SPEC, split="train_sft"), tokenizer, folder)
    assert loaded.digest == load_calibration(SPEC, tokenizer, folder).digest
    assert "train_sft has no effect" in loaded.source


def test_hub_id_is_only_checked_for_its_form(tmp_path: Path) -> None:
    check_data(replace(SPEC, dataset="HuggingFaceH4/ultrachat_200k"), tmp_path)
    assert "no such data set" in refusal(lambda: check_data(replace(SPEC, dataset="a/b/c"), tmp_path)).what


def test_hub_without_network_is_refused_with_a_way_out(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    spec = replace(SPEC, dataset="nobody-at-all/no-such-set", split="train")
    error = refusal(lambda: load_calibration(spec, tokenizer, tmp_path))
    assert "nobody-at-all/no-such-set" in str(error.where) and "download" in str(error.hint)


# Bad data: refused early by check_data, and by load_calibration too


@pytest.mark.parametrize(
    ("raw", "what", "detail"),
    [
        (b"", "empty", "rows.jsonl"),
        (b"\n \n", "empty", "rows.jsonl"),
        (b'\n{"text": }\n', "not valid JSON", "line 2"),
        (b'{"text": "\xff"}\n', "not UTF-8", "line 1"),
        ('{"text": "é"}\n'.encode("utf-16"), "not UTF-8", "line 1"),
        (b'"text"\n', "not an object", "line 1"),
        (b'{"prompt": "a", "chosen": "b"}\n', "no column", "prompt, chosen"),
        (b"{}\n", "no column", "no column"),
        (b'{"text": 3}\n', "no text", "line 1: text"),
        (b'{"messages": {"role": "user"}}\n', "not a conversation", "line 1: messages"),
        (b'{"messages": [{"role": "robot", "content": "x"}]}\n', "unknown role", "line 1: messages[0].role"),
        (b'{"text": "\\ud800 half"}\n', "surrogate", "line 1"),
        (b"[" * 100000 + b"\n", "not valid JSON", "line 1"),
    ],
)
def test_bad_jsonl_is_refused_by_place(
    tmp_path: Path, tokenizer: Tokenizer, raw: bytes, what: str, detail: str
) -> None:
    (tmp_path / "rows.jsonl").write_bytes(raw)
    for action in (lambda: check_data(ONE, tmp_path), lambda: load_calibration(ONE, tokenizer, tmp_path)):
        error = refusal(action)
        assert what in error.what
        assert detail in str(error)


def test_bad_row_far_inside_is_named_by_its_line(folder: Path, tokenizer: Tokenizer) -> None:
    rows = [{"text": "short"}] * 30 + [{"text": None}]
    write_rows(folder / "rows.jsonl", rows)
    assert "line 31: text" in str(refusal(lambda: load_calibration(replace(ONE, samples=200), tokenizer, folder)))


def test_bad_row_of_a_parquet_file_is_named_by_its_number(tmp_path: Path, tokenizer: Tokenizer) -> None:
    parquet(tmp_path / "set", [{"messages": CHAT}] * 17 + [{"messages": [{"role": "robot", "content": "x"}]}])
    error = refusal(lambda: load_calibration(replace(ONE, dataset="set", samples=99), tokenizer, tmp_path))
    assert "00001-of-00003.parquet, row 2 from 0: messages[0].role" in str(error)


def test_too_short_data_is_refused_with_both_amounts(folder: Path, tokenizer: Tokenizer) -> None:
    write_rows(folder / "rows.jsonl", [{"messages": CHAT}] * 3)
    error = refusal(lambda: load_calibration(SPEC, tokenizer, folder))
    assert "6 samples of 64 tokens = 384 tokens" in str(error.expected)
    tokens = 3 * len(tokenizer.encode(encode_chat(CHAT, "chat")).ids)
    assert f"0 full samples, {tokens} tokens from 3 conversations" in str(error.found)


@pytest.mark.parametrize("name", ["none.jsonl", "./none", "/none/at/all", "none/", "", "a b", "~nobody-here/x"])
def test_absent_path_is_refused(tmp_path: Path, tokenizer: Tokenizer, name: str) -> None:
    spec = replace(SPEC, dataset=name)
    assert isinstance(refusal(lambda: check_data(spec, tmp_path)), DataError)
    assert isinstance(refusal(lambda: load_calibration(spec, tokenizer, tmp_path)), DataError)


def test_file_of_another_type_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("text\nhello\n")
    assert refusal(lambda: check_data(replace(SPEC, dataset="rows.csv"), tmp_path)).found == ".csv"


def test_folder_without_data_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    assert "no data file" in refusal(lambda: check_data(replace(SPEC, dataset="set"), tmp_path)).what


@pytest.mark.parametrize("form", [parquet, saved, json_list, json_lines])
def test_missing_column_of_a_folder_is_refused_with_the_columns_there(
    tmp_path: Path, tokenizer: Tokenizer, form: Callable[[Path, list[dict[str, object]]], None]
) -> None:
    form(tmp_path / "set", [{"prompt": "a", "chosen": "b"}] * 9)
    spec = replace(ONE, dataset="set", split="train_sft")
    for action in (lambda: check_data(spec, tmp_path), lambda: load_calibration(spec, tokenizer, tmp_path)):
        error = refusal(action)
        assert "no column" in error.what and error.found == "prompt, chosen"


def test_damaged_parquet_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 and no more")
    assert "cannot be read" in refusal(lambda: check_data(replace(ONE, dataset="rows.parquet"), tmp_path)).what


def test_parquet_file_without_rows_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "rows.parquet")
    spec = replace(ONE, dataset="rows.parquet")
    assert "empty" in refusal(lambda: check_data(spec, tmp_path)).what
    assert "empty" in refusal(lambda: load_calibration(spec, tokenizer, tmp_path)).what


def test_damaged_saved_data_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    saved(tmp_path / "set", [{"messages": CHAT}])
    arrow = next((tmp_path / "set" / "train_sft").glob("*.arrow"))
    arrow.write_bytes(arrow.read_bytes()[:40])
    spec = replace(ONE, dataset="set", split="train_sft")
    assert "cannot be read" in refusal(lambda: load_calibration(spec, tokenizer, tmp_path)).what


def test_token_id_outside_the_vocabulary_is_refused_with_both_numbers(folder: Path, tokenizer: Tokenizer) -> None:
    highest = max(int(batch.max()) for batch in load_calibration(SPEC, tokenizer, folder).batches)
    load_calibration(SPEC, tokenizer, folder, vocab_size=highest + 1)
    error = refusal(lambda: load_calibration(SPEC, tokenizer, folder, vocab_size=highest))
    assert str(highest) in str(error.expected) and str(highest) in str(error.found)


# Tokenizer


def test_absent_tokenizer_is_refused(tmp_path: Path) -> None:
    assert "has no tokenizer" in refusal(lambda: load_tokenizer(tmp_path)).what


@pytest.mark.parametrize("raw", [b"", b"not json", b"{}", b'{"model": 3}', b"\xff\xfe"])
def test_broken_tokenizer_is_refused(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(raw)
    assert "okenizer" in refusal(lambda: load_tokenizer(tmp_path)).what


@pytest.mark.parametrize("token", [USER, ASSISTANT, "<think>", EOS])
def test_tokenizer_without_a_chat_token_is_refused_by_name(tmp_path: Path, tokenizer: Tokenizer, token: str) -> None:
    text = tokenizer.to_str().replace(json.dumps(token, ensure_ascii=False), '"<other>"')
    (tmp_path / "tokenizer.json").write_text(text, encoding="utf-8")
    assert refusal(lambda: load_tokenizer(tmp_path)).expected == token


def test_importing_data_imports_no_heavy_library() -> None:
    heavy = ("torch", "transformers", "datasets", "pyarrow")
    code = f"import sys, dsv4q.data.tokens; print([m for m in {heavy} if m in sys.modules])"
    source = Path(data_module.__file__).parents[2]
    run = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(source)}, capture_output=True, text=True
    )
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize("form", [parquet, saved, json_lines])
def test_early_check_imports_neither_torch_nor_datasets(
    tmp_path: Path, form: Callable[[Path, list[dict[str, object]]], None]
) -> None:
    form(tmp_path / "set", [{"messages": CHAT}] * 9)
    code = (
        "import sys; from pathlib import Path; from dsv4q.data.spec import DataSpec;"
        "from dsv4q.data.tokens import check_data;"
        "check_data(DataSpec(dataset='set', split='train_sft'), Path(sys.argv[1]));"
        "print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(data_module.__file__).parents[2])}
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment, capture_output=True, text=True)
    assert run.stdout.strip() == "[]", run.stderr
