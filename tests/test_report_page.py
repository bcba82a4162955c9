"""The report as a page: complete, whole, harmless, legible; and what it does where something is missing."""

from __future__ import annotations

import base64
import copy
import html
import json
import re
import shutil
import struct
import subprocess
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from dsv4q import evaluate
from dsv4q.errors import OutputError, SourceError
from dsv4q.quantize import Job as Run
from dsv4q.report.page import write
from dsv4q.report.page.charts import names_axis
from dsv4q.report.page.heatmap import NOTHING, png, scale
from dsv4q.report.page.inputs import EVALUATION_FORMAT, Inputs, block_of, read_inputs
from dsv4q.report.page.page import build_page
from dsv4q.report.page.record import Gap, Record
from dsv4q.report.page.timing import on_disk_after
from dsv4q.report.page.wording import percent
from dsv4q.report.page.write import PAGE, PageRequest, write_report
from dsv4q.verify.judge import verify
from runs import run, toy_job
from test_cli import cli

CSS = (Path(write.__file__).parent / "page.css").read_text()
LIGHT, DARK = (
    dict(re.findall(r"--(\w+): (#[0-9a-f]{6});", colours)) for colours in re.findall(r":root {(.*?)}", CSS, re.S)
)

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)


@dataclass
class Page(HTMLParser):
    """A page as a strict reader sees it."""

    text: str
    open: list[str] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    words: list[str] = field(default_factory=list)
    attributes: list[tuple[str, str, str]] = field(default_factory=list)
    """Tag, name and value."""

    def __post_init__(self) -> None:
        super().__init__()
        self.feed(self.text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def shown(self) -> str:
        return "\n".join(self.words)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    job = toy_job(tmp_path_factory.mktemp("page"))
    run(job)
    return job


@pytest.fixture
def artifact(finished: Run, tmp_path: Path) -> Path:
    """A copy of the artifact."""
    return Path(shutil.copytree(finished.out, tmp_path / "artifact"))


@pytest.fixture
def report(finished: Run) -> dict[str, Any]:
    return json.loads((finished.out / "report.json").read_text())


def page_of(report: dict[str, Any], **others: Any) -> Page:
    return Page(build_page(inputs_of(report, **others))[0])


def inputs_of(report: Any, **others: Any) -> Inputs:
    judged = {
        "difference_count": 0,
        "checks": {},
        "tensors": 1,
        "mtp_tensors": 0,
        "shards": 1,
        "bytes": 1,
        "seconds": 0.1,
    }
    judged |= {"differences": [], "errors": {}}
    given: dict[str, Any] = {
        "checked": Record(judged, "verification"),
        "config": Record({"num_hash_layers": 2}, "config.json"),
        "shards": Gap("no headers"),
    }
    return Inputs("toy", Record(report, "report.json"), **(given | others))


# ------------------------------------------------------------------------------------------------ of a run


def test_a_run_leaves_a_page_that_says_it_verified(finished: Run) -> None:
    page = Page((finished.out / PAGE).read_text())
    assert "As it must be: no difference." in page.shown and "Not shown" not in page.shown
    assert (finished.out / PAGE).stat().st_mode & 0o777 == 0o644


def test_the_same_command_makes_a_page_that_was_lost_and_leaves_one_that_is_there(
    finished: Run, tmp_path: Path
) -> None:
    page = finished.out / PAGE
    before = page.stat().st_mtime_ns
    run(finished)
    assert page.stat().st_mtime_ns == before
    page.unlink()
    run(finished)
    assert "no difference" in page.read_text()


def test_a_page_that_a_crash_tore_is_written_again(artifact: Path, finished: Run) -> None:
    page = artifact / PAGE
    page.rename(artifact / f"{PAGE}.partial")
    run(replace(finished, out=artifact))
    assert "no difference" in page.read_text() and not (artifact / f"{PAGE}.partial").exists()


def test_an_artifact_with_a_page_still_verifies(finished: Run) -> None:
    assert verify(finished.out, source=finished.source, deep=True, progress=None).ok


def test_every_block_of_a_run_has_a_sample_of_memory(report: dict[str, Any]) -> None:
    assert all(10e6 < block["memory"]["host"] < 1e12 for block in report["blocks"])


# ------------------------------------------------------------------------------------------------ whole and harmless


def test_every_tag_is_closed_and_every_id_is_there_once(finished: Run) -> None:
    page = Page((finished.out / PAGE).read_text())
    assert page.open == []
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids)) > 10
    assert {value for tag, name, value in page.attributes if (tag, name) == ("a", "href")} <= {f"#{i}" for i in ids}


