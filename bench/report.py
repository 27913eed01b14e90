# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Run the benchmarks, print the table of ratios, write docs/benchmarks.md and guard against regressions.

Usage: ``report.py [--quick] [--guard] [-k EXPRESSION [--update]]``

A ratio is the time of the peer divided by ours in the same run, from the
fastest round of each: absolute times move with the machine, ratios hardly do.
``--quick`` measures tiny sizes and writes nothing; ``--guard`` compares with
the stored ratios (bench/ratios.json) instead of replacing them, and fails if
one fell by more than a quarter.  ``--update`` puts what ``-k`` selects into the
stored table and ratios, whose other rows stay.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "build" / "bench.json"
STORED = ROOT / "bench" / "ratios.json"
TABLE = ROOT / "docs" / "benchmarks.md"

TOLERANCE = 0.75

# What we want to reach against qemu-img, by group: times as fast.
TARGETS = {
    "map, scattered": 3.0,
    "map, full": 20.0,
    "check, scattered": 5.0,
    "check, full": 8.0,
    "measure, full": 20.0,
    "create, preallocation=metadata": 5.0,
    "snapshot, create": 5.0,
    "snapshot, apply": 5.0,
    "snapshot, delete": 5.0,
    "resize, shrink": 5.0,
    "commit, scattered": 1.5,
    "rebase, scattered": 1.5,
    "flatten 8 layers": 1.5,
    "convert, raw to qcow2": 1.5,
    "convert, qcow2 to raw": 1.4,
    "convert -c, zlib": 4.0,
    "convert -c, zstd": 1.3,
    "decompress, zlib": 1.3,
    "decompress, zstd": 1.1,
    "random read, 4 KiB": 7.0,
    "allocating write, 4 KiB, sequential": 4.0,
    "allocating write, 4 KiB, random": 4.0,
}


class Row(NamedTuple):
    """One peer in one group; times are seconds for one unit of work."""

    group: str
    who: str
    ours: str
    seconds: float
    our_seconds: float
    unit: str

    @property
    def key(self) -> str:
        """The name of the ratio from run to run."""
        return f"{self.group} | {self.ours} | {self.who}"

    @property
    def ratio(self) -> float:
        """How many times faster we are."""
        return self.seconds / self.our_seconds


def measure(quick: bool, expression: str | None) -> list[dict[str, Any]]:
    """Run pytest-benchmark and return its records."""
    RESULT.parent.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "pytest", "bench", "--benchmark-only", f"--benchmark-json={RESULT}"]
    command += ["-q", "--timeout=0", "--benchmark-columns=min,median,rounds", "--benchmark-group-by=group"]
    if expression:
        command += ["-k", expression]
    environment = os.environ | ({} if quick else {"QCOWLIB_BENCH": "full"})
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    records: list[dict[str, Any]] = json.loads(RESULT.read_text())["benchmarks"]
    return records


