# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Images through fsspec: over a real HTTP server, memory and local files; what is fetched, what is refused."""

from __future__ import annotations

import errno
import os
import random
import re
import threading
import tomllib
import zlib
from collections.abc import Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

import qcowlib
from qcowlib.fs import BlockCache, Qcow2FileSystem, RangeReader
from qcowlib.storage.memory import MemoryStorage

pytestmark = pytest.mark.bare

ROOT = Path(__file__).resolve().parents[2]
MiB = 1 << 20


class Web:
    """A server of *folder* on this machine that counts what it is asked; with *ranges* off it sends all.

    *tells* is the header by which clients know one state of a file from another.
    """

    def __init__(self, folder: Path) -> None:
        self.ranges = True
        self.tells = "ETag"
        self.reads: list[tuple[str, int]] = []
        web = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            folder_: ClassVar[Path] = folder

            def _send(self, body: bool) -> None:
                path = self.folder_ / self.path.partition("?")[0].lstrip("/")
                if not path.is_file():
                    self.send_error(404)
                    return
                data = path.read_bytes()
                state = formatdate(path.stat().st_mtime, usegmt=True)
                if web.tells == "ETag":
                    state = f'"{zlib.crc32(data)}"'
                wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
                if wanted and web.ranges:
                    first, last = int(wanted[1]), min(int(wanted[2]), len(data) - 1)
                    self.send_response(206)
                    self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
                    data = data[first : last + 1]
                else:
                    self.send_response(200)
                    self.send_header("Accept-Ranges", "bytes" if web.ranges else "none")
                if web.tells:
                    self.send_header(web.tells, state)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if body:
                    web.reads.append((path.name, len(data)))
                    self.wfile.write(data)

            def do_HEAD(self) -> None:
                self._send(False)

            def do_GET(self) -> None:
                self._send(True)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A chain of two in a folder, with a snapshot in the top one."""
    chance = random.Random(5)
    here = tmp_path / "images"
    here.mkdir()
    qcowlib.create(here / "base.qcow2", 64 * MiB)
    qcowlib.create(here / "disk.qcow2", 64 * MiB, backing="base.qcow2", backing_format="qcow2")
    for name, count in (("base.qcow2", 200), ("disk.qcow2", 60)):
        with qcowlib.open(here / name, "r+") as image:
            for _ in range(count):
                image.pwrite(chance.randbytes(65536), chance.randrange(1000) * 65536)
            if name == "disk.qcow2":
                image.create_snapshot("before")
                image.pwrite(b"after" * 1000, 30 * MiB)
    return here


@pytest.fixture
def web(folder: Path) -> Iterator[Web]:
    server = Web(folder)
    yield server
    server.close()


def content(path: Path, **options: Any) -> bytes:
    with qcowlib.open(path, **options) as image:
        return image.pread(image.size, 0)


def test_disk_over_http_is_read_by_ranges_and_little_is_fetched(web: Web, folder: Path) -> None:
    with fsspec.open(f"qcow2://disk::{web.url}/disk.qcow2") as file:
        file.seek(30 * MiB)
        assert file.read(10) == b"afterafter"
    names = [name for name, _ in web.reads]
    # The heads with the tables of both, and what holds the data.
    assert len(names) <= 8
    assert sum(size for _, size in web.reads) < 4 * MiB < (folder / "base.qcow2").stat().st_size
    assert set(names) == {"disk.qcow2", "base.qcow2"}


def test_all_of_a_chain_over_http_is_that_of_the_files(web: Web, folder: Path) -> None:
    fs = fsspec.filesystem("qcow2", fo=f"{web.url}/disk.qcow2", target_protocol="http")
    assert fs.ls("", detail=False) == ["disk", "snapshots"]
    assert fs.ls("snapshots", detail=False) == ["snapshots/before"]
    assert fs.info("disk") == {"name": "disk", "size": 64 * MiB, "type": "file"}
    assert fs.cat_file("disk") == content(folder / "disk.qcow2")
    assert fs.cat_file("snapshots/before") == content(folder / "disk.qcow2", snapshot="before")
    fetched = sum(size for _, size in web.reads)
    assert fetched < 3 * sum(path.stat().st_size for path in folder.iterdir())
    before = len(web.reads)
    assert fs.cat_file("disk", 30 * MiB, 30 * MiB + 5) == b"after"
    assert len(web.reads) <= before + 1


def test_server_without_ranges_is_an_error_and_not_wrong_bytes(web: Web) -> None:
    web.ranges = False
    with pytest.raises(qcowlib.StorageError, match="ranges"):
        fsspec.filesystem("qcow2", fo=f"{web.url}/disk.qcow2").cat_file("disk", 0, 10)


def test_server_that_says_it_has_no_ranges_is_asked_for_nothing(web: Web) -> None:
    web.ranges = False
    with pytest.raises(qcowlib.StorageError, match="does not serve ranges"):
        RangeReader(fsspec.filesystem("http"), f"{web.url}/disk.qcow2")
    assert not web.reads


@pytest.mark.parametrize("name", ["disk.qcow2", "base.qcow2"])
@pytest.mark.parametrize("tells", ["ETag", "Last-Modified"])
def test_object_that_changes_is_one_error_and_never_mixed_bytes(web: Web, folder: Path, name: str, tells: str) -> None:
    web.tells = tells
    before = content(folder / "disk.qcow2")
    fs = fsspec.filesystem("qcow2", fo=f"{web.url}/disk.qcow2", block_bytes=4096)
    layer = ("disk.qcow2", "base.qcow2").index(name)
    places = [one.start for one in fs._image().extents() if (one.kind, one.depth) == ("data", layer)]
    assert fs.cat_file("disk", places[0], places[0] + 512) == before[places[0] :][:512]
    path = folder / name
    # Of the same length, as an image that is written in place.
    path.write_bytes(path.read_bytes()[::-1])
    os.utime(path, (1, 1))
    for _ in range(2):
        with pytest.raises(qcowlib.StorageError, match=rf"{name}: the file changed") as caught:
            fs.cat_file("disk", places[-1], places[-1] + 512)
        assert caught.value.errno == errno.ESTALE
    # Nor from the cache, which holds the state before.
    with pytest.raises(qcowlib.StorageError, match="changed"):
        fs.cat_file("disk", places[0], places[0] + 512)


def test_object_that_shrinks_or_goes_is_an_error_that_says_so(web: Web, folder: Path) -> None:
    web.tells = ""
    path = folder / "disk.qcow2"
    reader = RangeReader(fsspec.filesystem("http"), f"{web.url}/disk.qcow2", block=4096)
    path.write_bytes(path.read_bytes()[: 1 << 20])
    with pytest.raises(qcowlib.StorageError, match="changed"):
        reader.pread(512, reader.size - 512)
    reader = RangeReader(fsspec.filesystem("http"), f"{web.url}/disk.qcow2", block=4096)
    path.unlink()
    with pytest.raises(qcowlib.StorageError, match=r"disk\.qcow2.*No such file"):
        reader.pread(512, 0)


def test_changes_are_not_looked_for_where_nobody_writes(web: Web, folder: Path) -> None:
    web.tells = "Last-Modified"
    path = folder / "disk.qcow2"
    reader = RangeReader(fsspec.filesystem("http"), f"{web.url}/disk.qcow2", check_changes=False)
    os.utime(path, (1, 1))
    assert reader.pread(512, 0) == path.read_bytes()[:512]


def test_object_in_memory_that_is_put_anew_has_changed() -> None:
    put("/anew/disk", "")
    fs = fsspec.filesystem("qcow2", fo="memory://anew/disk", block_bytes=512, cache_bytes=512)
    assert fs.cat_file("disk", 0, 4) == bytes(4)
    put("/anew/disk", "")
    with pytest.raises(qcowlib.StorageError, match="changed"):
        fs._reader.pread(4, 2048)


def test_what_is_not_there_is_told_with_its_name(web: Web, folder: Path) -> None:
    with pytest.raises(qcowlib.StorageError, match=r"none\.qcow2"):
        fsspec.filesystem("qcow2", fo=f"{web.url}/none.qcow2").info("disk")
    (folder / "base.qcow2").unlink()
    with pytest.raises(qcowlib.StorageError, match=r"base\.qcow2"):
        fsspec.filesystem("qcow2", fo=f"{web.url}/disk.qcow2").info("disk")
    fs = Qcow2FileSystem(str(folder / "disk.qcow2"), references="none")
    with pytest.raises(qcowlib.GateDenied):
        fs.info("disk")


def put(path: str, backing: str) -> None:
    """An image at *path* in memory that names *backing*."""
    storage = MemoryStorage(b"", name="top")
    below: Any = {"backing": backing, "backing_format": "qcow2", "check_backing": False} if backing else {}
    qcowlib.create(storage, MiB, **below)
    fsspec.filesystem("memory").pipe_file(path, storage.getvalue())


@pytest.mark.parametrize(
    "name", ["../base.qcow2", "/gate/base.qcow2", "a/../../x", "%2e%2e/x", "base.qcow2?x", "http://else/x", "./x"]
)
def test_names_that_lead_elsewhere_are_not_followed(name: str) -> None:
    put("/gate/top.qcow2", name)
    with pytest.raises(qcowlib.GateDenied):
        fsspec.filesystem("qcow2", fo="memory://gate/top.qcow2").info("disk")


def test_loop_of_backing_files_is_found() -> None:
    put("/loop/a", "b")
    put("/loop/b", "a")
    with pytest.raises(qcowlib.FormatError, match="infinite loop"):
        fsspec.filesystem("qcow2", fo="memory://loop/a").info("disk")


def test_local_files_and_memory_give_the_same(folder: Path) -> None:
    memory = fsspec.filesystem("memory")
    for path in folder.iterdir():
        memory.pipe_file(f"/same/{path.name}", path.read_bytes())
    expected = content(folder / "disk.qcow2")
    for target in (str(folder / "disk.qcow2"), "memory://same/disk.qcow2"):
        fs = fsspec.filesystem("qcow2", fo=target, block_bytes=4096, cache_bytes=65536)
        with fs.open("disk") as file:
            assert file.read() == expected
        assert fs.cat_file("disk", -5, None) == expected[-5:] and fs.cat_file("disk", 9, 3) == b""
        assert (
            fs.exists("disk")
            and not fs.exists("other")
            and fs.isdir("snapshots")
            and fs.find("")
            == [
                "disk",
                "snapshots/before",
            ]
        )
        fs.close()


def test_nothing_is_written_and_nonsense_is_refused(folder: Path) -> None:
    fs = Qcow2FileSystem(str(folder / "disk.qcow2"))
    with pytest.raises(qcowlib.ReadOnly):
        fs.open("disk", "wb")
    for wrong in ("other", "disk/more", "snapshots/none"):
        with pytest.raises(FileNotFoundError):
            fs.info(wrong)
    with pytest.raises(qcowlib.UsageError):
        Qcow2FileSystem("")
    with pytest.raises(qcowlib.UsageError):
        Qcow2FileSystem("x", references="all")
    fs.close()


def test_snapshots_of_one_name_are_found_by_id(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qcowlib.create(path, MiB)
    with qcowlib.open(path, "r+") as image:
        for number, name in enumerate(("same", "same", "with/slash")):
            image.pwrite(bytes([number]), 0)
            image.create_snapshot(name)
    fs = Qcow2FileSystem(str(path))
    assert fs.ls("snapshots", detail=False) == ["snapshots/same", "snapshots/2", "snapshots/3"]
    assert [fs.cat_file(f"snapshots/{name}", 0, 1)[0] for name in ("same", "2", "3")] == [0, 1, 2]
    fs.close()


class Fake:
    """A target in memory that counts and remembers the longest answer."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.calls: list[tuple[int, int]] = []

    def info(self, path: str) -> dict[str, object]:
        return {"size": len(self.data)}

    def cat_file(self, path: str, start: int, end: int) -> bytes:
        self.calls.append((start, end))
        return self.data[start:end]


