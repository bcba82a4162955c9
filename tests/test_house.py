"""The rules of the house, read from the source text: who may import whom, one name for one class, files of a page.

Nothing of dsv4q is imported here. docs/words.md has the rooms and their files.
"""

from __future__ import annotations

import ast
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "dsv4q"
LINES = 400

_GROUND = ("errors", "layout", "host", "console")
_BELOW_PLAN = (*_GROUND, "formats", "model", "data", "recipe", "checkpoint", "config")
_ROOMS = (*_BELOW_PLAN, "plan", "run", "verify", "evaluation", "foreign", "engines", "made_up", "report")
_STORIES = ("quantize", "dequantize", "export", "rehearse", "evaluate", "diff")
ALLOWED: dict[str, tuple[str, ...]] = {
    "errors": (),
    "console": ("errors",),
    "host": ("errors",),
    "layout": ("errors",),
    "formats": ("errors", "layout"),
    "model": ("errors", "layout", "formats"),
    "data": ("errors",),
    "recipe": ("errors", "layout", "formats"),
    "checkpoint": ("errors", "layout", "host", "formats"),
    "config": ("errors", "recipe", "data"),
    "plan": ("errors", "layout", "host", "formats", "recipe", "checkpoint", "config", "engines"),
    "run": (*_BELOW_PLAN, "plan"),
    "verify": ("errors", "layout", "host", "formats", "checkpoint"),
    "evaluation": (*_GROUND, "formats", "model", "data", "checkpoint", "verify"),
    "foreign": ("errors", "layout", "console", "formats", "checkpoint"),
    "engines": ("errors", "layout", "console", "checkpoint", "foreign"),
    "made_up": ("errors", "layout", "formats", "data", "checkpoint"),
    "report": (*_BELOW_PLAN, "engines", "plan", "verify"),
    **dict.fromkeys(_STORIES, _ROOMS),
    "cli": (*_ROOMS, *_STORIES),
    "__main__": ("cli", "console", "errors", "host"),
    "__init__": (),
}
"""Room -> the rooms that it may import from besides itself. A top-level file is a room of its own."""

NEVER = {
    "verify": ("plan", "recipe", "config", "run", "checkpoint.writer", "checkpoint.journal", "checkpoint.output"),
    "checkpoint": ("config",),
    "quantize": ("report.page",),
}
"""Room -> what it must not reach, not even through others."""

HEAVY = {
    "torch", "triton", "numba", "transformers", "llmcompressor", "compressed_tensors", "accelerate", "datasets",
    "tokenizers", "safetensors", "huggingface_hub", "numpy", "pyarrow", "rich", "jinja2", "yaml", "pydantic", "httpx",
}  # fmt: skip
"""Libraries that take so long to import that a function may do it. The only ones."""

RANKS = "run.ranks"
UPSTREAM = "model.upstream"


# ------------------------------------------------------------------------------------------------ reading


@dataclass(frozen=True)
class Import:
    """One name that a module imports."""

    where: str
    """`verify/judge.py:12`."""
    target: str
    """Module of this package, without `dsv4q.`, or `library.name`."""
    is_ours: bool
    is_inside: bool
    """Within a function."""
    is_type_only: bool
    """Under `if TYPE_CHECKING`."""

    @property
    def library(self) -> str:
        return self.target.partition(".")[0]


@dataclass
class Module:
    """One file: what it imports, and which outside names that gives it."""

    name: str
    """Dotted, without `dsv4q.`; the package's own file is `__init__`."""
    path: Path
    tree: ast.Module
    imports: list[Import] = field(default_factory=list)
    foreign_names: set[str] = field(default_factory=set)
    """Local names of what comes from libraries other than Python's own."""


