# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""``demo``: the library at work on real data, step by step, judged by qemu-img where installed.

Invariant: everything happens in one temporary directory that is gone
afterwards; a step that finds a problem says so, the others still run, and the
exit status tells.  The steps are in :mod:`.demo_steps`.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from qcowlib.errors import Error
from qcowlib.units import human_size

__all__ = ["Demo", "Judge", "Problem", "Step", "run_demo"]

Figures = Mapping[str, int | float | str | bool | None]


class Problem(Exception):
    """A step found that something is not as it must be."""


class Step(NamedTuple):
    """One line of the demo: *work* returns what to say about it, and figures for programs."""

    title: str
    work: Callable[[Demo], tuple[str, Figures]]


class Judge:
    """The real qemu-img; without it nothing is judged and that is said."""

    def __init__(self) -> None:
        self.program = shutil.which("qemu-img")
        self.verdicts = 0

    def __bool__(self) -> bool:
        return self.program is not None

    def run(self, *arguments: str | Path) -> tuple[int, str]:
        """Return the exit status of qemu-img and what it printed; :class:`Problem` without it."""
        if self.program is None:
            raise Problem("qemu-img is not installed")
        done = subprocess.run([self.program, *map(str, arguments)], capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr

    def check(self, path: Path, allowed: tuple[int, ...] = (0,)) -> None:
        """Let qemu-img check *path*; *allowed* are the accepted exit statuses (3 is leaks only)."""
        if self:
            status, text = self.run("check", "-f", "qcow2", path)
            if status not in allowed:
                raise Problem(f"qemu-img check {path.name}: {text.strip()}")
            self.verdicts += 1

    def compare(self, left: Path, left_format: str, right: Path, right_format: str) -> None:
        """Let qemu-img compare what guests see of two images."""
        if self:
            status, text = self.run("compare", "-f", left_format, "-F", right_format, left, right)
            if status:
                raise Problem(f"qemu-img compare {left.name} {right.name}: {text.strip()}")
            self.verdicts += 1


class Demo:
    """State that steps share: the directory, the judge, sizes."""

    def __init__(
        self, directory: Path, *, size: int, data: int, overlays: int, on_progress: Callable[[str], None]
    ) -> None:
        self.directory = directory
        self.judge = Judge()
        self.size = size
        self.data = data
        self.overlays = overlays
        self.on_progress = on_progress
        self.guest_bytes = 0

    def path(self, name: str) -> Path:
        """Return the path of *name* in the demo's directory."""
        return self.directory / name

    @contextlib.contextmanager
    def progress(self, title: str) -> Iterator[Callable[[int, int], None]]:
        """Give a progress callback that shows percent, and require that it was called to the end."""
        seen = [0, -1]

        def report(done: int, total: int) -> None:
            if done < seen[0]:
                raise Problem(f"progress of {title} went back")
            seen[:] = [done, total]
            self.on_progress(f"{title} {done * 100 // max(total, 1)}%")

        yield report
        if seen[0] != seen[1]:
            raise Problem(f"progress of {title} ended at {seen[0]} of {seen[1]}")


def _terminal_progress() -> Callable[[str], None]:
    if not sys.stderr.isatty():
        return lambda text: None

    def show(text: str) -> None:
        sys.stderr.write(f"\r\x1b[K        {text}")
        sys.stderr.flush()

    return show


def _clear_progress() -> None:
    if sys.stderr.isatty():
        sys.stderr.write("\r\x1b[K")
        sys.stderr.flush()


def _run_step(step: Step, demo: Demo) -> dict[str, object]:
    started = time.monotonic()
    problem = None
    text = ""
    figures: Figures = {}
    try:
        text, figures = step.work(demo)
    except (Problem, Error, OSError, ValueError, subprocess.SubprocessError) as error:
        problem = str(error) or type(error).__name__
    seconds = time.monotonic() - started
    return {"step": step.title, "seconds": round(seconds, 3), "problem": problem, "text": text, **figures}


def run_demo(
    write: Callable[[str], None],
    *,
    as_json: bool = False,
    directory: str | None = None,
    size: int = 256 << 20,
    data: int = 80 << 20,
    overlays: int = 1000,
) -> int:
    """Run all steps; *write* gets the text.  Returns 0, or 1 if a step found a problem.

    *size* is the virtual size of the disk and *data* how many bytes of files it
    gets; *directory* is where the temporary directory is made.
    """
    from qcowlib.cli.demo_steps import STEPS

    started = time.monotonic()
    results = []
    with tempfile.TemporaryDirectory(prefix="qcow-demo-", dir=directory) as name:
        show = (lambda text: None) if as_json else _terminal_progress()
        demo = Demo(Path(name), size=size, data=data, overlays=overlays, on_progress=show)
        if not as_json:
            judge = "judged by qemu-img" if demo.judge else "qemu-img is not installed, so nothing is judged by it"
            write(f"qcow demo: {len(STEPS)} steps in {name}, {judge}\n")
        for number, step in enumerate(STEPS, 1):
            result = _run_step(step, demo)
            results.append(result)
            if not as_json:
                _clear_progress()
                state = "ok" if result["problem"] is None else "PROBLEM"
                said = result["text"] if result["problem"] is None else result["problem"]
                write(f"{number:2} {result['seconds']:6.2f} s  {state}  {step.title}: {said}\n")
    problems = sum(result["problem"] is not None for result in results)
    seconds = time.monotonic() - started
    if as_json:
        summary = {
            "steps": results,
            "seconds": round(seconds, 3),
            "guest-bytes": demo.guest_bytes,
            "verdicts-of-qemu-img": demo.judge.verdicts if demo.judge else None,
            "problems": problems,
        }
        write(json.dumps(summary, indent=4) + os.linesep)
    else:
        verdicts = f", {demo.judge.verdicts} verdicts of qemu-img" if demo.judge else ""
        write(f"{seconds:.1f} s, {human_size(demo.guest_bytes)} of guest data checked{verdicts}, {problems} problems\n")
    return 1 if problems else 0