@given(st.lists(st.tuples(st.integers(0, 9000), st.integers(0, 5000)), max_size=20), st.integers(1, 4))
def test_any_reads_are_right_and_the_cache_is_bounded(reads: list[tuple[int, int]], blocks: int) -> None:
    target = Fake(random.Random(1).randbytes(8000))
    cache = BlockCache(512 * blocks)
    readers = [RangeReader(target, name, block=512, cache=cache) for name in ("x", "y")]
    for number, (offset, length) in enumerate(reads):
        assert readers[number % 2].pread(length, offset) == target.data[offset : offset + length]
        assert cache.held <= 512 * blocks
    assert all(0 <= start < end <= 8000 for start, end in target.calls)


def test_neighbours_are_fetched_by_one_request_and_once() -> None:
    target = Fake(bytes(1 << 16))
    reader = RangeReader(target, "x", block=4096, cache=1 << 16)
    reader.pread(8000, 100)
    reader.pread(10, 5000)
    reader.pread(3 * 4096 - 1, 1)
    assert target.calls == [(0, 8192), (8192, 12288)]


@pytest.mark.parametrize("size", [None, "12", -1, True])
def test_target_without_a_size_is_refused(size: object) -> None:
    target = Fake(b"")
    target.info = lambda path: {"size": size}  # type: ignore[method-assign]
    with pytest.raises(qcowlib.StorageError, match="size"):
        RangeReader(target, "x")


def test_entry_point_names_the_class() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        entry = tomllib.load(file)["project"]["entry-points"]["fsspec.specs"]["qcow2"]
    module, _, name = entry.partition(":")
    assert getattr(import_module(module), name) is Qcow2FileSystem