class House:
    """All modules of a package."""

    def __init__(self, source: Path) -> None:
        self.source = source
        paths = {self._name(path): path for path in sorted(source.rglob("*.py"))}
        self.modules = {
            name: Module(name, path, ast.parse(path.read_text(encoding="utf-8"))) for name, path in paths.items()
        }
        for module in self.modules.values():
            self._read(module, module.tree, is_inside=False, is_type_only=False)

    def _name(self, path: Path) -> str:
        parts = path.relative_to(self.source).with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)

    def _read(self, module: Module, node: ast.AST, *, is_inside: bool, is_type_only: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.Import, ast.ImportFrom)):
                self._note(module, child, is_inside, is_type_only)
            is_function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            is_checking = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            self._read(module, child, is_inside=is_inside or is_function, is_type_only=is_type_only or is_checking)

    def _note(self, module: Module, node: ast.Import | ast.ImportFrom, is_inside: bool, is_type_only: bool) -> None:
        where = f"{module.path.relative_to(self.source)}:{node.lineno}"
        for alias in node.names:
            target, is_ours = self._target(module, node, alias.name)
            module.imports.append(Import(where, target, is_ours, is_inside, is_type_only))
            if not is_ours and target.partition(".")[0] not in sys.stdlib_module_names:
                module.foreign_names.add(alias.asname or alias.name.partition(".")[0])

    def _target(self, module: Module, node: ast.Import | ast.ImportFrom, name: str) -> tuple[str, bool]:
        base = ""
        if isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.path.relative_to(self.source.parent).parent.parts
                base = ".".join([*package[: len(package) - node.level + 1], *([base] if base else [])])
        whole = f"{base}.{name}".lstrip(".")
        top, _, inside = whole.partition(".")
        if top != self.source.name:
            return whole, False
        while inside and inside not in self.modules:
            inside = inside.rpartition(".")[0]
        return inside or "__init__", True

    def edges(self, *, run_time: bool = False) -> dict[str, set[str]]:
        """Module -> modules of this package that it imports; `run_time`: when it is imported itself."""
        return {
            name: {
                i.target
                for i in module.imports
                if i.is_ours and i.target != name and not (run_time and (i.is_inside or i.is_type_only))
            }
            for name, module in self.modules.items()
        }

    @cached_property
    def heavy(self) -> dict[str, set[str]]:
        """Module -> the heavy libraries that its import brings with it."""
        direct = {
            name: {
                i.library
                for i in module.imports
                if not i.is_ours and i.library in HEAVY and not i.is_inside and not i.is_type_only
            }
            for name, module in self.modules.items()
        }
        edges = self.edges(run_time=True)
        return {name: {library for m in reached(edges, name) for library in direct[m]} for name in self.modules}


def reached(edges: Mapping[str, Iterable[str]], start: str) -> set[str]:
    """`start` and everything that can be reached from it."""
    found, waiting = {start}, [start]
    while waiting:
        for target in edges.get(waiting.pop(), ()):
            if target not in found:
                found.add(target)
                waiting.append(target)
    return found


def room(module: str) -> str:
    return module.partition(".")[0]


def lies_in(module: str, place: str) -> bool:
    return module == place or module.startswith(f"{place}.")


# ------------------------------------------------------------------------------------------------ the rules


def wrong_rooms(house: House) -> Iterator[str]:
    for name, module in house.modules.items():
        if room(name) not in ALLOWED:
            yield f"{name}: a room that the table does not have"
            continue
        for i in module.imports:
            # `from dsv4q import __version__` is everybody's
            if i.is_ours and i.target != "__init__" and room(i.target) not in (room(name), *ALLOWED[room(name)]):
                yield f"{i.where}: {room(name)} imports {i.target}"


def forbidden_ways(house: House) -> Iterator[str]:
    edges = house.edges()
    for start, places in NEVER.items():
        for name in house.modules:
            if not lies_in(name, start):
                continue
            for target in sorted(reached(edges, name)):
                if any(lies_in(target, place) for place in places):
                    yield f"{name} reaches {target}"


def circles(house: House) -> Iterator[str]:
    edges = house.edges()
    reach = {name: {t for target in edges[name] for t in reached(edges, target)} for name in edges}
    groups = {
        tuple(sorted(m for m in reach[name] if name in reach.get(m, ()))) for name in edges if name in reach[name]
    }
    return (" <-> ".join(group) for group in sorted(groups))


def hidden_imports(house: House) -> Iterator[str]:
    for name, module in house.modules.items():
        for i in module.imports:
            if not i.is_inside:
                continue
            if not i.is_ours:
                is_fine = i.library in HEAVY
            else:
                # a story in cli/, or what brings a heavy library that this module does not bring itself
                is_story = name.startswith("cli.") and i.target in _STORIES
                is_fine = is_story or not house.heavy[i.target] <= house.heavy[name]
            if not is_fine:
                yield f"{i.where}: {i.target} inside a function"


def doubled_classes(house: House) -> Iterator[str]:
    places: dict[str, list[str]] = defaultdict(list)
    for name, module in house.modules.items():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(name)
    return (f"{name}: {', '.join(found)}" for name, found in sorted(places.items()) if len(found) > 1)


