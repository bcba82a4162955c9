"""Whether two checkouts write the same artifacts, byte for byte: shipped configs x toys x ranks x killed and resumed.

    python scripts/same_bytes.py A B [--work build/same_bytes] [--quick] [--configs ...] [--toys ...] [--ranks ...]

A and B are folders with src/dsv4q. Both are run by their command line alone, so nothing here depends on where a module
lies. The configs are A's at the size of a toy, and A makes the toys; B must make the same ones. Compared are

- every file of OUT but report.json and report.html, and every tensor of a shard, by SHA-256;
- report.json without seconds, memory, peak_memory, ranks and versions, and without the worst of several tensors that
  have no error; its floats to six digits;
- within each checkout: all runs of one config and one toy, on any number of ranks, killed or not.

A killed run gets SIGKILL, every process of it, when its journal has some finished blocks (another number in turn), and
then the same command again. WORK keeps the results by digest of sources and settings: a second call takes them up.

Prints a line for each comparison, and ends with 1 if one of them finds a difference.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import yaml

TOY = {
    "hidden_size": 128, "n_routed_experts": 5, "compress_ratios": [0, 4, 128], "num_hash_layers": 1,
    "vocab_size": 300, "shards": 3,
}  # fmt: skip
"""The smallest toy with every kind of layer. Five experts: no number of ranks but one divides them."""
TOYS = {"bf16": (), "grid": ("--grid",), "native": ("--native",)}
"""Toy -> flags of `dsv4q toy`."""
RANKS = (1, 2, 3)
BLOCKS_BEFORE_KILL = (1, 3, 2, 4)
"""Finished blocks after which a run is killed, in turn. The toy has six: embed, three layers, head, mtp.0."""

TELLS_TIME = ("report.json", "report.html")
"""Files that differ from run to run."""
VARYING = ("seconds", "memory", "peak_memory", "ranks", "versions")
"""Keys of report.json that do, at any depth."""
DIGITS = 1e-6
"""Relative; sums of squared errors may be taken in another order."""
LIBRARIES = ("torch", "transformers", "llmcompressor", "compressed-tensors", "safetensors", "datasets", "tokenizers")


class Unusable(Exception):
    """What the user gave, or a checkout, does not work; the text says what."""


# ------------------------------------------------------------------------------------------------ what is run


@dataclass(frozen=True)
class Case:
    """One run; `number` is its place in the matrix."""

    number: int
    config: str
    toy: str
    ranks: int
    is_killed: bool

    @property
    def pair(self) -> tuple[str, str]:
        return self.config, self.toy

    def __str__(self) -> str:
        ranks = "1 rank " if self.ranks == 1 else f"{self.ranks} ranks"
        return f"{self.config:22} {self.toy:7} {ranks}  {'killed' if self.is_killed else 'straight':8}"


def matrix(configs: Sequence[str], toys: Sequence[str], ranks: Sequence[int], *, quick: bool) -> list[Case]:
    """All cases; `quick`: a third, in which every pair of config and toy has one number of ranks."""
    places = [
        (config, toy, count)
        for i, config in enumerate(configs)
        for j, toy in enumerate(toys)
        for k, count in enumerate(ranks)
        if not quick or (i + j) % len(ranks) == k
    ]
    kinds = [(*place, is_killed) for place in places for is_killed in (False, True)]
    return [Case(number, *kind) for number, kind in enumerate(kinds)]


@dataclass(frozen=True)
class Result:
    """What one run left."""

    files: dict[str, str]
    """File of OUT, or `shard: tensor`, -> SHA-256."""
    facts: dict[str, Any]
    """report.json without what varies."""
    blocks_before_kill: int | None = None
    """Finished blocks when it was killed; None for a run that was not."""


@dataclass(frozen=True)
class Checkout:
    """A folder with src/dsv4q."""

    name: str
    root: Path
    work: Path
    device: str = "cpu"

    @property
    def source(self) -> Path:
        return self.root / "src"

    @cached_property
    def digest(self) -> str:
        """Of its code and of everything else that may change a byte."""
        code = sorted(p for p in (self.source / "dsv4q").rglob("*") if p.is_file() and p.suffix != ".pyc")
        found = hashlib.sha256(json.dumps([sys.version, *map(metadata.version, LIBRARIES)]).encode())
        for path in code:
            found.update(f"{path.relative_to(self.source)}\0".encode() + path.read_bytes())
        return found.hexdigest()

    def start(self, *arguments: str | Path, ranks: int = 1) -> subprocess.Popen[str]:
        """`dsv4q ARGUMENTS` of this checkout, in WORK."""
        launch = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"] if ranks > 1 else []
        environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
        environment |= {"PYTHONPATH": str(self.source), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", *launch, "dsv4q", *map(str, arguments)]
        return subprocess.Popen(
            command, cwd=self.work, env=environment, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )

    def require_importable(self) -> None:
        """That its own code is what its command line imports.

        Raises:
            Unusable: no src/dsv4q, or Python finds another one.
        """
        line = [sys.executable, "-c", "import dsv4q; print(dsv4q.__file__)"]
        environment = {**os.environ, "PYTHONPATH": str(self.source)}
        found = subprocess.run(line, cwd=self.work, env=environment, capture_output=True, text=True).stdout.strip()
        if not (self.source / "dsv4q").is_dir() or not Path(found).is_relative_to(self.source):
            raise Unusable(f"{self.root}: expected src/dsv4q to be imported, found {found or 'nothing'}")


def wait_for(process: subprocess.Popen[str], log: Path) -> None:
    """Wait for a command that must succeed.

    Raises:
        Unusable: it failed; `log` has what it said.
    """
    _, said = process.communicate()
    if process.returncode:
        log.write_text(said)
        raise Unusable(f"exit code {process.returncode}, {log}: {said.strip().splitlines()[0][:200] if said else ''}")


# ------------------------------------------------------------------------------------------------ running


def write_configs(checkout: Checkout) -> dict[str, Path]:
    """The shipped configs with the toy's calibration and number of shards, as files in WORK."""
    shipped = {path.stem: yaml.safe_load(path.read_text()) for path in sorted(checkout.root.glob("configs/*.yaml"))}
    if "toy" not in shipped:
        raise Unusable(f"{checkout.root}: no configs/toy.yaml")
    found = {}
    for name, config in shipped.items():
        sized = {key: shipped["toy"][key] for key in ("calibration", "output") if key in config}
        found[name] = checkout.work / "configs" / f"{name}.yaml"
        found[name].parent.mkdir(parents=True, exist_ok=True)
        found[name].write_text(yaml.safe_dump(config | sized, sort_keys=False))
    return found