def test_nothing_is_loaded_and_nothing_runs(finished: Run) -> None:
    text = (finished.out / PAGE).read_text()
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "object", "embed", "form"} & set(page.tags)
    addresses = [value for _, name, value in page.attributes if name in ("href", "src", "xlink:href", "action")]
    assert all(value.startswith(("#", "data:image/png;base64,")) for value in addresses)
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style and "@import" not in style and "http" not in style


def test_text_of_the_report_is_escaped_everywhere(report: dict[str, Any]) -> None:
    evil = "<script>alert('1')</script>\"'&\x1b"
    report["source"]["path"] = report["calibration"]["source"] = report["identity"]["versions"]["torch"] = evil
    report["identity"]["config"][evil] = evil
    report["errors"] = {evil: report["errors"]["routed expert"]}
    for block in report["blocks"]:
        block["errors"] = {evil: next(iter(block.get("errors", report["errors"]).values()))}
    text, _ = build_page(inputs_of(report))
    assert "<script" not in text and "\x1b" not in text and text.count("&lt;script&gt;") > 4
    assert Page(text).open == []


def test_attributes_cannot_be_left(report: dict[str, Any]) -> None:
    evil = '"><i>'
    report["errors"] = {evil: report["errors"]["routed expert"]}
    page = page_of(report)
    assert any(name == "aria-label" and evil in value for _, name, value in page.attributes) and "i" not in page.tags


# ------------------------------------------------------------------------------------------------ what it shows


def test_every_block_and_its_numbers_are_on_the_page(finished: Run, report: dict[str, Any]) -> None:
    shown = Page((finished.out / PAGE).read_text()).shown
    for block in report["blocks"]:
        assert block["block"] in shown
        for name, value in block["seconds"].items():
            assert f"{value:,.2f}" in shown, name
        for found in block.get("errors", {}).values():
            assert percent(found["relative_error"]) in shown and percent(found["worst"]) in shown
        for amax in block.get("input_amax", {}).values():
            assert f"{amax['used']:.4g}" in shown and f"{amax['bound']:.4g}" in shown
        counts = block.get("tokens_per_expert", [0])
        assert f"{min(counts):,}" in shown and f"{max(counts):,}" in shown


def test_the_summary_has_counts_sizes_and_origin(finished: Run, report: dict[str, Any]) -> None:
    shown = Page((finished.out / PAGE).read_text()).shown
    for expected in (
        f"{report['artifact']['tensors']:,}", "9.00 MB", "from 14.78 MB", "25 linears as attention",
        report["source"]["path"], "1,024 tokens", report["identity"]["versions"]["llmcompressor"],
    ):  # fmt: skip
        assert expected in shown


def test_the_shard_map_has_each_shard_and_the_bytes_of_each_block_in_it(finished: Run, report: dict[str, Any]) -> None:
    shown = Page((finished.out / PAGE).read_text()).shown
    found = read_inputs(finished.out, None).shards
    assert isinstance(found, dict) and list(found) == [shard["file"] for shard in report["artifact"]["shards"]]
    assert sum(n for blocks in found.values() for n in blocks.values()) == report["artifact"]["bytes"]
    for shard in report["artifact"]["shards"]:
        assert set(found[shard["file"]]) == set(shard["blocks"])
        assert all(f"{n:,}" in shown for n in found[shard["file"]].values())


@pytest.mark.parametrize(
    ("tensor", "block"),
    [("embed.weight", "embed"), ("layers.12.attn.wkv.weight", "layers.12"), ("norm.weight", "head"),
     ("hc_head_fn", "head"), ("mtp.0.emb.tok_emb.weight", "mtp.0")],
)  # fmt: skip
def test_tensors_belong_to_these_blocks(tensor: str, block: str) -> None:
    assert block_of(tensor) == block


def test_weights_without_error_are_said_to_be_exact_and_have_no_chart(report: dict[str, Any]) -> None:
    for errors in (report["errors"], *(block.get("errors", {}) for block in report["blocks"])):
        for found in errors.values():
            found |= {"exact": found["tensors"], "relative_error": 0.0, "worst": 0.0, "sqnr_db": None}
    page = page_of(report)
    assert "All 145 quantized linears are stored without any error" in page.shown
    assert "Relative error over all layers" not in page.shown


