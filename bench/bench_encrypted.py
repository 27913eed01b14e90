# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Encrypted images (AES-256-XTS under LUKS keys) read and written whole.

Both programs use the same files, whose keys are cheap to derive: what is
measured is the cipher and the copy.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peers
import pytest

import qcowlib
from qcowlib.luks import LuksHeader
from qcowlib.qcow2.create import Encryption
from qcowlib.storage.encrypted import create_luks
from qcowlib.storage.file import FileStorage

KEY = "key"
OBJECT = ("--object", f"secret,id=s,data={KEY}", "--image-opts")


def options(format: str, path: Path) -> str:
    """The image as an option list of qemu-img."""
    key = "encrypt.key-secret" if format == "qcow2" else "key-secret"
    return f"driver={format},file.filename={path},{key}=s"


def empty(format: str, path: Path, size: int) -> None:
    """Make an encrypted image of *size* bytes at *path*."""
    path.unlink(missing_ok=True)
    if format == "qcow2":
        area, _ = LuksHeader.create(KEY, iter_time=0)
        qcowlib.create(path, size, encrypt=Encryption(2, area))
    else:
        file = FileStorage.create(path)
        create_luks(file, size, KEY, iter_time=0)
        file.close()


def fill(who: str, source: Path, format: str, target: Path) -> None:
    """Copy the raw *source* into the encrypted *target*, which is there."""
    if who == "qcowlib":
        with qcowlib.open(target, "r+", format=format, secret=KEY, cache="unsafe") as image:
            qcowlib.convert(source, image, source_format="raw", existing=True)
    else:
        raw = f"driver=raw,file.filename={source}"
        peers.qemu_img("convert", "-n", *OBJECT, "--target-image-opts", raw, options(format, target))


@pytest.mark.parametrize("who", peers.installed("qcowlib", "qemu-img"))
@pytest.mark.parametrize("format", ["qcow2", "luks"])
def bench_encrypt_copy(
    benchmark: Any, measure: Callable[..., None], bench_dir: Path, realistic: Path, format: str, who: str
) -> None:
    target, size = bench_dir / "encrypted", realistic.stat().st_size
    benchmark.group = f"convert, raw to encrypted {format}"
    measure(
        lambda: fill(who, realistic, format, target),
        who=who,
        amount=size,
        unit="byte",
        setup=lambda: empty(format, target, size),
    )
    with qcowlib.open(target, format=format, secret=KEY) as image:
        if not qcowlib.compare(realistic, image, format_a="raw"):
            raise AssertionError(f"{target} does not hold what was copied")
    target.unlink()


@pytest.mark.parametrize("who", peers.installed("qcowlib", "qemu-img"))
@pytest.mark.parametrize("format", ["qcow2", "luks"])
def bench_decrypt_copy(
    benchmark: Any, measure: Callable[..., None], bench_dir: Path, realistic: Path, format: str, who: str
) -> None:
    source, target = bench_dir / "encrypted", bench_dir / "plain.raw"
    benchmark.group = f"convert, encrypted {format} to raw"
    empty(format, source, realistic.stat().st_size)
    fill("qcowlib", realistic, format, source)

    def run() -> None:
        if who == "qcowlib":
            qcowlib.convert(source, target, source_format=format, format="raw", secret=KEY, cache="unsafe")
        else:
            peers.qemu_img("convert", *OBJECT, "-O", "raw", options(format, source), target)

    measure(
        run,
        who=who,
        amount=realistic.stat().st_size,
        unit="byte",
        setup=lambda: target.unlink(missing_ok=True),
    )
    peers.must_equal(realistic, target)
    source.unlink()
    target.unlink()
