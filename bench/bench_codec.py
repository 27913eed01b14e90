# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Single clusters: compress, decompress, encrypt, each with the standard way to do it as the peer.

``extra_info`` of the writers has ``size``: output bytes for each input byte.
"""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Callable
from typing import Any

import images
import pytest
from backports import zstd
from cryptography.hazmat.primitives.ciphers import Cipher as PackageCipher
from cryptography.hazmat.primitives.ciphers import algorithms, modes
from scale import Scale

from qcowlib.codec import Codec
from qcowlib.crypto import Cipher, CipherSpec

CLUSTER = 65536
LEVEL: dict[str, Any] = {"qcowlib fast": "fast", "qcowlib small": "small"}
KEY = bytes(range(64))


@pytest.fixture(scope="session")
def clusters(scale: Scale) -> list[bytes]:
    """Clusters of files of this machine."""
    data = b"".join(images.machine_files(scale.data // 16))
    return [data[at : at + CLUSTER] for at in range(0, len(data) - CLUSTER, CLUSTER)]


def as_qemu(kind: str, cluster: bytes) -> bytes:
    """Compress with the settings of QEMU's writer."""
    if kind == "zstd":
        return min(zstd.compress(cluster, 3), cluster, key=len)
    stream = zlib.compressobj(6, zlib.DEFLATED, -12, 9)
    return min(stream.compress(cluster) + stream.flush(), cluster, key=len)


@pytest.mark.parametrize("who", ["qcowlib fast", "qcowlib small", "level of qemu"])
@pytest.mark.parametrize("kind", ["zlib", "zstd"])
def bench_compress(benchmark: Any, measure: Callable[..., None], clusters: list[bytes], kind: str, who: str) -> None:
    benchmark.group = f"compress clusters, {kind}"
    codec = Codec(kind, CLUSTER)
    size = 0

    def run() -> None:
        nonlocal size
        size = 0
        for cluster in clusters:
            size += len(codec.compress(cluster, LEVEL[who]) or cluster if who in LEVEL else as_qemu(kind, cluster))

    measure(run, who=who, amount=len(clusters) * CLUSTER, unit="byte")
    benchmark.extra_info["size"] = round(size / len(clusters) / CLUSTER, 4)


@pytest.mark.parametrize("who", ["qcowlib", "qcowlib batch", "standard library"])
@pytest.mark.parametrize("kind", ["zlib", "zstd"])
def bench_decompress(benchmark: Any, measure: Callable[..., None], clusters: list[bytes], kind: str, who: str) -> None:
    benchmark.group = f"decompress clusters, {kind}"
    packed = [data for data in (as_qemu(kind, cluster) for cluster in clusters) if len(data) < CLUSTER]
    pieces, place = array("Q"), 0
    for index, data in enumerate(packed):
        pieces.extend((place, len(data), index * CLUSTER))
        place += len(data)
    source = b"".join(packed)
    out = bytearray(len(packed) * CLUSTER)
    view = memoryview(out)
    codec = Codec(kind, CLUSTER)

    def run() -> None:
        if who == "qcowlib batch":
            codec.decompress_many(pieces, source, out)
            return
        for index, data in enumerate(packed):
            cluster = view[index * CLUSTER : (index + 1) * CLUSTER]
            if who == "qcowlib":
                codec.decompress_into(data, cluster)
            elif kind == "zstd":
                cluster[:] = zstd.ZstdDecompressor().decompress(data, CLUSTER)
            else:
                cluster[:] = zlib.decompressobj(-15).decompress(data, CLUSTER)

    measure(run, who=who, amount=len(out), unit="byte")


@pytest.mark.parametrize("who", ["qcowlib", "cryptography"])
@pytest.mark.parametrize("length", [4096, CLUSTER])
def bench_encrypt(benchmark: Any, measure: Callable[..., None], scale: Scale, length: int, who: str) -> None:
    benchmark.group = f"encrypt {length >> 10} KiB, aes-256-xts"
    cipher = Cipher(CipherSpec("xts", 64, "plain64"), KEY, host_sectors=True)
    buffer = bytearray(length)

    def run() -> None:
        for number in range(scale.operations):
            if who == "qcowlib":
                cipher.encrypt(buffer, number)
                continue
            for at in range(0, length, 512):
                mode = modes.XTS((number + at // 512).to_bytes(16, "little"))
                buffer[at : at + 512] = (
                    PackageCipher(algorithms.AES(KEY), mode).encryptor().update(buffer[at : at + 512])
                )

    measure(run, who=who, amount=scale.operations * length, unit="byte")