def test_the_stages_of_a_quantized_draft_are_in_the_chart_and_the_tables_of_errors(report: dict[str, Any]) -> None:
    (first,) = (block for block in report["blocks"] if block["block"] == "layers.0")
    kept = [block for block in report["blocks"] if not block["block"].startswith(("layers.", "mtp."))]
    stored = {"tensors": 3, "exact": 0, "relative_error": 0.07, "worst": 0.5}
    wrong = {"relative_error": 0.5, "exact_fraction": 0.1, "max_abs_error": 0.2}
    stages = [
        {**first, "block": f"mtp.{i}", "errors": {"mtp: routed expert": stored}, "tensors": {f"mtp.{i}.w1": wrong}}
        for i in range(3)
    ]
    report["blocks"] = [*({**first, "block": f"layers.{i}"} for i in range(5)), *kept, *stages]
    page = page_of(report)
    assert any("mtp.2: mtp: routed expert 7.00 %, worst 50.00 %" in word for word in page.words)
    assert "mtp.1.w1" in page.words


def test_a_long_axis_names_every_tenth_layer_and_where_the_draft_begins() -> None:
    names = [*map(str, range(43)), "mtp.0", "mtp.1", "mtp.2"]
    assert [name for _, name in names_axis(names, "layer").ticks] == ["0", "10", "20", "30", "40", "mtp.0"]


def test_hash_layers_are_marked_and_named(report: dict[str, Any]) -> None:
    page = page_of(report)
    assert page.shown.count("\nhash\n") == 3  # beside the map, and two rows of the table
    assert any("layers.1, routing by hash:" in word for word in page.words)
    assert any("layers.2, routing by score:" in word for word in page.words)


def test_without_config_json_the_page_says_that_it_cannot_tell_hash_layers(report: dict[str, Any]) -> None:
    page = page_of(report, config=Gap("config.json is missing"))
    assert "which layers route by hash" in page.shown and "routing by unknown" in page.shown


def test_experts_without_tokens_are_counted_named_and_coloured(report: dict[str, Any]) -> None:
    layer = next(block for block in report["blocks"] if block["block"] == "layers.3")
    layer["tokens_per_expert"][5] = layer["tokens_per_expert"][7] = 0
    page = page_of(report)
    assert "2 of 40 experts got no token" in page.shown and "5, 7" in page.shown
    (address,) = [value for tag, _, value in page.attributes if tag == "image" and value.startswith("data:")]
    assert pixels(address)[3][5] == pixels(address)[3][7] == NOTHING


def pixels(address: str) -> list[list[tuple[int, int, int]]]:
    """A palette PNG as a reader of the format would decode it."""
    data, chunks, at = base64.b64decode(address.partition(",")[2]), {}, 8
    while at < len(data):
        length, kind = struct.unpack(">I4s", data[at : at + 8])
        chunks[kind] = data[at + 8 : at + 8 + length]
        assert struct.unpack(">I", data[at + 8 + length : at + 12 + length])[0] == zlib.crc32(kind + chunks[kind])
        at += 12 + length
    width, height, *form = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    assert form == [8, 3, 0, 0, 0]
    raw, palette = zlib.decompress(chunks[b"IDAT"]), list(struct.iter_unpack("BBB", chunks[b"PLTE"]))
    lines = [raw[i * (width + 1) + 1 : (i + 1) * (width + 1)] for i in range(height)]
    return [[palette[index] for index in line] for line in lines]


def test_a_heat_map_of_the_full_size_is_small_and_right() -> None:
    cells = [[(layer * 7 + expert) % 65 for expert in range(256)] for layer in range(43)]
    address = png(cells)
    assert len(address) < 20_000
    assert pixels(address) == [[(NOTHING, *scale(64))[value] for value in row] for row in cells]


