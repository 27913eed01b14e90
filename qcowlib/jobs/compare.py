# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Whether two images show the same bytes, as ``qemu-img compare`` judges it.

The maps are compared first: where both read as zeros, or both mean the same
bytes of the same file, nothing is read.

Invariant: the answer is that of the lowest differing offset, whatever the
number of workers; reading stops there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Literal, NamedTuple

from qcowlib.driver import COMPRESSED, DATA, HOLE, NO_OFFSET, SPARSE
from qcowlib.errors import Error, printable
from qcowlib.gate import References, qemu_like
from qcowlib.image import Image
from qcowlib.image import open as open_image
from qcowlib.jobs.copy import read_error
from qcowlib.jobs.pipeline import DEFAULT_MEMORY, Control, Turn, run
from qcowlib.jobs.plan import BUFFER, Part, Run, Source, clip
from qcowlib.native import RunList, first_difference, zero_runs
from qcowlib.units import SECTOR

if TYPE_CHECKING:
    from qcowlib.image import CacheMode
    from qcowlib.opening import Secrets
    from qcowlib.opening import Source as OpenSource

__all__ = ["Comparison", "Verdict", "compare", "part_of", "reads_zero", "runs_to", "same_place"]

Verdict = Literal["identical", "content", "size", "status"]


class Comparison(NamedTuple):
    """The result; true when the images are identical.

    ``verdict`` names what differs first: ``content`` at ``offset`` (start of a
    512-byte sector), in strict mode also ``size`` or the allocation ``status``
    at ``offset``.  ``size_differs`` is set when only the sizes were found to
    differ up to the shorter one's end; zeros behind it are no difference.
    """

    verdict: Verdict
    offset: int | None = None
    size_differs: bool = False

    def __bool__(self) -> bool:
        return self.verdict == "identical"


class _Pair(NamedTuple):
    """*length* bytes from *start*; ``None`` stands for zeros.  Without bytes: the status differs here."""

    start: int
    length: int
    left: Part | None
    right: Part | None


class _Differs(Exception):
    """A worker found the first difference."""

    def __init__(self, result: Comparison) -> None:
        super().__init__(result)
        self.result = result


def compare(
    a: OpenSource | Image,
    b: OpenSource | Image,
    *,
    format_a: str | None = None,
    format_b: str | None = None,
    strict: bool = False,
    references: References = qemu_like,
    cache: CacheMode = "writeback",
    force_share: bool = False,
    secret: Secrets | None = None,
    progress: Callable[[int, int], object] | None = None,
    cancel: Callable[[], bool] | None = None,
    workers: int | None = None,
    memory: int = DEFAULT_MEMORY,
) -> Comparison:
    """Compare the guest bytes of two images; in *strict* mode also size and allocation.

    Raises: any error of opening; StorageError and CorruptImage for what cannot
    be read; Cancelled.
    """
    control = Control(progress=progress, cancel=cancel, workers=workers, memory=memory)
    with ExitStack() as stack:
        images = []
        for one, format in ((a, format_a), (b, format_b)):
            image = one if isinstance(one, Image) else open_image(
                one, format=format, references=references, cache=cache, force_share=force_share, secret=secret
            )  # fmt: skip
            if image is not one:
                stack.callback(image.close)
            images.append(image)
        return _compare(images[0], images[1], strict, control)


def _compare(a: Image, b: Image, strict: bool, control: Control) -> Comparison:
    size_differs = a.size != b.size
    if strict and size_differs:
        return Comparison("size", None, True)
    shorter = min(a.size, b.size)
    control.begin(max(a.size, b.size))

    def work(pair: _Pair, buffer: memoryview, turn: Turn) -> int:
        found: Comparison | None = None
        failed: Error | None = None
        try:
            found = _difference(pair, buffer)
        except Error as error:
            failed = error
        with turn:
            if failed is not None:
                raise failed
            if found is not None:
                raise _Differs(found._replace(size_differs=size_differs and pair.start >= shorter))
        return pair.length

    # Half of a buffer for each side.
    half = BUFFER // 2
    try:
        run(_pairs(a, b, strict, half), work, control, buffer_size=2 * half, amount=control.total)
    except _Differs as difference:
        return difference.result
    control.end()
    return Comparison("identical", None, size_differs)


