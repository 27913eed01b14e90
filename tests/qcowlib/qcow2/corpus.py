# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Small images with every feature, made by qemu-img, and ways to damage them."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import NamedTuple

from hypothesis import strategies as st

from qcowlib.errors import printable
from qcowlib.ondisk import Header
from qcowlib.qcow2.check import Report

SECRET = ["--object", "secret,id=key,data=word"]
WRITES = ["write -P 1 0 20k", "write -P 2 100k 8k", "write -z 64k 8k", "write -P 3 300k 5k", "discard 4k 4k"]
OPTIONS = {
    "plain": "cluster_size=4k",
    "v2": "cluster_size=4k,compat=0.10",
    "smallest": "cluster_size=512",
    "bits1": "cluster_size=512,refcount_bits=1",
    "bits2": "cluster_size=1k,refcount_bits=2",
    "bits4": "cluster_size=4k,refcount_bits=4",
    "bits8": "cluster_size=4k,refcount_bits=8",
    "bits32": "cluster_size=1k,refcount_bits=32",
    "bits64": "cluster_size=512,refcount_bits=64",
    "extended": "cluster_size=16k,extended_l2=on",
    "zstd": "cluster_size=4k,compression_type=zstd",
    "metadata": "cluster_size=4k,preallocation=metadata",
    "snapshots": "cluster_size=4k",
    "snapshots-extended": "cluster_size=16k,extended_l2=on",
    "bitmaps": "cluster_size=4k",
    "compressed": "cluster_size=4k",
    "data-file": "cluster_size=4k,data_file=DATA",
    "luks": "cluster_size=4k,encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10",
}


def run(*command: str | Path) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([str(word) for word in command], capture_output=True, check=False, timeout=120)


def good(*command: str | Path) -> None:
    result = run(*command)
    for _ in range(20):
        # qemu times its key derivation and gives up on a busy machine.
        if b"accurate CPU usage" not in result.stderr:
            break
        result = run(*command)
    assert result.returncode == 0, result.stderr


def make(folder: Path, name: str) -> Path:
    """Make the image *name* of :data:`OPTIONS` in *folder*."""
    path = folder / f"{name}.qcow2"
    options = OPTIONS[name].replace("DATA", str(folder / f"{name}.data"))
    good("qemu-img", "create", *SECRET, "-f", "qcow2", "-o", options, path, "512k")
    target = ["-f", "qcow2", path]
    if name == "luks":
        target = ["--image-opts", f"driver=qcow2,encrypt.key-secret=key,file.filename={path}"]
    writes = [word for write in WRITES for word in ("-c", write)]
    good("qemu-io", *SECRET, *writes, *target)
    if name.startswith("snapshots"):
        good("qemu-img", "snapshot", "-c", "one", path)
        good("qemu-io", "-c", "write -P 9 2k 9k", "-c", "write -P 9 200k 3k", path)
        good("qemu-img", "snapshot", "-c", "two", path)
    if name == "bitmaps":
        good("qemu-img", "bitmap", "--add", "-g", "512", path, "b0")
        good("qemu-img", "bitmap", "--add", "--disable", "-g", "64k", path, "b1")
        good("qemu-io", "-c", "write -P 4 8k 30k", path)
    if name in {"compressed", "zstd"}:
        good("qemu-io", "-c", "write -c -P 5 128k 4k", "-c", "write -c -P 6 132k 4k", "-c", "write -c 140k 4k", path)
    return path


def qemu_check(path: Path, *, luks: bool = False, repair: str | None = None) -> subprocess.CompletedProcess[bytes]:
    words = ["-r", repair] if repair else []
    target = ["-f", "qcow2", path]
    if luks:
        target = ["--image-opts", f"driver=qcow2,encrypt.key-secret=key,file.filename={path}"]
    return run("qemu-img", "check", *SECRET, "--output=json", *words, *target)


def lines(report: Report) -> list[str]:
    """The lines that qemu-img prints for the findings."""
    return [("qemu-img: " if found.prefixed else "") + found.message for found in report.findings]


def qemu_lines(result: subprocess.CompletedProcess[bytes]) -> list[str]:
    """Its lines about findings, with what an image can forge escaped as ours are."""
    found = [printable(line) for line in result.stderr.split(b"\n")]
    return [line for line in found if line and not line.startswith("qemu-img: Check failed")]