def make_toy(checkout: Checkout, name: str) -> tuple[Path, dict[str, str]]:
    """A toy as this checkout makes it: its folder in WORK, named by its bytes, and their digests."""
    dimensions = checkout.work / "toy.yaml"
    dimensions.write_text(yaml.safe_dump(TOY))
    made = checkout.work / f"toy-{name}-{checkout.name}"
    shutil.rmtree(made, ignore_errors=True)
    wait_for(checkout.start("toy", made, "--config", dimensions, *TOYS[name], "--quiet"), made.with_suffix(".log"))
    files = digests(made)
    folder = checkout.work / f"toy-{name}-{hashlib.sha256(json.dumps(files).encode()).hexdigest()[:12]}"
    if folder.exists():
        shutil.rmtree(made)
    else:
        made.rename(folder)
    return folder, files


def run(checkout: Checkout, case: Case, config: Path, toy: Path) -> Result:
    """The result of one run, from WORK if it was run before."""
    settings = [checkout.digest, config.read_text(), toy.name, case.ranks, case.is_killed, checkout.device]
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()
    kept = checkout.work / "results" / f"{key}.json"
    if not kept.is_file():
        result = run_now(checkout, case, config, toy)
        kept.parent.mkdir(exist_ok=True)
        whole = kept.with_suffix(f".{checkout.name}")
        whole.write_text(json.dumps(vars(result)))
        whole.replace(kept)
    return Result(**json.loads(kept.read_text()))


def run_now(checkout: Checkout, case: Case, config: Path, toy: Path) -> Result:
    out = checkout.work / f"out-{checkout.name}-{case.number}"
    command = ("quantize", toy.relative_to(checkout.work), out, "-c", config, "--device", checkout.device, "--quiet")
    blocks: int | None = None
    for wanted in range(blocks_before_kill(case), 0, -1):
        shutil.rmtree(out, ignore_errors=True)
        blocks = kill_after(checkout.start(*command, ranks=case.ranks), out, wanted)
        if blocks is not None:
            break
    if blocks is None:
        shutil.rmtree(out, ignore_errors=True)
    wait_for(checkout.start(*command, ranks=case.ranks), out.with_suffix(".log"))
    result = Result(digests(out), facts(json.loads((out / "report.json").read_text())), blocks)
    shutil.rmtree(out)
    return result


