# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Search simulated histories from the command line: ``./run simulate`` or ``python -m spm.testing``.

Invariant: a finding is printed with the command that repeats it exactly.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .cluster import Outcome, simulate
from .rules import CAUGHT_BY, RULES, Rules

__all__ = ["command", "main"]


def command(seed: int, hosts: int, hours: float, fault_s: float, without: str | None = None) -> str:
    """Return the command line that repeats one history."""
    rule = f" --without {without}" if without else ""
    return f"./run simulate --seed {seed} --hosts {hosts} --hours {hours:g} --fault-seconds {fault_s:g}{rule}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="simulate", description="Hosts of a pool in virtual time, with faults by seed."
    )
    parser.add_argument("--seed", type=int, default=1, help="the first seed (default: 1)")
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds (default: 1)")
    parser.add_argument("--hosts", type=int, default=250, help="hosts of the pool, 1 to 250 (default: 250)")
    parser.add_argument("--hours", type=float, default=24.0, help="virtual hours (default: 24)")
    parser.add_argument("--fault-seconds", type=float, default=120.0, help="mean time between faults (default: 120)")
    parser.add_argument("--without", choices=RULES, help="take a safety rule away")
    parser.add_argument("--mutations", action="store_true", help="tell for each rule the seed that misses it")
    return parser


def _tell(outcome: Outcome, repeat: str) -> None:
    print(f"seed {outcome.seed}: {len(outcome.findings)} findings; repeat with: {repeat}")
    for finding in outcome.findings:
        print(f"  {finding.time_s:10.3f} s  {finding.rule}  {finding.what}")


def _mutations() -> int:
    missing = 0
    for rule, history in CAUGHT_BY.items():
        seed, hosts, hours, fault_s = history
        outcome = simulate(seed, hosts=hosts, hours=hours, fault_s=fault_s, rules=Rules().without(rule))
        missing += not outcome.findings
        what = " ".join(map(str, outcome.findings[0][::2])) if outcome.findings else "not missed here"
        print(f"{rule}: {what}\n  {command(*history, without=rule)}")
    return 1 if missing else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the histories; the exit status is 1 when an invariant broke."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if (
        not 1 <= options.hosts <= 250
        or not 0 < options.hours <= 10_000
        or not options.fault_seconds > 0
        or options.seeds < 1
    ):
        parser.error("1 to 250 hosts, one seed or more, up to 10000 hours, a positive time between faults")
    if options.mutations:
        return _mutations()
    broken = 0
    digest = ""
    terms = writes = faults = 0
    rules = Rules().without(options.without) if options.without else Rules()
    for seed in range(options.seed, options.seed + options.seeds):
        outcome = simulate(seed, hosts=options.hosts, hours=options.hours, fault_s=options.fault_seconds, rules=rules)
        digest = outcome.digest
        terms, writes, faults = terms + outcome.terms, writes + outcome.writes, faults + outcome.faults
        if outcome.findings:
            broken += 1
            _tell(outcome, command(seed, options.hosts, options.hours, options.fault_seconds, options.without))
    if options.seeds == 1:
        print(f"digest {digest}")
    print(f"{options.seeds} histories, {broken} with findings; {terms} terms, {writes} changes, {faults} faults")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
