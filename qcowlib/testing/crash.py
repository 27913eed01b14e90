# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Every state that a power cut can leave, from a log of operations.

The model: at a cut, of each storage everything before its last barrier is
there, and of what came later any part, in units of a 512-byte sector, in any
order.  Barriers of one storage order nothing in another.

Invariant: the same log, options and seed give the same states.  States: every
in-order prefix; and for each window between barriers all subsets of its
operations while there are at most ``subset_limit``, else each one missing,
each one alone, each suffix and random ones; and torn operations.

An oracle judges a state at two times: the first at which it could exist (the
fewest allowed values) and the last (the most promises given).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import combinations, pairwise
from random import Random
from typing import NamedTuple

from qcowlib.testing.recorder import Op, OpLog

__all__ = ["CrashReport", "CrashState", "Finding", "Oracle", "assert_crash_safe", "crash_states", "explore"]

SECTOR = 512


class CrashState(NamedTuple):
    """One possible content of all storages.

    ``images`` are the caller's to keep.  ``first`` and ``last`` are log
    positions: the state could exist at any time between them.
    """

    images: tuple[bytearray, ...]
    first: int
    last: int
    what: str


class Finding(NamedTuple):
    """What is wrong with a state: a class (``CORRUPT``, ``LOST`` ...) and a sentence."""

    verdict: str
    detail: str


Oracle = Callable[[CrashState], Sequence[Finding]]


class CrashReport(NamedTuple):
    """How many states were built, how many differed, and what was found in them by class."""

    states: int
    distinct: int
    verdicts: Counter[str]
    examples: tuple[str, ...]


class _Piece(NamedTuple):
    """A part of operation ``number`` that reaches the disk: ``[start, end)`` of its range."""

    number: int
    start: int
    end: int


def _apply(images: Sequence[bytearray], op: Op, start: int, end: int) -> None:
    """Carry out bytes *start* to *end* (absolute) of *op*."""
    image = images[op.storage]
    if op.kind == "resize":
        if op.length < len(image):
            del image[op.length :]
        else:
            image.extend(bytes(op.length - len(image)))
        return
    if op.kind == "discard":
        end = min(end, len(image))
    elif len(image) < end:
        image.extend(bytes(end - len(image)))
    if start < end:
        image[start:end] = op.data[start - op.offset : end - op.offset] if op.kind == "write" else bytes(end - start)


def _whole(index: int, op: Op) -> _Piece:
    return _Piece(index, op.offset, op.offset + op.length)


def _sectors(index: int, op: Op) -> list[_Piece]:
    if op.kind == "resize":
        return [_whole(index, op)]
    end = op.offset + op.length
    borders = [op.offset, *range(op.offset - op.offset % SECTOR + SECTOR, end, SECTOR), end]
    return [_Piece(index, a, b) for a, b in pairwise(borders)]


def _choices(
    window: list[tuple[int, Op]], limit: int, random: Random, count: int
) -> Iterator[tuple[str, list[_Piece]]]:
    """Yield (what, pieces in order) for the operations of one window that no barrier covers yet."""
    whole = [_whole(index, op) for index, op in window]
    sectors = [piece for index, op in window for piece in _sectors(index, op)]
    units = sectors if len(sectors) <= limit else whole
    total = len(units)
    if total <= limit:
        for size in range(total + 1):
            for chosen in combinations(units, size):
                yield "subset", list(chosen)
    else:
        for position, piece in enumerate(units):
            yield "prefix", units[:position]
            yield "suffix", units[position:]
            yield "without", [other for other in units if other is not piece]
            yield "alone", [piece]
        for _ in range(count):
            share = random.random()
            yield "random", [piece for piece in units if random.random() < share]
    if len(sectors) > len(units):
        yield from _torn(window, whole, sectors, random, count)


def _torn(
    window: list[tuple[int, Op]], whole: list[_Piece], sectors: list[_Piece], random: Random, count: int
) -> Iterator[tuple[str, list[_Piece]]]:
    """Yield states with operations cut inside; the sectors of each are dropped at random and at its ends."""
    for position, (index, op) in enumerate(window):
        parts = _sectors(index, op)
        if len(parts) < 2:
            continue
        cut = random.randrange(1, len(parts))
        for kept in (parts[:cut], parts[cut:], parts[::2]):
            yield "torn last", [*whole[:position], *kept]
            yield "torn among all", [*whole[:position], *kept, *whole[position + 1 :]]
    for _ in range(count):
        share = random.random()
        yield "torn at random", [piece for piece in sectors if random.random() < share]


