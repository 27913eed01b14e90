# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""``bench``: time requests of one kind.

Invariant: exactly the requests announced are made; offsets wrap at the end of
the image.
"""

from __future__ import annotations

import threading
import time

from qcowlib.cli import options
from qcowlib.cli.console import Console, Failure
from qcowlib.cli.jsonout import pretty
from qcowlib.cli.objects import parse_secrets
from qcowlib.cli.opening import open_image
from qcowlib.cli.parser import Args, Command, Option
from qcowlib.cli.values import parse_decimal, size_option
from qcowlib.errors import Cancelled, Error

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from qcowlib.image import Image

__all__ = ["COMMAND", "run"]

_MAX_INT = (1 << 31) - 1
#: Threads beyond this bring nothing; the queue depth may be larger.
_MAX_THREADS = 64


def _count(what: str, high: int = _MAX_INT) -> Callable[[str, Console], int]:
    def convert(text: str, _console: Console) -> int:
        value = parse_decimal(text)
        if value is None or value > high:
            raise Failure(f"Invalid {what} specified")
        return value

    return convert


def _pattern(text: str, _console: Console) -> int:
    try:
        value = int(text, 0)
    except ValueError:
        value = -1
    if not 0 <= value <= 255:
        raise Failure("Invalid pattern byte specified")
    return value


def _size(name: str, high: int) -> Callable[[str, Console], int]:
    return lambda text, console: size_option(name, text, console, high=high)


def _cache(text: str, _console: Console) -> str:
    if text not in options.CACHE_MODES:
        raise Failure("Invalid cache mode")
    return text


def _aio(text: str, _console: Console) -> str:
    if text not in ("threads", "native", "io_uring"):
        raise Failure(f"Invalid aio option: {text}")
    return text


COMMAND = Command(
    "bench",
    "Time reads or writes of an image.",
    "FILE",
    (
        options.HELP,
        Option("c", "", "count", "how many requests (75000)", meta="COUNT", convert=_count("request count")),
        Option("d", "", "depth", "requests in parallel (64)", meta="DEPTH", convert=_count("queue depth")),
        options.FORMAT,
        Option(
            "",
            "flush-interval",
            "flush",
            "flush after this many writes",
            meta="COUNT",
            convert=_count("flush interval"),
        ),
        Option("i", "", "aio", "accepted for compatibility", meta="AIO", convert=_aio),
        Option("n", "", "native", "accepted for compatibility"),
        Option("", "no-drain", "no-drain", "do not wait for other requests before a flush"),
        Option("o", "", "offset", "where to start", meta="OFFSET", convert=_size("offset", (1 << 63) - 1)),
        Option("", "pattern", "pattern", "the byte to write (0)", meta="BYTE", convert=_pattern),
        options.QUIET,
        Option("s", "", "size", "bytes of a request (4096)", meta="SIZE", convert=_size("buffer size", _MAX_INT)),
        Option("S", "", "step", "distance of requests (the size)", meta="SIZE", convert=_size("step_size", _MAX_INT)),
        Option("t", "", "cache", "cache mode", meta="CACHE", convert=_cache),
        Option("w", "", "write", "write instead of reading"),
        options.FORCE_SHARE,
        options.IMAGE_OPTS,
        options.OBJECT,
        options.OUTPUT_EXTRA,
    ),
    "bench -c 10000 -d 8 -s 64k disk.qcow2",
)


class Plan:
    """The requests to make."""

    __slots__ = ("count", "depth", "flush", "offset", "pattern", "size", "step", "write")

    def __init__(self, args: Args) -> None:
        self.count = _or(args.number("count"), 75000)
        self.depth = _or(args.number("depth"), 64)
        self.size = _or(args.number("size"), 4096)
        self.step = args.number("step") or self.size
        self.offset = _or(args.number("offset"), 0)
        self.flush = _or(args.number("flush"), 0)
        self.pattern = _or(args.number("pattern"), 0)
        self.write = args.flag("write")
        if self.depth < 1:
            raise Failure("Invalid queue depth specified")
        if self.flush and not self.write:
            raise Failure("--flush-interval is only available in write tests")
        if self.flush and self.flush < self.depth:
            raise Failure("Flush interval can't be smaller than depth")

    def offsets(self, image_size: int) -> Iterator[tuple[int, int]]:
        """Yield (number, offset) of each request."""
        offset = self.offset
        for number in range(1, self.count + 1):
            yield number, offset
            offset += self.step
            if image_size <= self.size:
                offset = 0
            else:
                offset %= image_size - self.size


def _or(value: int | None, default: int) -> int:
    return default if value is None else value


def run(args: Args, console: Console) -> int:
    """Run ``bench``."""
    ref = options.single_image(args)
    as_json = options.wants_json(args)
    plan = Plan(args)
    secrets = parse_secrets(args.texts("object"))
    mode = args.text("cache") or "writeback"
    with open_image(
        ref,
        console,
        secrets=secrets,
        writable=plan.write,
        force_share=args.flag("force-share"),
        cache="none" if mode == "off" else mode,
    ) as image:
        if not as_json:
            verb = "write" if plan.write else "read"
            console.out(
                f"Sending {plan.count} {verb} requests, {plan.size} bytes each, {plan.depth} in parallel "
                f"(starting at offset {plan.offset}, step size {plan.step})\n"
            )
            if plan.flush:
                console.out(f"Sending flush every {plan.flush} requests\n")
        start = time.perf_counter()
        _send(image, plan)
        seconds = time.perf_counter() - start
    if as_json:
        console.out(
            pretty({"requests": plan.count, "bytes": plan.count * plan.size, "nanoseconds": int(seconds * 1e9)})
        )
    else:
        console.out(f"Run completed in {seconds:3.3f} seconds.\n")
    return 0


def _send(image: Image, plan: Plan) -> None:
    requests = plan.offsets(image.size)
    lock = threading.Lock()
    errors: list[Error] = []

    def work() -> None:
        buffer = bytearray([plan.pattern]) * plan.size
        while not errors:
            with lock:
                item = next(requests, None)
            if item is None:
                return
            try:
                _request(image, plan, *item, buffer)
            except Error as error:
                errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(min(plan.depth, _MAX_THREADS, max(plan.count, 1)) - 1)]
    for thread in threads:
        thread.start()
    try:
        work()
    except BaseException:
        errors.append(Cancelled("interrupted"))  # the threads see it and end
        raise
    for thread in threads:
        thread.join()
    if errors:
        raise Failure(f"Failed request: {getattr(errors[0], 'strerror', None) or 'Input/output error'}")


def _request(image: Image, plan: Plan, number: int, offset: int, buffer: bytearray) -> None:
    if plan.write:
        image.pwrite(buffer, offset)
        if plan.flush and number % plan.flush == 0:
            image.flush()
    elif image.preadinto(buffer, offset) < len(buffer):
        raise Error("Input/output error")
