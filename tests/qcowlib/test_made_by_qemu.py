# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Images of every feature, made by qemu-img and qemu-io, are read right: bytes, map, check, snapshots."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import qcowlib
from tests.qcowlib.qemu import our_map, qemu_img, qemu_map, run

pytestmark = pytest.mark.real("qemu-img", "qemu-io")

KIB, MIB = 1024, 1024 * 1024
SIZE = 3 * MIB + 3 * 512
SIZES = [512 << shift for shift in range(13)]
SECRET = ["--object", "secret,id=s,data=pass"]


def fill(path: Path, *, compressed: int = 0, more: tuple[str, ...] = ()) -> None:
    """Write, zero, discard; with *compressed* (the cluster size) some clusters packed, that hardly compress too."""
    commands = [
        "write -P 17 0 70000",
        "write -P 18 200000 300000",
        "write -z 220000 100000",
        "write -z -u 600000 300000",
        "write -P 19 1000000 700000",
        "discard 1100000 200000",
        f"write -P 20 {SIZE - 100} 100",
    ]
    if compressed:
        at = -(-1_800_000 // compressed) * compressed
        count = max(1, min(40, (SIZE - at) // compressed - 1))
        if at + compressed <= SIZE:
            noise = path.with_suffix(".noise")
            noise.write_bytes(os.urandom(compressed // 3) + bytes(compressed - compressed // 3))
            for number in range(count):
                source = f"-s {noise}" if number % 3 == 0 else f"-P {number + 30}"
                commands.append(f"write -c {source} {at + number * compressed} {compressed}")
    words = [word for command in (*commands, *more) for word in ("-c", command)]
    run("qemu-io", "-d", "unmap", "-t", "unsafe", "-f", "qcow2", *words, path)


def expect_same(path: Path) -> None:
    """What qemu reads of *path* is what we read, by small pieces too; so are the map and the check."""
    out = path.with_suffix(".out")
    qemu_img("convert", "-f", "qcow2", "-O", "raw", path, out)
    content = out.read_bytes()
    with qcowlib.open(path) as image:
        assert image.pread(image.size, 0) == content
        for at in range(0, image.size, 99_991):
            assert image.pread(3000, at) == content[at : at + 3000]
        assert our_map(image) == qemu_map(path)
        report = image.check()
        assert (report.corruptions, report.leaks, report.check_errors) == (0, 0, 0)


@pytest.mark.parametrize("codec", ["zlib", "zstd"])
@pytest.mark.parametrize("cluster", SIZES)
def test_each_cluster_size_with_each_codec(tmp_path: Path, cluster: int, codec: str) -> None:
    path = tmp_path / "image"
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"cluster_size={cluster},compression_type={codec}", path, str(SIZE))
    fill(path, compressed=cluster)
    expect_same(path)
    packed = tmp_path / "packed"
    options = f"cluster_size={cluster},compression_type={codec}"
    qemu_img("convert", "-c", "-O", "qcow2", "-o", options, path, packed)
    expect_same(packed)


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16, 32, 64])
def test_each_refcount_width(tmp_path: Path, bits: int) -> None:
    path = tmp_path / "image"
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"refcount_bits={bits},cluster_size=1k", path, str(SIZE))
    fill(path, compressed=KIB)
    expect_same(path)


@pytest.mark.parametrize("cluster", SIZES[5:])
def test_subclusters_of_each_size_over_a_base(tmp_path: Path, cluster: int) -> None:
    qemu_img("create", "-q", "-f", "qcow2", tmp_path / "base", "2M")
    run("qemu-io", "-f", "qcow2", "-c", "write -P 77 100000 1900000", tmp_path / "base")
    path = tmp_path / "image"
    options = f"extended_l2=on,cluster_size={cluster}"
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, "-b", "base", "-F", "qcow2", path, str(SIZE))
    fill(path, compressed=cluster, more=("write -P 5 512 512", "write -z 3000 512", "write -P 6 1500000 1"))
    expect_same(path)


@pytest.mark.parametrize("raw", ["on", "off"])
@pytest.mark.parametrize("name", ["relative", "absolute"])
def test_an_external_data_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, raw: str) -> None:
    monkeypatch.chdir(tmp_path)
    data = "data" if name == "relative" else str(tmp_path / "data")
    path = tmp_path / "image"
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"data_file={data},data_file_raw={raw}", path, str(SIZE))
    fill(path)
    expect_same(path)
    with qcowlib.open("image", data_file=tmp_path / "data") as image:
        assert image.pread(4, 100) == b"\x11" * 4


