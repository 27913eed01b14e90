# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Compressed clusters: every implementation against every other, QEMU and hostile bytes."""

from __future__ import annotations

import random
import struct
import subprocess
import threading
import zlib
from array import array
from pathlib import Path
from typing import Literal

import pytest
from backports import zstd
from hypothesis import given
from hypothesis import strategies as st

from qcowlib.codec import Codec, available
from qcowlib.errors import CorruptImage, UnsupportedFeature, UsageError

Level = Literal["fast", "small"]
CS = 65536
LEVELS: tuple[Level, ...] = ("fast", "small")
# Each way to read and to write, alone.
READERS = [
    ("zlib", frozenset({"libdeflate", "libz"})),
    ("zlib", frozenset({"libz"})),
    ("zlib", frozenset({"isal", "zlib"})),
    ("zlib", frozenset({"zlib"})),
    ("zstd", frozenset({"libzstd"})),
    ("zstd", frozenset({"zstd"})),
]
WRITERS = [
    ("zlib", frozenset({"isal", "deflater"})),
    ("zlib", frozenset({"deflater"})),
    ("zlib", frozenset({"zlib"})),
    ("zstd", frozenset({"libzstd"})),
    ("zstd", frozenset({"zstd"})),
]


def codecs(kinds: list[tuple[str, frozenset[str]]], kind: str, size: int = CS) -> list[Codec]:
    return [Codec(name, size, implementations=using) for name, using in kinds if name == kind]