def test_a_page_of_the_full_size_is_below_a_megabyte(report: dict[str, Any]) -> None:
    layer = next(block for block in report["blocks"] if block["block"] == "layers.3")
    layer["tokens_per_expert"] = [n * 37 % 1999 for n in range(256)]
    layer["tensors"] = {
        f"layers.3.ffn.experts.{e}.w1.weight": next(iter(layer["tensors"].values())) for e in range(768)
    }
    report["blocks"] = [copy.deepcopy(layer) | {"block": f"layers.{number}"} for number in range(43)]
    text, gaps = build_page(inputs_of(report))
    assert gaps == [] and all(f"layers.{number}: " in text for number in range(43))
    assert len(text.encode()) < 400_000


def test_several_ranks_have_a_table_and_one_has_none(report: dict[str, Any]) -> None:
    assert "What each of" not in page_of(report).shown
    report["ranks"] = [report["ranks"][0] | {"rank": rank} for rank in range(3)]
    assert "What each of 3 ranks did" in page_of(report).shown


def test_a_resumed_run_goes_on_from_where_its_clock_was() -> None:
    times = [("embed", {"done_at": 2.0}), ("layers.0", {"done_at": 5.0}), ("layers.1", {"done_at": 1.5})]
    assert on_disk_after(times) == [2.0, 5.0, 6.5]


def test_blocks_of_an_older_run_without_a_clock_have_times_but_no_memory_over_time(report: dict[str, Any]) -> None:
    for block in report["blocks"]:
        del block["seconds"]["done_at"], block["memory"]
    text, gaps = build_page(inputs_of(report))
    assert gaps == ["report.json has no samples of memory over time (blocks[].memory)"]
    assert "for the slowest block" in text and "from the block before" not in text


# ------------------------------------------------------------------------------------------------ other files


def estimate(value: float | None) -> dict[str, float | None]:
    return {"value": value, "low": value, "high": value}


def answers(share: float) -> dict[str, Any]:
    two = {name: estimate(share) for name in ("acceptance", "position_1", "position_2")}
    return {"k_1": {"acceptance": estimate(share)}, "k_2": two | {"mean_accepted_length": estimate(2.125)}}


def evaluation() -> dict[str, Any]:
    pairs = [
        {"main": main, "draft": draft, "step_1": estimate(0.8125), "step_2": estimate(None),
         "tokens_per_step": estimate(2.25)}
        for main in ("reference", "artifact") for draft in ("reference", "artifact")
    ]  # fmt: skip
    changes = {"artifact as a whole": {"step_1": estimate(-0.0123), "step_2": estimate(None)}}
    return {
        "format": 1,
        "reference": {"path": "src", "form": "bf16"}, "artifact": {"path": "out", "form": "nvfp4-pack-quantized"},
        "data": {"source": "held.txt", "samples": 4, "length": 64}, "intervals": "95 %, bootstrap",
        "perplexity": {"reference": estimate(5.25), "artifact": estimate(5.5), "ratio": estimate(1.0476)},
        "kl_divergence": estimate(0.0441), "top1_agreement": estimate(0.9375),
        "residual": [{"block": "embed", "relative_error": 0.0}, {"block": "layers.0", "relative_error": 0.109}],
        "acceptance": {"pairs": pairs, "differences": changes, "without_draft": {}},
        "activations": "weight-only-nvfp4",
        "answers": {"prompts": [[0, 5], [0, 6]], "reference": answers(0.9725), "artifact": answers(0.9575)},
        "clipping": {"classes": {"routed experts w2": {
            "clipped_values": 0.00125, "clipped_inputs": 0.0475, "largest": 1.375,
        }}},
    }  # fmt: skip


def test_an_evaluation_is_shown_with_its_numbers(artifact: Path) -> None:
    (artifact / "eval.json").write_text(json.dumps(evaluation()))
    made = write_report(PageRequest(artifact))
    shown = Page(made.page.read_text()).shown
    assert made.gaps == []
    for expected in ("5.25", "5.5", "1.0476", "0.0441", "93.75 %", "81.25 %", "−1.23", "none", "2.250", "10.90 %"):
        assert expected in shown, expected
    for expected in ("weight-only-nvfp4", "to 2 prompts", "97.25 %", "95.75 %", "2.125", "4.75 %", "137.50 %"):
        assert expected in shown, expected


def test_an_evaluation_without_answers_and_without_calibrated_scales_has_no_table_of_them(artifact: Path) -> None:
    bare = evaluation() | {"answers": None, "clipping": {"classes": {}}}
    (artifact / "eval.json").write_text(json.dumps(bare))
    made = write_report(PageRequest(artifact))
    shown = Page(made.page.read_text()).shown
    assert made.gaps == [] and "greedy answers" not in shown and "beyond the calibrated range" not in shown


