"""What all parts of the page share: blocks of the report, their names, and the mark for what is not there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from dsv4q.report.page.markup import Html, el, join
from dsv4q.report.page.node import Gap, Node

Builder = Callable[[], Sequence[Html]]


@dataclass
class Parts:
    """Collects the parts of a page; one that lacks its data becomes a marked gap."""

    gaps: list[str] = field(default_factory=list)

    def section(self, name: str, title: str, *builders: Builder) -> Html:
        """A headed part; each builder is marked by itself if its data is missing."""
        head = el("h2", {"id": f"{name}-title"}, title)
        inner = dict.fromkeys(map(self.guarded, builders))  # what several builders lack is said once
        return el("section", {"id": name, "aria-labelledby": f"{name}-title"}, head, *inner)

    def guarded(self, builder: Builder) -> Html:
        """What the builder makes, or the mark of a gap."""
        try:
            return join(*builder())
        except Gap as gap:
            if str(gap) not in self.gaps:
                self.gaps.append(str(gap))
            return el("p", {"class": "gap"}, el("b", None, "Not shown: "), f"{gap}.")


def blocks_of(report: Node) -> list[tuple[str, Node]]:
    """Name and record of every block, in the order of the model."""
    return [(block.text("block"), block) for block in report.get("blocks")]


def layers_of(report: Node) -> list[tuple[str, Node]]:
    """The same of the main layers: number and record."""
    return [(name.removeprefix("layers."), block) for name, block in blocks_of(report) if name.startswith("layers.")]


def short_name(block: str) -> str:
    """A layer's number; other blocks by name."""
    return block.removeprefix("layers.")


def counted(differences: int) -> str:
    """`1 difference`, `2 differences`."""
    return f"{differences:,} difference{'' if differences == 1 else 's'}"


def and_list(words: Sequence[str]) -> str:
    """`a, b and c`."""
    return " and ".join(([", ".join(words[:-1])] if len(words) > 1 else []) + list(words[-1:]))