@pytest.mark.parametrize("options", ["", "data_file=data", "extended_l2=on", "cluster_size=4k"])
@pytest.mark.parametrize("mode", ["off", "metadata", "falloc", "full"])
def test_each_preallocation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, options: str) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "image"
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"preallocation={mode},{options}".rstrip(","), path, str(SIZE))
    expect_same(path)
    fill(path)
    expect_same(path)


def json_name(**fields: object) -> str:
    return "json:" + json.dumps(fields)


BACKING_NAMES = {
    "relative": ("base", "qcow2"),
    "in a folder": ("folder/../base", "qcow2"),
    "absolute": ("{folder}/base", "qcow2"),
    "file:": ("file:{folder}/base", "qcow2"),
    "json, nested": (json_name(driver="qcow2", file={"driver": "file", "filename": "{folder}/base"}), "qcow2"),
    "json, dotted": (
        json_name(**{"driver": "qcow2", "file.driver": "file", "file.filename": "{folder}/base"}),
        "qcow2",
    ),
}


@pytest.mark.parametrize("kind", BACKING_NAMES)
def test_each_form_of_a_backing_name(tmp_path: Path, kind: str) -> None:
    (tmp_path / "folder").mkdir()
    qemu_img("create", "-q", "-f", "qcow2", tmp_path / "base", "2M")
    run("qemu-io", "-f", "qcow2", "-c", "write -P 77 100000 1900000", tmp_path / "base")
    name, fmt = BACKING_NAMES[kind]
    name = name.replace("{folder}", str(tmp_path))
    path = tmp_path / "image"
    qemu_img("create", "-q", "-f", "qcow2", "-b", name, "-F", fmt, path, str(SIZE))
    fill(path, compressed=65536)
    expect_same(path)


@pytest.mark.parametrize("base_size", ["1M", "3M", "5M"])
@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
def test_bases_of_other_lengths(tmp_path: Path, fmt: str, base_size: str) -> None:
    base, path = tmp_path / "base", tmp_path / "image"
    qemu_img("create", "-q", "-f", fmt, base, base_size)
    run("qemu-io", "-f", fmt, "-c", "write -P 77 100000 800000", base)
    qemu_img("create", "-q", "-f", "qcow2", "-b", "base", "-F", fmt, path, str(SIZE))
    fill(path, compressed=65536)
    expect_same(path)


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
def test_snapshots_by_id_and_name(tmp_path: Path, compat: str) -> None:
    path, out = tmp_path / "image", tmp_path / "out"
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"compat={compat}", path, str(SIZE))
    for number, name in enumerate(("first", "zweiter ü", "3")):
        run("qemu-io", "-f", "qcow2", "-c", f"write -P {number + 1} {number * 100000} 500000", path)
        qemu_img("snapshot", "-c", name, path)
    run("qemu-io", "-f", "qcow2", "-c", "write -z 0 2M", path)
    expect_same(path)
    for key, spec in (("first", "name=first"), ("2", "id=2"), ("zweiter ü", "id=2"), ("3", "id=3")):
        qemu_img("convert", "-l", f"snapshot.{spec}", "-O", "raw", path, out)
        with qcowlib.open(path, snapshot=key) as image:
            assert image.pread(image.size, 0) == out.read_bytes()


@pytest.mark.parametrize("kind", ["luks", "aes"])
def test_encrypted_images_with_their_key(tmp_path: Path, kind: str) -> None:
    path, out = tmp_path / "image", tmp_path / "out"
    if kind == "luks":
        qemu_img("create", "-q", *SECRET, "-f", "qcow2", "-o",
                 "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10", path, "2M")  # fmt: skip
        wanted = f"driver=qcow2,file.filename={path},encrypt.key-secret=s"
        run("qemu-io", *SECRET, "--image-opts", wanted, "-c", "write -P 9 1000 700000", "-c", "write -z 0 2k")
        qemu_img("convert", *SECRET, "--image-opts", wanted, "-O", "raw", out)
    else:
        # qemu only converts from it any more: what it made is read back as what went in.
        plain = tmp_path / "plain"
        plain.write_bytes(b"\x09" * 700000 + bytes(2 * MIB - 700000))
        options = "encrypt.format=aes,encrypt.key-secret=s"
        qemu_img("convert", *SECRET, "-O", "qcow2", "-o", options, plain, path)
        out.write_bytes(plain.read_bytes())
    with pytest.raises(qcowlib.Error):
        qcowlib.open(path)
    with qcowlib.open(path, secret="pass") as image:
        assert image.pread(image.size, 0) == out.read_bytes()
