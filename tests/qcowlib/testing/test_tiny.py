# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""The small images are valid: qemu-img and the reference reader agree on each."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from qcowlib.testing.reference import reference_check, reference_read, reference_snapshots
from qcowlib.testing.tiny import TinySpec, build

pytestmark = pytest.mark.real("qemu-img")

SPECS = [
    TinySpec(),
    TinySpec(version=2),
    TinySpec(cluster_bits=9),
    TinySpec(cluster_bits=16, size=1 << 20),
    TinySpec(cluster_bits=16, size=1 << 20, extended_l2=True),
    TinySpec(cluster_bits=14, extended_l2=True, zstd=True),
    TinySpec(zstd=True),
    TinySpec(snapshot=True, bitmap=True),
    TinySpec(version=2, snapshot=True),
    TinySpec(refcount_order=1, snapshot=True),
    *(TinySpec(refcount_order=order) for order in range(7)),
    TinySpec(bitmap=True, extensions=((0x12345678, b"unknown"),), compatible=1),
    TinySpec(cluster_bits=9, size=(1 << 20) + 512),
]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_tiny_images_are_clean_and_read_as_said(tmp_path: Path, spec: TinySpec) -> None:
    image = build(spec)
    path = tmp_path / "image"
    path.write_bytes(image.raw)
    check = subprocess.run(["qemu-img", "check", "-f", "qcow2", str(path)], capture_output=True, text=True)
    assert check.returncode == 0, check.stdout + check.stderr
    raw = tmp_path / "raw"
    subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(path), str(raw)], check=True)
    assert raw.read_bytes() == image.guest == reference_read(image.raw)
    ours = reference_check(image.raw)
    assert (ours.corruptions, ours.leaks) == (0, 0), ours.messages
    assert [entry.name for entry in reference_snapshots(image.raw)] == ["snap"] * spec.snapshot
    if spec.snapshot:
        assert reference_read(image.raw, snapshot="snap") == image.guest


def test_tiny_images_have_data_files_and_backing_names(tmp_path: Path) -> None:
    image = build(TinySpec(data_file=str(tmp_path / "data").encode(), compressed=False))
    (tmp_path / "data").write_bytes(image.data_file)
    (tmp_path / "image").write_bytes(image.raw)
    raw = tmp_path / "raw"
    subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(tmp_path / "image"), str(raw)], check=True)
    assert raw.read_bytes() == image.guest == reference_read(image.raw, data=image.data_file)
    (tmp_path / "base").write_bytes(b"\7" * 4096 * 10)
    image = build(TinySpec(backing=b"base", backing_format=b"raw"))
    (tmp_path / "image").write_bytes(image.raw)
    subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(tmp_path / "image"), str(raw)], check=True)
    assert raw.read_bytes() == reference_read(image.raw, backing=b"\7" * 4096 * 10)