def blocks_before_kill(case: Case) -> int:
    """Finished blocks after which this case is to be killed; 0 for a straight one."""
    return BLOCKS_BEFORE_KILL[case.number // 2 % len(BLOCKS_BEFORE_KILL)] if case.is_killed else 0


def kill_after(process: subprocess.Popen[str], out: Path, wanted: int) -> int | None:
    """SIGKILL a run with all its ranks when `wanted` blocks are finished; how many were, None if it ended before."""
    journal = out / ".dsv4q" / "journal.jsonl"
    while process.poll() is None and finished_blocks(journal) < wanted:
        time.sleep(0.001)
    try:
        tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        tree = []
    for member in tree:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    psutil.wait_procs(tree, timeout=30)
    process.communicate()
    return finished_blocks(journal) or None


def finished_blocks(journal: Path) -> int:
    """Whole lines of a journal but the first, which has the identity; 0 without one."""
    try:
        return max(0, journal.read_bytes().count(b"\n") - 1)
    except FileNotFoundError:
        return 0


# ------------------------------------------------------------------------------------------------ comparing


def digests(folder: Path) -> dict[str, str]:
    """File -> SHA-256, and `shard: tensor` -> SHA-256, without the files that tell time."""
    found: dict[str, str] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in TELLS_TIME):
        name = str(path.relative_to(folder))
        content = path.read_bytes()
        found[name] = hashlib.sha256(content).hexdigest()
        if path.suffix == ".safetensors":
            found |= {f"{name}: {tensor}": digest for tensor, digest in tensor_digests(content)}
    return found


def tensor_digests(shard: bytes) -> Iterator[tuple[str, str]]:
    """Of each tensor: header entry (dtype, shape) and bytes."""
    begin = 8 + int.from_bytes(shard[:8], "little")
    for name, entry in json.loads(shard[8:begin]).items():
        if name != "__metadata__":
            first, last = entry["data_offsets"]
            kind = f"{entry['dtype']} {entry['shape']}".encode()
            yield name, hashlib.sha256(kind + shard[begin + first : begin + last]).hexdigest()


def facts(report: Any) -> Any:
    """A report without the keys of VARYING; of tensors that all are without error none is the worst."""
    if isinstance(report, dict):
        varying = (*VARYING, "worst_tensor") if report.get("worst") == 0 else VARYING
        return {key: facts(value) for key, value in report.items() if key not in varying}
    return [facts(value) for value in report] if isinstance(report, list) else report


def file_differences(one: dict[str, str], other: dict[str, str]) -> list[str]:
    """Names that one of them lacks, or whose digests differ; tensors instead of the shard that they are in."""
    names = [name for name in sorted({*one, *other}) if one.get(name) != other.get(name)]
    shards = {name.split(": ")[0] for name in names if ": " in name}
    return [name for name in names if name not in shards]


