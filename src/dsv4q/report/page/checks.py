"""What the independent judge says, and what an evaluation found, if there was one."""

from __future__ import annotations

import math

from dsv4q.console import human_bytes, human_seconds
from dsv4q.report.page.charts import Frame, Line, line_chart, linear_axis, names_axis
from dsv4q.report.page.markup import Child, Column, Html, el, facts, join, numbers, percent, short, table
from dsv4q.report.page.node import Gap, Node
from dsv4q.report.page.parts import counted, short_name

SHOWN = 50
"""Differences that the page lists."""


def verification(found: Node | Gap | None, what: str) -> list[Html]:
    """Verdict, counts and differences of one verification."""
    if found is None:
        raise Gap(f"{what}: none was made")
    if isinstance(found, Gap):
        raise Gap(f"{what}: {found}")
    wrong = found.integer("difference_count")
    verdict = el(
        "p", {"class": "bad" if wrong else "good"},
        f"{counted(wrong)} from what must be there." if wrong else "As it must be: no difference.",
    )  # fmt: skip
    text = (
        f"{what}: {found.integer('tensors'):,} tensors, {found.integer('mtp_tensors'):,} of them mtp.*, in "
        f"{found.integer('shards'):,} shards, {human_bytes(found.integer('bytes'))}; took "
        f"{human_seconds(found.seconds('seconds'))}."
    )
    rows: list[list[Child]] = [[name, f"{count.as_number():,.0f}"] for name, count in found.get("checks").items()]
    checks = table("Things looked at", [Column("check", False), Column("items")], rows)
    return [verdict, el("p", None, text), _differences(found, wrong), checks, _judged_errors(found)]


def _differences(found: Node, wrong: int) -> Html:
    listed = list(found.get("differences"))[:SHOWN]
    if not listed:
        return join()
    rows: list[list[Child]] = [
        [one.text("check"), *(_text(one, key) for key in ("tensor", "file", "expected", "found"))] for one in listed
    ]
    columns = [
        Column("check", False),
        *(Column(key, False, wraps=True) for key in ("tensor", "file", "expected", "found")),
    ]
    title = f"The first {len(listed)} of {wrong:,} differences" if wrong > len(listed) else "Differences"
    return table(title, columns, rows)


def _text(node: Node, key: str) -> str:
    return "–" if node.maybe(key) is None else node.text(key)


def _judged_errors(found: Node) -> Html:
    """Errors against the source as the judge computed them from the files."""
    errors = found.get("errors").items()
    if not errors:
        return join()
    rows: list[list[Child]] = [
        [role, f"{one.integer('tensors'):,}", f"{one.integer('exact'):,}", percent(one.number("mean_relative_error")),
         percent(one.number("max_relative_error")), short(one.number("max_abs_error"))]
        for role, one in errors
    ]  # fmt: skip
    columns = [Column("class", False), Column("tensors"), Column("exact"), Column("mean relative error"),
               Column("worst tensor"), Column("largest error of a value")]  # fmt: skip
    return table("Error against the source, from the files", columns, rows)


# ------------------------------------------------------------------------------------------------ evaluation


def evaluation(found: Node) -> list[Html]:
    """Data and quality measures of eval.json, with intervals."""
    data = found.get("data")
    rows: list[tuple[str, Child]] = [
        ("text", f"{data.integer('samples'):,} samples of {data.integer('length'):,} tokens, "
                 f"{data.text('source')}"),
        ("reference", join(el("code", None, found.get("reference").text("path")),
                           f", {found.get('reference').text('form')}")),
        ("artifact", found.get("artifact").text("form")),
        ("intervals", found.text("intervals")),
    ]  # fmt: skip
    perplexity = found.get("perplexity")
    measures = [
        ["perplexity, reference", *_estimate(perplexity.get("reference"))],
        ["perplexity, artifact", *_estimate(perplexity.get("artifact"))],
        ["perplexity, ratio", *_estimate(perplexity.get("ratio"))],
        ["KL divergence, nats per token", *_estimate(found.get("kl_divergence"))],
        ["same most likely token", *_estimate(found.get("top1_agreement"), share=True)],
    ]
    columns = [Column("measure", False), Column("value"), Column("95 % from"), Column("to")]
    return [facts(rows), table("Quality over the text", columns, measures)]


