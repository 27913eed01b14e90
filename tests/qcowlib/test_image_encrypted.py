# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Encrypted images made by qemu-img: written here, read there, and the other way round."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path

import pytest

import qcowlib

pytestmark = pytest.mark.real("qemu-img", "qemu-io")

SIZE = 1 << 20
OBJECT = ("--object", "secret,id=key,data=open sesame")


def run(*words: str | Path) -> None:
    subprocess.run(list(map(str, words)), check=True, capture_output=True)


def make(path: Path, kind: str, options: str = "") -> None:
    """Create with qemu-img; it measures processor time, and gives up on a busy machine now and then."""
    more = ",encrypt.iter-time=20" if kind == "luks" else ""
    words = ["qemu-img", "create", "-q", *OBJECT, "-f", "qcow2", "-o"]
    words += [f"encrypt.format={kind},encrypt.key-secret=key{more}{options}", str(path), str(SIZE)]
    for _ in range(40):
        if subprocess.run(words, capture_output=True).returncode == 0:
            return
    run(*words)


def reference(path: Path) -> str:
    return f"driver=qcow2,file.filename={path},encrypt.key-secret=key"


@pytest.mark.parametrize("options", ["", ",cluster_size=512", ",extended_l2=on"])
@pytest.mark.parametrize("kind", ["luks", "aes"])
def test_what_is_written_encrypted_reads_back_in_qemu(tmp_path: Path, kind: str, options: str) -> None:
    path = tmp_path / "image"
    make(path, kind, options)
    rng = random.Random(options)
    model = bytearray(SIZE)
    with qcowlib.open(path, "r+", secret="open sesame") as image:
        for _ in range(25):
            offset = rng.randrange(SIZE)
            data = rng.randbytes(min(rng.choice([1, 100, 512, 5000, 70000]), SIZE - offset))
            image.pwrite(data, offset)
            model[offset : offset + len(data)] = data
            offset = rng.randrange(SIZE)
            length = min(rng.choice([512, 70000]), SIZE - offset)
            image.zero(length, offset)
            model[offset : offset + length] = bytes(length)
            assert image.pread(SIZE, 0) == bytes(model)
    run("qemu-img", "convert", *OBJECT, "--image-opts", "-O", "raw", reference(path), tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == bytes(model)
    run("qemu-img", "check", *OBJECT, "--image-opts", reference(path))


def test_what_qemu_encrypts_is_read(tmp_path: Path) -> None:
    path = tmp_path / "image"
    make(path, "luks")
    run("qemu-io", *OBJECT, "--image-opts", reference(path), "-c", "write -P 90 1000 70000")
    with qcowlib.open(path, secret=b"open sesame") as image:
        assert image.pread(71000, 0) == bytes(1000) + b"Z" * 70000
        assert [extent.kind for extent in image.extents()] == ["data", "hole"]


def test_a_missing_or_wrong_key_is_one_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "image"
    make(path, "luks")
    with pytest.raises(qcowlib.SecretError, match=r"encrypt\.key-secret"):
        qcowlib.open(path)
    with pytest.raises(qcowlib.SecretError, match="Invalid password") as caught:
        qcowlib.open(path, secret="wrong-passphrase")
    assert "wrong-passphrase" not in str(caught.value)