def patterns(size: int) -> list[bytes]:
    """Clusters of every sort: empty, text, tables, half random, periods around the window, nearly random."""
    rng = random.Random(size)
    noise = rng.randbytes(size)
    words = [rng.randbytes(rng.randint(2, 9)).hex().encode() for _ in range(300)]
    text = b" ".join(rng.choice(words) for _ in range(size // 3))[:size].ljust(size, b".")
    table = b"".join(struct.pack("<IHH", i * 7, i & 3, rng.randint(0, 9)) for i in range(size // 8))
    made = [bytes(size), b"\xff" * size, text, table, noise[: size // 2] + bytes(size - size // 2)]
    for period in (1, 3, 4095, 4096, 4097, 258):
        made.append((noise[:period] * (size // period + 1))[:size])
    made.append(b"".join(bytes((b & 0x3F,)) for b in noise))
    return made


def deflate(data: bytes, window: int = 12) -> bytes:
    stream = zlib.compressobj(6, zlib.DEFLATED, -window, 9)
    return stream.compress(data) + stream.flush()


@pytest.mark.parametrize("size", [512, 4096, 65536, 2 << 20])
@pytest.mark.parametrize("kind", ["zlib", "zstd"])
def test_every_reader_reads_every_writer(kind: str, size: int) -> None:
    for cluster in patterns(size)[: 12 if size <= CS else 6]:
        for writer in codecs(WRITERS, kind, size):
            for level in LEVELS:
                data = writer.compress(cluster, level)
                if data is None:
                    continue
                assert len(data) < size
                for reader in codecs(READERS, kind, size):
                    out = bytearray(size)
                    reader.decompress_into(data + b"\x55" * 511, out)
                    assert out == cluster


@given(
    st.lists(st.tuples(st.binary(max_size=40), st.integers(1, 200)), max_size=40),
    st.sampled_from([512, 4096, 65536]),
    st.sampled_from(WRITERS),
    st.sampled_from(LEVELS),
)
def test_compress_round_trip(
    parts: list[tuple[bytes, int]], size: int, writer: tuple[str, frozenset[str]], level: Level
) -> None:
    cluster = b"".join(part * times for part, times in parts)[:size].ljust(size, b"\0")
    codec = Codec(writer[0], size, implementations=writer[1])
    for _ in range(2):  # the second time with tables that hold the first
        data = codec.compress(cluster, level)
        if data is not None:
            out = bytearray(size)
            Codec(writer[0], size).decompress_into(data, out)
            assert out == cluster
            if writer[0] == "zlib":  # a strict reader with the window of QEMU's
                assert zlib.decompress(data, -12, 64) == cluster


@pytest.mark.parametrize("kind", ["zlib", "zstd"])
def test_random_bytes_are_not_compressed(kind: str) -> None:
    noise = random.Random(1).randbytes(CS)
    for writer in codecs(WRITERS, kind):
        for level in LEVELS:
            assert writer.compress(noise, level) is None


def test_the_encoder_refers_back_a_whole_window() -> None:
    block = random.Random(3).randbytes(4096)
    data = Codec("zlib", CS, implementations=frozenset({"deflater"})).compress(block * 16, "small")
    assert data is not None and len(data) < 5000
    assert zlib.decompress(data, -12, 64) == block * 16


def test_small_is_not_larger_than_qemus_output() -> None:
    codec = Codec("zlib", CS)
    source = b"".join(path.read_bytes() for path in sorted(Path(zlib.__spec__.origin or ".").parent.glob("*.so"))[:4])
    source += b"".join(path.read_bytes() for path in sorted(Path(random.__file__).parent.glob("*.py"))[:60])
    clusters = [source[i : i + CS].ljust(CS, b"\0") for i in range(0, min(len(source), 40 * CS), CS)]
    ours = sum(len(codec.compress(cluster, "small") or cluster) for cluster in clusters)
    assert ours <= sum(min(CS, len(deflate(cluster))) for cluster in clusters)


def test_streams_with_larger_windows_are_read() -> None:
    block = random.Random(5).randbytes(30000)
    cluster = (block * 3)[:CS]
    data = deflate(cluster, 15)
    assert len(data) < 40000
    for reader in codecs(READERS, "zlib"):
        out = bytearray(CS)
        reader.decompress_into(data, out)
        assert out == cluster


def test_a_longer_deflate_stream_is_cut_at_the_cluster() -> None:
    cluster = patterns(CS)[2]
    for reader in codecs(READERS, "zlib"):
        out = bytearray(CS)
        reader.decompress_into(deflate(cluster + b"more" * 5000), out)
        assert out == cluster


def test_several_zstd_frames_make_one_cluster() -> None:
    cluster = patterns(CS)[2]
    skippable = struct.pack("<II", 0x184D2A53, 5) + b"hello"
    data = zstd.compress(cluster[:1000]) + skippable + zstd.compress(b"") + zstd.compress(cluster[1000:])
    for reader in codecs(READERS, "zstd"):
        out = bytearray(CS)
        reader.decompress_into(data + b"\x28\xb5", out)
        assert out == cluster


def test_a_zstd_frame_that_is_not_finished_when_the_cluster_is_full_is_refused() -> None:
    cluster = patterns(CS)[2]
    for reader in codecs(READERS, "zstd"):
        with pytest.raises(CorruptImage):
            reader.decompress_into(zstd.compress(cluster + b"x"), bytearray(CS))


def hostile(kind: str) -> list[bytes]:
    cluster = patterns(CS)[2]
    if kind == "zlib":
        data = deflate(cluster)
        # Empty stored blocks without end; a short stream; a reference before the start; a reserved block type.
        made = [b"\0\0\0\xff\xff" * 20000, deflate(cluster[:-1]), b"\x63\x18\x05\xa3\x60\x14", b"\x07" * 100]
    else:
        data = zstd.compress(cluster, options={zstd.CompressionParameter.checksum_flag: 1})
        huge_window = b"\x28\xb5\x2f\xfd\x00\xf8" + b"\x02\0\0" * 5
        claims = b"\x28\xb5\x2f\xfd\xc0\x58" + b"\xff" * 7 + b"\x7f" + b"\x02\xff\x1f"
        skips = struct.pack("<II", 0x184D2A50, 0) * 10000
        amplified = b"\x28\xb5\x2f\xfd\x00\x58" + struct.pack("<I", 2 | (131072 << 3))[:3] + b"A"
        old = b"\x27\xb5\x2f\xfd" + bytes(60)
        made = [huge_window, claims, skips, amplified * 50, old, zstd.compress(cluster[:-1])]
        made.append(struct.pack("<II", 0x184D2A50, 0xFFFFFFFF) + bytes(60))
        made.append(data[:-1] + bytes((data[-1] ^ 1,)))
    made += [b"", b"\0", bytes(CS), b"\xff" * CS, data[: len(data) // 2]]
    return made


@pytest.mark.parametrize("kind", ["zlib", "zstd"])
def test_hostile_streams_are_refused_by_every_reader(kind: str) -> None:
    for data in hostile(kind):
        for reader in codecs(READERS, kind):
            with pytest.raises(CorruptImage):
                reader.decompress_into(data, bytearray(CS))


@given(st.sampled_from(["zlib", "zstd"]), st.integers(0, 2**32), st.integers(0, 6))
def test_damaged_streams_stay_inside_the_cluster(kind: str, seed: int, flips: int) -> None:
    """Readers of deflate agree on what is damage; those of zstd may differ (in how much a window forgets)."""
    rng = random.Random(seed)
    cluster = patterns(4096)[rng.randrange(5)]
    data = bytearray(Codec(kind, 4096).compress(cluster, "small") or cluster)
    for _ in range(flips):
        data[rng.randrange(min(len(data), 200))] ^= 1 << rng.randrange(8)
    answers = set()
    for reader in codecs(READERS, kind, 4096):
        out = bytearray(4096 + 64)
        try:
            reader.decompress_into(data + bytes(64), memoryview(out)[:4096])
            answers.add(bytes(out[:4096]))
        except CorruptImage:
            answers.add(b"refused")
        assert not any(out[4096:])
    assert kind == "zstd" or len(answers) == 1


@pytest.mark.parametrize("kind", ["zlib", "zstd"])
def test_a_batch_equals_single_calls_and_stops_at_bad_data(kind: str) -> None:
    clusters = patterns(CS)[:6]
    packed = [Codec(kind, CS).compress(cluster) or b"" for cluster in clusters]
    for reader in codecs(READERS, kind):
        pieces, place = array("Q"), 0
        for index, data in enumerate(packed):
            pieces.extend((place, len(data), (len(packed) - 1 - index) * CS))
            place += len(data)
        out = bytearray(CS * len(packed))
        reader.decompress_many(pieces, b"".join(packed), out)
        assert out == b"".join(reversed(clusters))
        pieces[7] -= 9
        with pytest.raises(CorruptImage):
            reader.decompress_many(pieces, b"".join(packed), out)
        pieces[7] = 1 << 40
        with pytest.raises(ValueError, match="outside"):
            reader.decompress_many(pieces, b"".join(packed), out)


def test_threads_share_a_codec() -> None:
    clusters = patterns(CS)[:6] * 4
    for kind in ("zlib", "zstd"):
        codec = Codec(kind, CS)
        wrong: list[int] = []

        def work(start: int, codec: Codec = codec, wrong: list[int] = wrong) -> None:
            out = bytearray(CS)
            for index in range(start, len(clusters)):
                for level in LEVELS:
                    codec.decompress_into(codec.compress(clusters[index], level) or b"", out)
                    if out != clusters[index]:
                        wrong.append(index)

        threads = [threading.Thread(target=work, args=(start,)) for start in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong


def test_wrong_arguments_are_refused() -> None:
    for kind in ("lz4", 2, -1):
        with pytest.raises(UnsupportedFeature):
            Codec(kind, CS)
    for size in (0, 256, 513, 4 << 20):
        with pytest.raises(UsageError):
            Codec("zlib", size)
    with pytest.raises(UnsupportedFeature, match="libzstd"):
        Codec("zstd", CS, implementations=frozenset({"zlib"}))
    codec = Codec(1, CS)
    assert repr(codec) == "Codec('zstd', 65536)"
    with pytest.raises(UsageError):
        codec.compress(bytes(CS - 1))
    with pytest.raises(UsageError):
        codec.decompress_into(b"", bytearray(CS + 1))
    with pytest.raises(UsageError):
        codec.compress(bytes(CS), "tiny")  # type: ignore[arg-type]


def test_available_names_what_is_active() -> None:
    found = available()
    assert set(found) == {"inflate", "deflate", "unzstd", "zstd"}
    assert found["inflate"] in ("libdeflate", "libz", "isal", "zlib")
    assert "zstd" in found["zstd"]


# --- against QEMU ------------------------------------------------------------------------------------------


def write_image(path: Path, kind: str, size: int, clusters: list[bytes], codec: Codec, level: Level) -> int:
    """Write a minimal image, compressed clusters packed byte by byte; returns how many are compressed."""
    bits = size.bit_length() - 1
    shift = 70 - bits
    body, entries, compressed = bytearray(), [], 0
    counts = dict.fromkeys(range(5), 1)
    for cluster in clusters:
        data = codec.compress(cluster, level)
        if data is None:
            body += bytes(-len(body) % size)
            entries.append(5 * size + len(body) | 1 << 63)
            counts[5 + len(body) // size] = 1
            body += cluster
            continue
        compressed += 1
        start = 5 * size + len(body)
        last = (start + len(data) - 1) // 512
        entries.append(1 << 62 | (last - start // 512) << shift | start)
        for touched in range(start // size, (last * 512 + 511) // size + 1):
            counts[touched] = counts.get(touched, 0) + 1
        body += data
    body += bytes(-len(body) % 512)
    header = struct.pack(
        ">4sIQIIQIIQQIIQQQQIIB7x",
        b"QFI\xfb", 3, 0, 0, bits, len(clusters) * size, 0, 1, 3 * size, size, 1, 0, 0,
        8 if kind == "zstd" else 0, 0, 0, 4, 112, kind == "zstd",
    )  # fmt: skip
    parts = [header, struct.pack(">Q", 2 * size), b"", struct.pack(">Q", 4 * size | 1 << 63)]
    parts[2] = b"".join(struct.pack(">H", counts.get(i, 0)) for i in range(max(counts) + 1))
    parts.append(b"".join(struct.pack(">Q", entry) for entry in entries))
    path.write_bytes(b"".join(part.ljust(size, b"\0") for part in parts) + body)
    return compressed


def qemu(*arguments: str | Path) -> None:
    subprocess.run(["qemu-img", *map(str, arguments)], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.real("qemu-img")
@pytest.mark.parametrize("size", [512, 4096, 65536, 2 << 20])
@pytest.mark.parametrize("kind", ["zlib", "zstd"])
def test_qemu_reads_what_every_writer_makes(tmp_path: Path, kind: str, size: int) -> None:
    clusters = patterns(size)[: 12 if size <= CS else 5]
    (tmp_path / "raw").write_bytes(b"".join(clusters))
    for writer in codecs(WRITERS, kind, size):
        for level in LEVELS:
            assert write_image(tmp_path / "q", kind, size, clusters, writer, level) >= 3
            qemu("check", "-q", "-f", "qcow2", tmp_path / "q")
            qemu("compare", "-f", "qcow2", "-F", "raw", tmp_path / "q", tmp_path / "raw")


@pytest.mark.real("qemu-img")
@pytest.mark.parametrize("bits", range(9, 22))
@pytest.mark.parametrize("kind", ["zlib", "zstd"])
def test_every_reader_reads_what_qemu_makes(tmp_path: Path, kind: str, bits: int) -> None:
    size = 1 << bits
    clusters = patterns(size)[: 12 if size <= CS else 5]
    (tmp_path / "raw").write_bytes(b"".join(clusters))
    options = f"cluster_size={size},compression_type={kind}"
    qemu("convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, tmp_path / "raw", tmp_path / "q")
    image = (tmp_path / "q").read_bytes() + bytes(2 * size)
    (l1,) = struct.unpack_from(">Q", image, 40)
    (l2,) = struct.unpack_from(">Q", image, l1)
    found = 0
    for index, cluster in enumerate(clusters):
        (entry,) = struct.unpack_from(">Q", image, (l2 & 0xFFFFFFFFFFFE00) + 8 * index)
        if not entry >> 62 & 1:
            continue
        found += 1
        shift = 70 - bits
        start = entry & (1 << shift) - 1
        length = (((entry & (1 << 62) - 1) >> shift) + 1) * 512 - start % 512
        for reader in codecs(READERS, kind, size):
            out = bytearray(size)
            reader.decompress_into(image[start : start + length], out)
            assert out == cluster
    assert found >= 3