def users_of_distributed(house: House) -> Iterator[str]:
    for name, module in house.modules.items():
        if name == RANKS:
            continue
        for i in module.imports:
            if not i.is_ours and lies_in(i.target, "torch.distributed"):
                yield f"{i.where}: imports {i.target}"
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Attribute) and node.attr == "distributed" and _root(node) == "torch":
                yield f"{module.path.relative_to(house.source)}:{node.lineno}: torch.distributed"


def patches(house: House) -> Iterator[str]:
    """Assignments to, deletions of and `setattr` on attributes of what was imported from a library."""
    for name, module in house.modules.items():
        if name == UPSTREAM:
            continue
        for node in ast.walk(module.tree):
            if any(_root(target) in module.foreign_names for target in _patched(node)):
                yield f"{module.path.relative_to(house.source)}:{node.lineno}: {ast.unparse(node).splitlines()[0]}"


def _patched(node: ast.AST) -> list[ast.expr]:
    """Attributes that a statement sets or deletes, and the object of a call that does."""
    if isinstance(node, (ast.Assign, ast.Delete)):
        targets = [part for target in node.targets for part in ast.walk(target)]
    elif isinstance(node, (ast.AugAssign, ast.AnnAssign)):
        targets = [node.target]
    elif isinstance(node, ast.Call):
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        return node.args[:1] if called in ("setattr", "delattr", "patch_attr", "patch_attrs") else []
    else:
        return []
    return [target for target in targets if isinstance(target, ast.Attribute) and not isinstance(target.ctx, ast.Load)]


def _root(node: ast.expr) -> str:
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""


def long_files(house: House) -> Iterator[str]:
    for path in sorted(house.source.rglob("*")):
        if path.suffix in (".py", ".html", ".css", ".js"):
            count = len(path.read_text(encoding="utf-8").splitlines())
            if count > LINES:
                yield f"{path.relative_to(house.source)}: {count} lines"


RULES: tuple[Callable[[House], Iterator[str]], ...] = (
    wrong_rooms, forbidden_ways, circles, hidden_imports, doubled_classes, users_of_distributed, patches, long_files,
)  # fmt: skip


@pytest.fixture(scope="module")
def house() -> House:
    return House(SOURCE)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_house_keeps_its_rules(rule: Callable[[House], Iterator[str]], house: House) -> None:
    found = sorted(set(rule(house)))
    assert not found, "\n" + "\n".join(found)


def test_every_rule_of_the_table_is_about_rooms_below() -> None:
    assert list(circles_of(ALLOWED)) == []


def circles_of(table: Mapping[str, Iterable[str]]) -> Iterator[str]:
    for name, targets in table.items():
        if any(name in reached(table, target) for target in targets):
            yield name


# ------------------------------------------------------------------------------------------------ the tree