def crash_states(
    log: OpLog, *, subset_limit: int = 6, random_states: int = 16, seed: int = 1, start: int = 0
) -> Iterator[CrashState]:
    """Yield the distinct states of *log* from position *start* on.

    A window costs at most ``2 ** subset_limit`` or four times its operations,
    plus twice *random_states* and six a torn operation.
    """
    random = Random(seed)
    durable = [bytearray(base) for base in log.bases]
    pending: list[tuple[int, Op]] = []
    seen: set[tuple[int, ...]] = set()
    window_start = 0
    ends = [index for index, op in enumerate(log.ops) if op.kind == "flush"]
    boundary = {*ends, len(log.ops)}
    for index in range(len(log.ops) + 1):
        if index in boundary and index >= start:
            for what, pieces in _choices(pending, subset_limit, random, random_states):
                images = tuple(map(bytearray, durable))
                for piece in pieces:
                    _apply(images, log.ops[piece.number], piece.start, piece.end)
                first = max(window_start, max((piece.number + 1 for piece in pieces), default=0))
                key = (*(hash(bytes(image)) for image in images), index)
                if key not in seen:
                    seen.add(key)
                    yield CrashState(images, first, index, f"{what} before operation {index}: {_describe(log, pieces)}")
        if index == len(log.ops):
            return
        op = log.ops[index]
        if op.kind == "flush":
            for position, change in [entry for entry in pending if entry[1].storage == op.storage]:
                piece = _whole(position, change)
                _apply(durable, change, piece.start, piece.end)
            pending = [entry for entry in pending if entry[1].storage != op.storage]
            window_start = index + 1
        elif op.kind != "mark":
            pending.append((index, op))


def _describe(log: OpLog, pieces: Sequence[_Piece]) -> str:
    parts = []
    for piece in pieces[:12]:
        op = log.ops[piece.number]
        parts.append(f"{piece.number}:{op.kind}@{op.storage}:{piece.start}+{piece.end - piece.start}")
    return " ".join(parts) + (" ..." if len(pieces) > 12 else "")


def explore(
    log: OpLog,
    oracle: Oracle,
    *,
    subset_limit: int = 6,
    random_states: int = 16,
    seed: int = 1,
    max_examples: int = 10,
    stop_after: int | None = None,
) -> CrashReport:
    """Judge every state of *log*; end early after *stop_after* bad ones."""
    verdicts: Counter[str] = Counter()
    examples: list[str] = []
    contents: set[int] = set()
    states = bad = 0
    for state in crash_states(log, subset_limit=subset_limit, random_states=random_states, seed=seed):
        states += 1
        contents.add(hash(tuple(hash(bytes(image)) for image in state.images)))
        findings = oracle(state)
        verdicts.update({finding.verdict for finding in findings})
        if findings and len(examples) < max_examples:
            text = "; ".join(f"{finding.verdict}: {finding.detail}" for finding in findings[:4])
            examples.append(f"{text} [{state.what}]")
        bad += any(finding.verdict != "LEAK" for finding in findings)
        if stop_after is not None and bad >= stop_after:
            break
    return CrashReport(states, len(contents), verdicts, tuple(examples))


def assert_crash_safe(
    log: OpLog,
    oracle: Oracle,
    *,
    allow: Collection[str] = ("LEAK",),
    subset_limit: int = 6,
    random_states: int = 16,
    seed: int = 1,
) -> CrashReport:
    """Explore and raise AssertionError, with the seed and examples, for classes that *allow* does not name."""
    report = explore(log, oracle, subset_limit=subset_limit, random_states=random_states, seed=seed)
    wrong = {verdict: count for verdict, count in report.verdicts.items() if verdict not in allow}
    if wrong:
        shown = [example for example in report.examples if any(verdict in example for verdict in wrong)]
        text = "\n".join(shown or report.examples)
        raise AssertionError(f"crash states with {wrong} of {report.distinct} (seed {seed}):\n{text}")
    return report
