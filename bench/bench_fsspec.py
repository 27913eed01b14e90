# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""An image over HTTP beside a raw file over HTTP: fsspec's own file object, with its cache, on the same guest bytes."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from scale import Scale

import qcowlib
from qcowlib.fs import Qcow2FileSystem

BLOCK = 4096
#: Serves the working directory by ranges on a free port, which it prints; the server of Python's library has none.
_SERVER = """
import os, re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        with open(self.path.lstrip("/"), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            wanted = re.fullmatch(r"bytes=(\\d+)-(\\d+)", self.headers.get("Range", ""))
            first, last = (int(wanted[1]), min(int(wanted[2]), size - 1)) if wanted else (0, size - 1)
            self.send_response(206 if wanted else 200)
            if wanted:
                self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
            self.send_header("ETag", '"1"')
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(last - first + 1))
            self.end_headers()
            if self.command == "GET":
                file.seek(first)
                self.wfile.write(file.read(last - first + 1))
    do_HEAD = do_GET
    def log_message(self, *_):
        pass
server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print(server.server_port, flush=True)
server.serve_forever()
"""


@pytest.fixture(scope="module")
def site(bench_dir: Path, half_zero: Path) -> Iterator[str]:
    """The address of a server that has the same disk as ``site.qcow2`` and as a raw file."""
    qcowlib.convert(half_zero, bench_dir / "site.qcow2", source_format="raw", cache="unsafe")
    command = [sys.executable, "-c", _SERVER]
    with subprocess.Popen(command, cwd=bench_dir, stdout=subprocess.PIPE, text=True) as server:
        if server.stdout is None:
            raise RuntimeError("the server says nothing")
        yield f"http://127.0.0.1:{server.stdout.readline().strip()}"
        server.terminate()
    (bench_dir / "site.qcow2").unlink()


@pytest.mark.parametrize("who", ["qcowlib", "fsspec"])
def bench_http_random_read(
    benchmark: Any, measure: Callable[..., None], site: str, half_zero: Path, scale: Scale, who: str
) -> None:
    benchmark.group = "HTTP through fsspec: random read, 4 KiB"
    chance = random.Random(5)
    # Each fetch is two requests here, which ask whether the object is still the same.
    places = [chance.randrange(scale.copy // BLOCK) * BLOCK for _ in range(min(scale.operations, 200))]

    def run() -> None:
        if who == "qcowlib":
            disk = Qcow2FileSystem(f"{site}/site.qcow2")
            found = [disk.cat_file("disk", at, at + BLOCK) for at in places]
        else:
            with fsspec.open(f"{site}/{half_zero.name}", block_size=256 << 10, cache_type="blockcache") as file:
                found = [(file.seek(at), file.read(BLOCK))[1] for at in places]
        with half_zero.open("rb") as raw:
            raw.seek(places[-1])
            assert found[-1] == raw.read(BLOCK)

    measure(run, who=who, amount=len(places), unit="read")