def rows(records: list[dict[str, Any]]) -> list[Row]:
    """Pair each of our records with each peer of its group; without a peer the first with our others."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault(record["group"], []).append(record)
    table = []
    for group, members in groups.items():
        ours = [member for member in members if member["extra_info"]["who"].startswith("qcow")]
        others = [member for member in members if member not in ours]
        if not others:
            ours, others = ours[:1], ours[1:]
        for one, other in itertools.product(ours, others):
            # Variants of ours, once against the main peer, not against every one.
            if one is not ours[0] and not _main(other, others):
                continue
            info, unit = other["extra_info"], one["extra_info"]["unit"]
            table.append(Row(group, info["who"], one["extra_info"]["who"], _each(other), _each(one), unit))
    return table


def _main(peer: dict[str, Any], peers: list[dict[str, Any]]) -> bool:
    who: str = peer["extra_info"]["who"]
    return who.startswith("qemu-img") or len(peers) == 1


def _each(record: dict[str, Any]) -> float:
    seconds: float = record["stats"]["min"] / record["extra_info"]["amount"]
    return seconds


def human(seconds: float, unit: str) -> str:
    """Return a time for one unit, or a rate where the unit is a byte."""
    if unit == "byte":
        return f"{1 / seconds / (1 << 20):,.0f} MiB/s"
    for limit, factor, name in ((1e-3, 1e6, "us"), (1.0, 1e3, "ms")):
        if seconds < limit:
            return f"{seconds * factor:.3g} {name}"
    return f"{seconds:.3g} s"


def verdict(row: Row) -> str:
    """Return what the target was and whether it is reached."""
    target = TARGETS.get(row.group)
    first = row.ours in ("qcowlib", "qcow")
    if target is None or not first or not row.who.startswith("qemu-img") or row.who.endswith("-d 1"):
        return ""
    return f"{target:g}" if row.ratio >= target else f"**{target:g}, missed**"


def markdown(table: list[Row]) -> str:
    """Return the table as a document."""
    version = subprocess.run(["qemu-img", "--version"], capture_output=True, text=True, check=False).stdout
    qemu = version.splitlines()[0] if version else "qemu-img is not installed"
    lines = [
        "# Benchmarks",
        "",
        "Written by `./run bench`. *Times as fast* is the time of the peer divided by ours, both the fastest round of",
        "one run; a whole command counts with its start. Absolute figures are of one machine and move from run to run.",
        "",
        f"Python {platform.python_version()}, {os.cpu_count()} cores, {qemu}.",
        "",
        "`qcowlib` is a call in the process of the benchmark, `qcow` the whole command.",
        "",
        "| Job | We | Peer | Peer's | Ours | Times as fast | Target |",
        "|---|---|---|---:|---:|---:|---|",
    ]
    return "\n".join([*lines, *map(line_of, table)]) + "\n"


def line_of(row: Row) -> str:
    """Return the line of the table for *row*."""
    theirs, ours = human(row.seconds, row.unit), human(row.our_seconds, row.unit)
    return f"| {row.group} | {row.ours} | {row.who} | {theirs} | {ours} | {row.ratio:.2f} | {verdict(row)} |"


def updated(text: str, table: list[Row]) -> str:
    """Return the document *text* with the lines of *table* in the place of those for the same, new ones at its end."""
    lines = {
        line.rsplit(" |", 5)[0] if line.startswith("|") else f"{number}": line
        for number, line in enumerate(text.splitlines())
    }
    lines |= {line_of(row).rsplit(" |", 5)[0]: line_of(row) for row in table}
    return "\n".join(lines.values()) + "\n"


def regressions(table: list[Row], stored: dict[str, float]) -> list[str]:
    """Return a line for each ratio that fell below TOLERANCE of the stored one."""
    return [
        f"{row.key}: {row.ratio:.2f}, was {stored[row.key]:.2f}"
        for row in table
        if row.key in stored and row.ratio < stored[row.key] * TOLERANCE
    ]


def main() -> int:
    """Run what the command line asks for; return the exit code."""
    parser = argparse.ArgumentParser(description="benchmarks against the peers that are installed")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, nothing written")
    parser.add_argument("--guard", action="store_true", help="compare with the stored ratios instead of replacing them")
    parser.add_argument("-k", dest="expression", help="only benchmarks that match, nothing written")
    parser.add_argument("--update", action="store_true", help="with -k: write what was measured, keep the rest")
    arguments = parser.parse_args()
    table = rows(measure(arguments.quick, arguments.expression))
    print(markdown(table))
    if arguments.guard:
        fallen = regressions(table, json.loads(STORED.read_text()))
        print("\n".join(["slower than before:", *fallen]) if fallen else "no ratio fell")
        return bool(fallen)
    whole = not arguments.expression
    if not arguments.quick and (whole or arguments.update):
        TABLE.write_text(markdown(table) if whole else updated(TABLE.read_text(), table))
        stored = {} if whole else json.loads(STORED.read_text())
        stored |= {row.key: round(row.ratio, 3) for row in table}
        STORED.write_text(json.dumps(stored, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