def test_without_an_evaluation_there_is_no_part_for_it(finished: Run) -> None:
    assert "Evaluation" not in Page((finished.out / PAGE).read_text()).shown


@pytest.mark.parametrize("content", ["", "[]", '{"format": 1}', "\xff", "[" * 100_000])
def test_an_evaluation_that_cannot_be_used_is_a_marked_gap(content: str, artifact: Path) -> None:
    (artifact / "eval.json").write_text(content, encoding="latin-1")
    made = write_report(PageRequest(artifact))
    assert made.gaps and all("eval.json" in gap for gap in made.gaps)
    assert "Not shown: " in Page(made.page.read_text()).shown


@pytest.mark.parametrize("version", [0, 2, True, None, "1"])
def test_an_evaluation_of_another_format_is_a_gap_and_nothing_of_it_is_shown(version: Any, artifact: Path) -> None:
    (artifact / "eval.json").write_text(json.dumps(evaluation() | {"format": version}))
    made = write_report(PageRequest(artifact))
    assert made.gaps == [f"eval.json has another format: {json.dumps(version)}, not 1"]
    assert "93.75 %" not in Page(made.page.read_text()).shown


def test_the_page_shows_evaluations_of_the_format_that_is_written() -> None:
    assert EVALUATION_FORMAT == evaluate.FORMAT


def test_a_saved_verification_is_shown_beside_that_of_now(finished: Run, tmp_path: Path) -> None:
    saved = tmp_path / "saved.json"
    saved.write_text(json.dumps(verify(finished.out, source=finished.source, deep=True, progress=None).as_dict()))
    made = write_report(PageRequest(finished.out, tmp_path / "page.html", saved=saved))
    shown = Page(made.page.read_text()).shown
    assert "Saved result:" in shown and "When this page was made:" in shown and "Error against the source" in shown


def test_differences_are_on_the_page_and_in_the_exit_code(artifact: Path) -> None:
    index = json.loads((artifact / "model.safetensors.index.json").read_text())
    del index["weight_map"]["embed.weight"]
    (artifact / "model.safetensors.index.json").write_text(json.dumps(index))
    assert cli("report", artifact).code == 3
    shown = Page((artifact / PAGE).read_text()).shown
    assert "1 difference from what must be there" in shown and "an entry in the index" in shown