def fact_differences(one: Any, other: Any, key: str = "") -> list[str]:
    """Dotted keys at which two reports differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        names = sorted({*one, *other})
        return [d for n in names for d in fact_differences(one.get(n), other.get(n), f"{key}.{n}".lstrip("."))]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return [d for i, (a, b) in pairs for d in fact_differences(a, b, f"{key}[{i}]")]
    if isinstance(one, float) and isinstance(other, float) and math.isclose(one, other, rel_tol=DIGITS):
        return []
    return [] if one == other else [f"report.json: {key}"]


def differences(one: Result, other: Result) -> list[str]:
    return file_differences(one.files, other.files) + fact_differences(facts(one.facts), facts(other.facts))


def told(found: Sequence[str]) -> str:
    """`equal`, or the first differences and their number."""
    more = f" and {len(found) - 4} more" if len(found) > 4 else ""
    return f"DIFFERENT: {', '.join(found[:4])}{more}" if found else "equal"


# ------------------------------------------------------------------------------------------------ the whole


class Comparison:
    """Two checkouts over a matrix; what was found different."""

    def __init__(self, a: Checkout, b: Checkout, configs: dict[str, Path]) -> None:
        self.a, self.b, self.configs = a, b, configs
        self.toys: dict[str, Path] = {}
        self.results: dict[tuple[str, Case], Result] = {}
        self.different = 0
        self.not_killed = 0

    def make_toys(self, names: Sequence[str]) -> Iterator[str]:
        for name in names:
            folder, files = make_toy(self.a, name)
            self.toys[name] = folder
            yield self._line(f"toy {name}, {len(list(folder.iterdir()))} files", [make_toy(self.b, name)[1]], files)

    def _line(self, what: str, others: Sequence[dict[str, str]], files: dict[str, str]) -> str:
        found = sorted({name for other in others for name in file_differences(files, other)})
        self.different += bool(found)
        return f"{what}: {told(found)}"

    def compare(self, case: Case) -> str:
        """Both checkouts' runs of one case, and the line about them."""
        begin = time.monotonic()
        results = []
        for checkout in (self.a, self.b):
            try:
                result = run(checkout, case, self.configs[case.config], self.toys[case.toy])
            except Unusable as error:
                self.different += 1
                return f"{case} FAILED in {checkout.name}: {error}"
            self.results[checkout.name, case] = result
            results.append(result)
        found = differences(*results)
        self.different += bool(found)
        text = f"{case} {told(found)}"
        if case.is_killed:
            killed = [result.blocks_before_kill for result in results]
            self.not_killed += killed.count(None)
            text += f", killed after {' and '.join('all' if k is None else str(k) for k in killed)} blocks"
        return f"{text}, {time.monotonic() - begin:.1f} s"

    def within(self) -> Iterator[str]:
        """Of each checkout: whether all runs of a config and a toy gave the same files."""
        for name in (self.a.name, self.b.name):
            for pair in dict.fromkeys(case.pair for side, case in self.results if side == name):
                files = [r.files for (side, case), r in self.results.items() if side == name and case.pair == pair]
                yield self._line(f"{pair[0]:22} {pair[1]:7} all {len(files)} runs of {name}", files[1:], files[0])


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("a", type=Path, metavar="A", help="checkout that is right")
    parser.add_argument("b", type=Path, metavar="B", help="checkout to compare with it")
    parser.add_argument("--work", type=Path, default=Path("build/same_bytes"), help="folder for toys and results")
    parser.add_argument("--quick", action="store_true", help="a third of the matrix, still every config, toy and rank")
    parser.add_argument("--configs", nargs="+", help="names of A's configs, without .yaml; default all")
    parser.add_argument("--toys", nargs="+", choices=TOYS, default=list(TOYS))
    parser.add_argument("--ranks", nargs="+", type=int, choices=range(1, 9), metavar="N", help="default 1 2 3")
    parser.add_argument("--jobs", type=int, default=1, help="comparisons at a time")
    parser.add_argument("--gpu", action="store_true", help="--device cuda, one rank")
    options = parser.parse_args(given)
    if options.gpu and options.ranks:
        parser.error("--gpu runs one rank: leave --ranks out")
    options.ranks = [1] if options.gpu else options.ranks or list(RANKS)
    return options


def main(given: Sequence[str] | None = None) -> int:
    options = arguments(given)
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    a = Checkout("A", options.a.resolve(), work, "cuda" if options.gpu else "cpu")
    b = replace(a, name="B", root=options.b.resolve())
    try:
        for checkout in (a, b):
            checkout.require_importable()
        configs = write_configs(a)
        if unknown := sorted({*(options.configs or ())} - configs.keys()):
            raise Unusable(f"{a.root}/configs has no {', '.join(unknown)}; it has {', '.join(configs)}")
        comparison = Comparison(a, b, configs)
        for line in comparison.make_toys(options.toys):
            print(line, flush=True)
    except Unusable as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    cases = matrix(options.configs or list(configs), options.toys, options.ranks, quick=options.quick)
    with ThreadPoolExecutor(options.jobs) as pool:
        for line in pool.map(comparison.compare, cases):
            print(line, flush=True)
    for line in comparison.within():
        print(line)
    print(
        f"{len(cases)} comparisons, {comparison.different} differences; "
        f"{comparison.not_killed} runs to be killed ended before their kill"
    )
    return int(comparison.different > 0)


if __name__ == "__main__":
    sys.exit(main())