KEYS = {
    "check_errors": "check-errors",
    "corruptions": "corruptions",
    "leaks": "leaks",
    "image_end_offset": "image-end-offset",
    "total_clusters": "total-clusters",
    "allocated_clusters": "allocated-clusters",
    "fragmented_clusters": "fragmented-clusters",
    "compressed_clusters": "compressed-clusters",
}


def counts(report: Report) -> dict[str, int]:
    """The report as qemu-img's JSON has it: zeros left out."""
    return {key: getattr(report, name) for name, key in KEYS.items() if getattr(report, name)}


def qemu_counts(result: subprocess.CompletedProcess[bytes]) -> dict[str, int]:
    found = json.loads(result.stdout)
    return {key: found[key] for key in KEYS.values() if found.get(key)}


class Region(NamedTuple):
    """A part of the file that mutations change."""

    name: str
    offset: int
    length: int


def regions(data: bytes) -> list[Region]:
    """The metadata of a sound image."""
    header = Header.parse(data, len(data), repair=True)
    size = header.cluster_size
    table = header.refcount_table_offset
    found = [Region("refcount table", table, 32)]
    for at in range(table, table + header.refcount_table_clusters * size, 8):
        block = int.from_bytes(data[at : at + 8], "big")
        if block:
            found.append(Region("refcount block", block, min(size, 256)))
    found.append(Region("L1", header.l1_table_offset, header.l1_size * 8))
    for index in range(header.l1_size):
        at = header.l1_table_offset + 8 * index
        offset = int.from_bytes(data[at : at + 8], "big") & 0x00FF_FFFF_FFFF_FE00
        if offset:
            found.append(Region("L2", offset, min(size, 512)))
    if header.nb_snapshots:
        found.append(Region("snapshots", header.snapshots_offset, 96))
        offset = int.from_bytes(data[header.snapshots_offset : header.snapshots_offset + 8], "big")
        found.append(Region("snapshot L1", offset, 16))
    if header.bitmaps is not None:
        place = header.bitmaps.directory_offset
        found.append(Region("bitmap directory", place, header.bitmaps.directory_size))
        found.append(Region("bitmap table", int.from_bytes(data[place : place + 8], "big"), 8))
    return found


WORDS = st.sampled_from(
    [0, 1, 1 << 63, 1 << 62, (1 << 64) - 1, 0x1000, 0x2200, 1 << 63 | 0x3000, 1 << 63 | 0x5001, 0x8000_0000, 1 << 57]
)


class Image:
    """The bytes of one image, shown by its name."""

    def __init__(self, name: str, data: bytes) -> None:
        self.name = name
        self.data = data
        self.regions = regions(data)

    def __repr__(self) -> str:
        return f"<{self.name}>"


class Edit(NamedTuple):
    """One 64-bit word of the file that is replaced."""

    offset: int
    word: int


@st.composite
def damages(draw: st.DrawFn, image: Image) -> list[Edit]:
    """Changes of one to four words of the metadata of *image*."""
    edits = []
    for _ in range(draw(st.integers(1, 4))):
        region = draw(st.sampled_from(image.regions))
        at = region.offset + 8 * draw(st.integers(0, max(region.length // 8 - 1, 0)))
        word = int.from_bytes(image.data[at : at + 8], "big")
        kind = draw(st.sampled_from(["flip", "flip", "set", "add", "copy"]))
        if kind == "flip":
            word ^= 1 << draw(st.integers(0, 63))
        elif kind == "set":
            word = draw(WORDS)
        elif kind == "add":
            word += draw(st.sampled_from([512, 4096, 1, -4096, 65536]))
        else:
            other = draw(st.sampled_from(image.regions))
            word = int.from_bytes(image.data[other.offset : other.offset + 8], "big")
        edits.append(Edit(at, word % (1 << 64)))
    return edits


def damaged(image: Image, edits: list[Edit]) -> bytes:
    """The bytes of *image* with *edits* made."""
    result = bytearray(image.data)
    for edit in edits:
        result[edit.offset : edit.offset + 8] = edit.word.to_bytes(8, "big")
    return bytes(result)