def named_files(text: str) -> dict[str, str]:
    """Path -> line about it, of the tree in a document: a block of code whose first line is `src/dsv4q/`."""
    block = re.search(r"^```\w*\nsrc/dsv4q/\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    found: dict[str, str] = {}
    folders: list[str] = []
    for line in block[1].splitlines() if block else []:
        match = re.fullmatch(r"((?:  )+)(\S+)(?: +(\S.*))?", line)
        assert match, f"the tree has a line of another form: {line!r}"
        depth = len(match[1]) // 2 - 1
        folders[depth:] = [match[2]]
        found["".join(folders)] = match[3] or ""
    return found


@pytest.fixture(scope="module")
def tree() -> dict[str, str]:
    documents = (ROOT / "README.md", ROOT / "docs" / "words.md")
    return {path: line for document in documents for path, line in named_files(document.read_text()).items()}


def test_the_tree_names_every_file_and_no_other(tree: dict[str, str]) -> None:
    files = {
        str(path.relative_to(SOURCE)) + "/" * path.is_dir()
        for path in SOURCE.rglob("*")
        if path.name != "__init__.py" and "__pycache__" not in path.parts
    }
    assert sorted(tree) == sorted(files)


def test_the_tree_says_something_of_each_file(tree: dict[str, str]) -> None:
    assert [path for path, line in tree.items() if not line and not path.startswith("releases/")] == []


# ------------------------------------------------------------------------------------------------ the rules find it

FINE = {
    "__init__.py": '__version__ = "1"\n',
    "errors.py": "class Refused(Exception): ...\n",
    "layout.py": "from dsv4q.errors import Refused\n",
    "config.py": "import yaml\nfrom dsv4q import __version__\n",
    "formats/__init__.py": "",
    "formats/encode.py": "import torch\nfrom dsv4q.layout import Refused\n",
    "checkpoint/__init__.py": "",
    "checkpoint/source.py": "from dsv4q.errors import Refused\ndef f():\n    from dsv4q.formats.encode import g\n",
    "checkpoint/writer.py": "from dsv4q.errors import Refused\n",
    "verify/__init__.py": "",
    "verify/judge.py": "from dsv4q.checkpoint.source import f\n",
    "model/__init__.py": "",
    "model/upstream.py": "import transformers\ntransformers.x = 1\n",
    "quantize.py": "from dsv4q.checkpoint.writer import Refused\n",
    "cli/app.py": "import sys\ndef main():\n    from dsv4q import quantize\n    setattr(sys, 'stdout', None)\n",
}


def planted(folder: Path, changes: Mapping[str, str]) -> dict[str, list[str]]:
    """What each rule finds in a small house with these files in it."""
    for name, text in {**FINE, **changes}.items():
        path = folder / "dsv4q" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    house = House(folder / "dsv4q")
    return {rule.__name__: found for rule in RULES if (found := list(rule(house)))}


def test_a_house_without_faults_has_none(tmp_path: Path) -> None:
    assert planted(tmp_path, {}) == {}


@pytest.mark.parametrize(
    ("file", "text", "rule", "found"),
    [
        ("layout.py", "import dsv4q.config", "wrong_rooms", "layout.py:1: layout imports config"),
        ("layout.py", "from dsv4q import config", "wrong_rooms", "layout.py:1: layout imports config"),
        ("formats/encode.py", "from ..config import x", "wrong_rooms", "formats/encode.py:1: formats imports config"),
        (
            "errors.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from dsv4q.host import x",
            "wrong_rooms", "errors.py:3: errors imports __init__",
        ),
        ("extra/thing.py", "x = 1", "wrong_rooms", "extra.thing: a room that the table does not have"),
        ("checkpoint/source.py", "from dsv4q.checkpoint.writer import x", "forbidden_ways",
         "verify.judge reaches checkpoint.writer"),
        ("formats/other.py", "class Refused: ...", "doubled_classes", "Refused: errors, formats.other"),
        ("checkpoint/writer.py", "def f():\n    from dsv4q.errors import x", "hidden_imports",
         "checkpoint/writer.py:2: errors inside a function"),
        ("checkpoint/writer.py", "def f():\n    import json", "hidden_imports",
         "checkpoint/writer.py:2: json inside a function"),
        ("formats/other.py", "import torch\ndef f():\n    from dsv4q.formats.encode import x", "hidden_imports",
         "formats/other.py:3: formats.encode inside a function"),
        ("formats/other.py", "import torch.distributed as dist", "users_of_distributed",
         "formats/other.py:1: imports torch.distributed"),
        ("formats/other.py", "from torch import distributed", "users_of_distributed",
         "formats/other.py:1: imports torch.distributed"),
        ("formats/other.py", "import torch\ntorch.distributed.x()", "users_of_distributed",
         "formats/other.py:2: torch.distributed"),
        ("formats/other.py", "import torch\ntorch.nn.Linear.forward = None", "patches",
         "formats/other.py:2: torch.nn.Linear.forward = None"),
        ("formats/other.py", "from torch import nn\nsetattr(nn.Linear, 'forward', None)", "patches",
         "formats/other.py:2: setattr(nn.Linear, 'forward', None)"),
        ("formats/other.py", "x = 1\n" * 401, "long_files", "formats/other.py: 401 lines"),
    ],
)  # fmt: skip
def test_a_fault_is_found(tmp_path: Path, file: str, text: str, rule: str, found: str) -> None:
    if "dsv4q.host" in text:
        found = "errors.py:3: errors imports host"
        (tmp_path / "dsv4q").mkdir()
        (tmp_path / "dsv4q" / "host.py").write_text("")
    assert planted(tmp_path, {file: text}).get(rule) == [found]


def test_a_circle_is_found_that_hides_in_a_function(tmp_path: Path) -> None:
    changes = {
        "verify/judge.py": "from dsv4q.verify.shard import x",
        "verify/shard.py": "def f():\n    from dsv4q.verify.judge import x",
    }
    assert planted(tmp_path, changes)["circles"] == ["verify.judge <-> verify.shard"]


def test_a_tree_is_read_with_its_folders() -> None:
    lines = ["```", "src/dsv4q/", "  cli.py   commands", "  verify/  the judge", "    judge.py  decides"]
    text = "\n".join(["words", *lines, "  host.py  machine", "```", ""])
    expected = {"cli.py": "commands", "verify/": "the judge", "verify/judge.py": "decides", "host.py": "machine"}
    assert named_files(text) == expected