def _difference(pair: _Pair, buffer: memoryview) -> Comparison | None:
    if not pair.length:
        return Comparison("status", pair.start)
    views = []
    for number, part in enumerate((pair.left, pair.right)):
        if part is None:
            continue
        view = buffer[number * pair.length : (number + 1) * pair.length]
        image = part.source.image
        try:
            image.read_runs(part.runs, view, part.base)
        except Error as error:
            text = f"Error while reading offset {{}} of {printable(image.path).replace('{', '{{').replace('}', '}}')}"
            raise read_error(part, error, pair.start, text) from error
        views.append(view)
    if len(views) == 2:
        found = first_difference(views[0], views[1])
        return None if found is None else Comparison("content", pair.start + found)
    start, used, zero = zero_runs(views[0], SECTOR)[0]
    if zero and used == pair.length:
        return None
    return Comparison("content", pair.start + (used if zero else start))


def runs_to(source: Source, end: int) -> Iterator[Run]:
    """The runs of an image, then zeros up to *end*."""
    image, offset = source.image, 0
    while offset < image.size:
        for kind, guest, length, host, layer in image.map(offset, image.size - offset):
            yield Run(0, guest, length, source, kind, guest, host, layer)
            offset = guest + length
    if offset < end:
        yield Run(0, offset, end - offset, source, HOLE, offset, NO_OFFSET, 0)


def _pairs(a: Image, b: Image, strict: bool, most: int) -> Iterator[_Pair]:
    """Yield what must be read; a pair ends where one side's map changes, and at *most* bytes."""
    end = max(a.size, b.size)
    left_runs, right_runs = runs_to(Source(a, 0), end), runs_to(Source(b, 0), end)
    left = right = None
    position = 0
    while position < end:
        if left is None or left.start + left.length <= position:
            left = next(left_runs)
        if right is None or right.start + right.length <= position:
            right = next(right_runs)
        stop = min(left.start + left.length, right.start + right.length)
        if strict and _status(left) != _status(right):
            yield _Pair(position, 0, None, None)
            return
        known = (reads_zero(left) and reads_zero(right)) or same_place(left, right, position)
        for start in range(position, position if known else stop, most):
            upto = min(start + most, stop)
            yield _Pair(start, upto - start, part_of(left, start, upto), part_of(right, start, upto))
        position = stop


def reads_zero(run: Run) -> bool:
    """Whether the map alone tells that *run* reads as zeros."""
    return run.kind not in (DATA, COMPRESSED)


def _status(run: Run) -> tuple[bool, bool, bool, bool, bool]:
    """Data, zero, allocated, with an offset, last: what strict mode wants equal.  Source: qemu's flags."""
    data = run.kind in (DATA, COMPRESSED, SPARSE)
    zero = run.kind not in (DATA, COMPRESSED)
    offset = run.kind != COMPRESSED and run.host != NO_OFFSET
    return data, zero, run.kind != HOLE, offset, run.start + run.length == run.source.image.size


def same_place(left: Run, right: Run, position: int) -> bool:
    """Whether both sides are the same bytes of the same file."""
    if left.kind != right.kind or left.kind != DATA:
        return False
    one, two = left.source.image.layers[left.layer], right.source.image.layers[right.layer]
    identity = getattr(one.data, "identity", None)
    if identity is None or identity != getattr(two.data, "identity", None) or not (one.plain and two.plain):
        return False
    return left.host + position - left.start == right.host + position - right.start


def part_of(run: Run, start: int, end: int) -> Part | None:
    """Return what to read for [start, end) of *run*; ``None`` for zeros."""
    if reads_zero(run):
        return None
    runs = RunList()
    clip(run, start, end, runs)
    return Part(run.source, runs, start, end - start)
