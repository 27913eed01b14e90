# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""The content of encrypted storages: the contract, and LUKS files with QEMU."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path

import pytest

from qcowlib.crypto import Cipher, CipherSpec
from qcowlib.errors import CorruptImage, FormatError, SecretError, StorageError
from qcowlib.luks import LuksHeader
from qcowlib.storage.base import Storage
from qcowlib.storage.encrypted import EncryptedStorage, create_luks, open_luks
from qcowlib.storage.file import FileStorage
from qcowlib.storage.memory import MemoryStorage
from qcowlib.testing.conformance import SIZE, StorageContract

SPEC = CipherSpec("xts", 64, "plain64")
KEY = bytes(range(64))


class TestEncrypted(StorageContract):
    growable = False

    def make(self, size: int) -> Storage:
        storage = EncryptedStorage(MemoryStorage(size + 4096), 4096, Cipher(SPEC, KEY, host_sectors=False))
        storage.zero(0, size)
        return storage

    def test_resize_gives_zeros_even_where_data_was(self) -> None:
        """It does not: encrypted zeros would have to be written for all of it, so new sectors are noise, as in qemu."""
        storage = self.make(8192)
        storage.write(0, [b"x" * 8192])
        storage.resize(4096)
        storage.resize(8192)
        found = bytearray(8192)
        storage.read_into(0, [found])
        assert found[:4096] == b"x" * 4096
        assert found[4096:] not in (b"x" * 4096, bytes(4096))
        with pytest.raises(StorageError):
            storage.resize(8193)

    def make_readonly(self) -> Storage:
        return EncryptedStorage(MemoryStorage(SIZE, writable=False), 0, Cipher(SPEC, KEY, host_sectors=False))


def test_the_storage_below_never_sees_the_content() -> None:
    below = MemoryStorage(1 << 16)
    storage = EncryptedStorage(below, 0, Cipher(SPEC, KEY, host_sectors=False))
    storage.write(100, [b"geheim" * 1000])
    raw = bytearray(1 << 16)
    below.read_into(0, [raw])
    assert b"geheim" not in raw
    assert not any(raw[6144:])


def test_large_requests_equal_small_ones() -> None:
    data = random.Random(1).randbytes((3 << 20) - 5)
    storage = EncryptedStorage(MemoryStorage(4 << 20), 512, Cipher(SPEC, KEY, host_sectors=False))
    storage.write(3, [data[: 2 << 20], data[2 << 20 :]])
    out = bytearray(len(data))
    storage.read_into(3, [memoryview(out)[:7], memoryview(out)[7:]])
    assert out == data
    part = bytearray(1024)
    storage.read_into(1 << 20, [part])
    assert part == data[(1 << 20) - 3 :][:1024]


def test_luks_files_open_with_their_passphrase_only() -> None:
    below = MemoryStorage(0)
    create_luks(below, 5000, "a", iter_time=0, cipher_alg="aes-128")
    storage = open_luks(below, "a")
    assert storage.size == 4608
    storage.write(0, [b"content"])
    again = bytearray(7)
    open_luks(below, b"a").read_into(0, [again])
    assert again == b"content"
    with pytest.raises(SecretError):
        open_luks(below, "b")
    with pytest.raises(FormatError):
        open_luks(MemoryStorage(100), "a")
    below.write(104, [b"\xff\xff\xff\xff"])
    below.write(208 + 40, [b"\x7f\xff\xff\xff"])
    with pytest.raises(CorruptImage):
        open_luks(below, "a")


@pytest.mark.real("qemu-img")
def test_qemu_reads_a_luks_file_of_ours(tmp_path: Path) -> None:
    path = tmp_path / "luks"
    data = random.Random(2).randbytes(1 << 20)
    below = FileStorage.create(path)
    create_luks(below, len(data), "a", iter_time=0)
    storage = open_luks(below, "a")
    storage.write(0, [data])
    storage.close()
    assert LuksHeader.parse(path.read_bytes()).payload == path.stat().st_size - len(data)
    source = f"driver=luks,file.filename={path},key-secret=s"
    command = ["qemu-img", "convert", "--object", "secret,id=s,data=a", "--image-opts", source, "-O", "raw"]
    subprocess.run([*command, tmp_path / "out"], check=True)
    assert (tmp_path / "out").read_bytes() == data