def acceptance(found: Node) -> list[Html]:
    """How often the main model would accept the draft's proposals."""
    pairs = found.get("acceptance")
    rows: list[list[Child]] = [
        [f"{pair.text('main')} / {pair.text('draft')}",
         *(_spread(pair.get(key), share=key != "tokens_per_step") for key in ("step_1", "step_2", "tokens_per_step"))]
        for pair in pairs.get("pairs")
    ]  # fmt: skip
    columns = [Column("main model / draft", False), Column("step 1"), Column("step 2"), Column("tokens per step")]
    shown = [table("Drafts of MTP that the main model accepts, with 95 % intervals", columns, rows)]
    changes: list[list[Child]] = [
        [what, *(_spread(one.get(key), share=True, signed=True) for key in ("step_1", "step_2"))]
        for what, one in pairs.get("differences").items()
    ]
    if changes:
        heads = [Column("change against the reference", False), Column("step 1"), Column("step 2")]
        shown.append(table("Difference in acceptance, paired, in percentage points", heads, changes))
    missing = pairs.maybe("without_draft")
    for side, reason in [] if missing is None else missing.items():
        shown.append(el("p", None, f"MTP draft of the {side}: none ({reason.value})."))
    return shown


def residual(found: Node) -> list[Html]:
    """How far the residual streams drift from the reference's."""
    each = [(one.text("block"), one.number("relative_error")) for one in found.get("residual")]
    if not each or not all(0 <= error < math.inf for _, error in each):
        raise Gap(f"{found.place}: residual is empty or not finite")
    last, error = each[-1]
    title = f"{percent(error)} after {last}"
    frame = Frame(
        f"Error of the residual streams: {title}",
        "Norm of the difference to the reference's streams over their norm, after each block. Per cent.",
        f"Line chart of the relative error of the residual streams by block; {title}. The table below has the values.",
        names_axis([short_name(name) for name, _ in each], "after block"),
        linear_axis(max(error for _, error in each), lambda value: f"{value * 100:.3g} %", "relative error"),
    )
    lines = [Line("artifact against reference", [(i + 0.5, error) for i, (_, error) in enumerate(each)], 0)]
    titles = [(float(i), i + 1.0, f"{name}: {percent(error)}") for i, (name, error) in enumerate(each)]
    rows: list[list[Child]] = [[name, percent(error)] for name, error in each]
    return [line_chart(frame, lines, titles),
            numbers("residual error by block", [Column("block", False), Column("relative error")], rows)]  # fmt: skip


def _estimate(found: Node, *, share: bool = False) -> list[Child]:
    shown = percent if share else _five
    return ["none" if found.maybe(key) is None else shown(found.number(key)) for key in ("value", "low", "high")]


def _five(value: float) -> str:
    return f"{value:,.5g}" if abs(value) < 1e5 else short(value)


def _spread(found: Node, *, share: bool, signed: bool = False) -> Child:
    """`81.20 %` and below it `79.00 to 83.10`."""
    if found.maybe("value") is None:
        return "none"
    factor, digits, sign = (100, 2, "+" if signed else "") if share else (1, 3, "")
    value, *ends = (
        None
        if found.maybe(key) is None
        else f"{found.number(key) * factor:{sign}.{digits}f}".replace("-", "\N{MINUS SIGN}")
        for key in ("value", "low", "high")
    )
    unit = " %" if share and not signed else ""
    interval = None if None in ends else el("small", None, f"{ends[0]} to {ends[1]}")
    return join(f"{value}{unit}", interval)