def test_reading_every_value_finds_what_headers_do_not_show(artifact: Path) -> None:
    shard = sorted(artifact.glob("*.safetensors"))[1]
    data = bytearray(shard.read_bytes())
    data[len(data) // 2 :] = b"\xff" * (len(data) - len(data) // 2)
    shard.write_bytes(data)
    assert cli("report", artifact).code == 0
    assert cli("report", artifact, "--verify").code == 3


def test_a_report_alone_makes_a_page_with_marked_gaps(finished: Run, tmp_path: Path) -> None:
    (tmp_path / "alone").mkdir()
    shutil.copy(finished.out / "report.json", tmp_path / "alone")
    made = write_report(PageRequest(tmp_path / "alone"))
    assert made.checked is None and len(made.gaps) == 1 and "config.json" in made.gaps[0]
    shown = Page(made.page.read_text()).shown
    assert "8.12 %" in shown and "bytes by block; no shard's header could be read" in shown


# ------------------------------------------------------------------------------------------------ bad input


def test_input_scales_without_what_they_cover_are_a_marked_gap(report: dict[str, Any]) -> None:
    for block in report["blocks"]:
        block.pop("input_amax", None)
    _, gaps = build_page(inputs_of(report))
    assert gaps == ["report.json has input scales, but not what they cover (blocks[].input_amax)"]


def test_what_is_missing_is_named_with_its_place(report: dict[str, Any]) -> None:
    del report["artifact"]["shards"][1]["bytes"], report["blocks"][3]["seconds"]
    _, gaps = build_page(inputs_of(report))
    assert gaps == ["report.json: blocks[3].seconds is missing", "report.json: artifact.shards[1].bytes is missing"]


def test_what_cannot_be_read_is_a_gap_in_its_place_and_the_rest_is_there(report: dict[str, Any]) -> None:
    report["blocks"][3]["seconds"]["read"] = "<b>"
    text, gaps = build_page(inputs_of(report))
    assert gaps == [f"report.json has no {what} that this version can read" for what in ("stage totals", "block times")]
    assert all(gap in Page(text).shown for gap in gaps) and "Memory in use when each block" in Page(text).shown


@pytest.mark.parametrize("key", ["artifact", "source", "errors", "blocks", "seconds", "peak_memory", "identity",
                                 "activations", "coverage"])  # fmt: skip
def test_a_missing_part_is_a_marked_gap_and_the_rest_is_there(key: str, report: dict[str, Any]) -> None:
    del report[key]
    text, gaps = build_page(inputs_of(report))
    page = Page(text)
    assert "not shown: " in page.shown.lower() and f"report.json: {key} is missing" in page.shown
    assert page.tags.count("section") == 10 and len(gaps) < 10


def paths(value: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON value; of longer lists and objects the first and the last."""
    if here:
        yield here
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    for key in keys if len(keys) <= 7 else [keys[0], keys[-1]]:
        yield from paths(value[key], (*here, key))


@pytest.mark.parametrize("junk", [None, -1, 10**400, 1e308, 5e-324, float("nan"), float("inf"), "<b>", [], {}, True])
def test_no_value_of_any_kind_in_any_place_ends_in_a_traceback(junk: Any, report: dict[str, Any]) -> None:
    report["blocks"] = [b for b in report["blocks"] if b["block"] in ("embed", "layers.3")]
    report["identity"]["config"] = {}
    for block in report["blocks"]:
        block["tensors"] = dict(list(block.get("tensors", {}).items())[:2])
    for place in paths(report):
        damaged = copy.deepcopy(report)
        at = damaged
        for key in place[:-1]:
            at = at[key]
        at[place[-1]] = junk
        assert Page(build_page(inputs_of(damaged))[0]).open == []


@pytest.mark.parametrize("junk", [None, -1, float("inf"), "<b>", [], {}, True])
def test_no_value_in_an_evaluation_ends_in_a_traceback(junk: Any, report: dict[str, Any]) -> None:
    report["blocks"] = report["blocks"][:2]
    for place in paths(evaluation()):
        damaged: Any = evaluation()
        at = damaged
        for key in place[:-1]:
            at = at[key]
        at[place[-1]] = junk
        assert Page(build_page(inputs_of(report, evaluation=Record(damaged, "eval.json")))[0]).open == []


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (None, "no report.json here"),
        ("", "cannot be read"),
        ("[1]", "cannot be read"),
        ("\xff\xfe", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ("{}", "another format"),
        ('{"format": 0}', "another format"),
        ('{"format": true}', "another format"),
        ('{"command": "dequantize"}', "another command"),
    ],
)
def test_a_report_that_cannot_be_shown_is_a_named_error(content: str | None, what: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "report.json").write_text(content, encoding="latin-1")
    result = cli("report", tmp_path)
    assert result.code == 1 and what in result.err and str(tmp_path) in result.err
    assert not (tmp_path / PAGE).exists()


def test_only_a_page_of_ours_is_overwritten(artifact: Path) -> None:
    shard = sorted(artifact.glob("*.safetensors"))[0]
    before = shard.read_bytes()
    with pytest.raises(OutputError, match="Something else is there"):
        write_report(PageRequest(artifact, shard))
    assert shard.read_bytes() == before
    assert cli("report", artifact, "-o", artifact / PAGE).code == 0


@pytest.mark.parametrize("out", ["nowhere/page.html", "."])
def test_a_page_needs_a_place(out: str, artifact: Path) -> None:
    result = cli("report", artifact, "-o", artifact / out)
    assert result.code == 1 and result.err.startswith("error: ") and "where:" in result.err


@pytest.mark.parametrize("content", [None, "", "{}", '{"ok": true, "checks": {}, "tensors": 1, "bytes": 2}'])
def test_a_saved_verification_that_is_none_or_of_another_artifact_is_refused(
    content: str | None, artifact: Path, tmp_path: Path
) -> None:
    saved = tmp_path / "saved.json"
    if content is not None:
        saved.write_text(content)
    with pytest.raises(OutputError, match=r"no saved verification|of another artifact"):
        write_report(PageRequest(artifact, saved=saved))


def test_reading_every_value_of_what_is_no_artifact_is_a_named_error(artifact: Path) -> None:
    (artifact / "config.json").unlink()
    with pytest.raises(SourceError, match=r"config\.json"):
        write_report(PageRequest(artifact, deep=True))


def test_json_of_a_page_names_it_and_its_gaps(artifact: Path) -> None:
    (artifact / "eval.json").write_text("{}")
    found = cli("report", artifact, "--json").out
    made = json.loads(found[found.index("{") :])
    assert made["page"] == str(artifact / PAGE) and made["bytes"] == (artifact / PAGE).stat().st_size
    assert made["gaps"] and made["verification"]["ok"]


# ------------------------------------------------------------------------------------------------ legible


def rgb(colour: str) -> tuple[int, int, int]:
    """`#rrggbb` -> R, G, B."""
    r, g, b = bytes.fromhex(colour[1:])
    return r, g, b


def luminance(colour: str) -> float:
    """WCAG 2.2, relative luminance."""
    parts = (value / 255 for value in rgb(colour))
    r, g, b = (v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def contrast(one: str, two: str) -> float:
    low, high = sorted((luminance(one), luminance(two)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("mode", [LIGHT, DARK])
def test_texts_and_drawings_have_the_contrast_that_aa_wants(mode: dict[str, str]) -> None:
    for text in ("text", "soft", "link", "good", "bad", "gap"):
        assert min(contrast(mode[text], mode["bg"]), contrast(mode[text], mode["panel"])) >= 4.5, text
    for series in range(8):
        assert contrast(mode[f"c{series}"], mode["bg"]) >= 3, series


def test_the_colour_of_nothing_is_one() -> None:
    assert ".nothing {{ color: #{:02x}{:02x}{:02x}; }}".format(*NOTHING) in CSS


def test_every_drawing_has_a_text_alternative(finished: Run) -> None:
    text = (finished.out / PAGE).read_text()
    drawings = re.findall(r"<svg[^>]*>", text)
    assert len(drawings) > 15
    assert all('aria-hidden="true"' in d or re.search(r'role="img" aria-label="[^"]+"', d) for d in drawings)


@pytest.fixture(scope="module")
def in_browser(finished: Run, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What headless Chromium measures of the page on a phone, in a frame 360 pixels wide, in dark mode."""
    if CHROMIUM is None:
        pytest.skip("no Chromium on PATH")
    folder = tmp_path_factory.mktemp("browser")
    script = """<script>onload = () => {
      const inner = document.querySelector("iframe").contentDocument, root = inner.documentElement;
      const wide = [...inner.body.querySelectorAll("*")].filter(e => !e.closest(".scroll, pre") &&
        e.getBoundingClientRect().right > 360.5).map(e => e.tagName + "." + e.getAttribute("class"));
      document.title = JSON.stringify({width: root.scrollWidth, client: root.clientWidth, wide,
        back: inner.defaultView.getComputedStyle(inner.body).backgroundColor,
        sections: inner.querySelectorAll("section").length,
        small: Math.min(...[...inner.querySelectorAll("span, td, dd, p")].map(
          e => parseFloat(inner.defaultView.getComputedStyle(e).fontSize)))});
    }</script>"""
    page = html.escape((finished.out / PAGE).read_text())
    frame = f'<iframe srcdoc="{page}" style="width:360px;height:800px;border:0"></iframe>'
    (folder / "frame.html").write_text(f"<!doctype html><meta charset=utf-8><title></title>{script}{frame}")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--blink-settings=preferredColorScheme=0",
               f"--user-data-dir={folder / 'profile'}", "--dump-dom", (folder / "frame.html").as_uri()]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search(r"<title>(.*?)</title>", done.stdout)
    assert found and found[1], done.stderr[-2000:]
    return json.loads(html.unescape(found[1]))


def test_nothing_is_wider_than_a_phone(in_browser: dict[str, Any]) -> None:
    assert in_browser["sections"] == 10
    assert in_browser["width"] == in_browser["client"] <= 360
    assert in_browser["wide"] == []


def test_no_text_is_smaller_than_twelve_pixels(in_browser: dict[str, Any]) -> None:
    assert in_browser["small"] >= 12


def test_dark_mode_is_dark(in_browser: dict[str, Any]) -> None:
    assert in_browser["back"] == f"rgb{rgb(DARK['bg'])}"
