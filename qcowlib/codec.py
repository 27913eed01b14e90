# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Compressed clusters: raw deflate and zstd.

Invariant: what :meth:`Codec.compress` returns can be read by every QEMU
(deflate streams never refer back more than 4096 bytes, zstd data is one
frame), and :meth:`Codec.decompress_into` yields exactly one cluster or raises,
whatever bytes it is given, within memory that does not depend on them.

Implementations are found at run time, fastest first, and all of them are
optional except the standard library's zlib:

* reading deflate: libdeflate, libz (both without the GIL), isal, zlib;
* writing deflate: isal for :data:`FAST`, else the encoder of the compiled core
  (zlib remains selectable: with it the bytes are QEMU's);
* zstd: libzstd, ``compression.zstd`` or ``backports.zstd``; the system's
  library reads, the Python package (mostly newer) writes where it is installed.
"""

from __future__ import annotations

import sys
import zlib

from qcowlib import native
from qcowlib.errors import CorruptImage, UnsupportedFeature, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import ModuleType
    from typing import Literal, Protocol

    from _typeshed import ReadableBuffer, WriteableBuffer

    Level = Literal["fast", "small"]

    class _Compressor(Protocol):
        def __call__(self, cluster: ReadableBuffer, /) -> bytes: ...


__all__ = ["FAST", "SMALL", "ZLIB", "ZSTD", "Codec", "available"]

#: Values of the header's compression_type.
ZLIB = 0
ZSTD = 1

#: Effort: least processor time, or not larger than QEMU's own output.
FAST: Level = "fast"
SMALL: Level = "small"

_NAMES = {"zlib": ZLIB, "zstd": ZSTD}
_BITS = {"libdeflate": 1, "libz": 2, "libzstd": 4}
_EVERYTHING = frozenset(("libdeflate", "libz", "libzstd", "isal", "deflater", "zlib", "zstd"))

# Bytes that the own encoder wants behind its output.
_SCRATCH = 16

# Largest window of a zstd frame that QEMU's decoder takes, as a power of two.
_ZSTD_WINDOW = 27


class Codec:
    """One compression type at one cluster size; safe for any number of threads.

    *kind* is ``"zlib"``, ``"zstd"`` or the header's compression_type,
    *cluster_size* in bytes.  *implementations* restricts what may be used
    (names as :func:`available` reports them), for tests and diagnosis.
    Raises UnsupportedFeature for an unknown type, or zstd where no
    implementation of it is installed.
    """

    __slots__ = ("_allow", "_idle", "_kind", "_using", "cluster_size", "name")

    def __init__(self, kind: str | int, cluster_size: int, *, implementations: frozenset[str] = _EVERYTHING) -> None:
        number = _NAMES.get(kind, -1) if isinstance(kind, str) else kind
        if number not in (ZLIB, ZSTD):
            raise UnsupportedFeature(f"unknown compression type: {kind}")
        if not 512 <= cluster_size <= 1 << 21 or cluster_size & (cluster_size - 1):
            raise UsageError(f"not a cluster size: {cluster_size}")
        self.name = "zstd" if number == ZSTD else "zlib"
        self.cluster_size = cluster_size
        self._kind = number
        self._using = implementations
        self._allow = sum(bit for name, bit in _BITS.items() if name in implementations) & native.codec_load()
        self._idle: dict[str, list[_Compressor]] = {FAST: [], SMALL: []}
        if number == ZSTD and not self._allow & 4 and ("zstd" not in implementations or _zstd() is None):
            raise UnsupportedFeature(
                "compression type zstd needs libzstd",
                hint="Install the backports.zstd package or the system's libzstd.",
            )

    def __repr__(self) -> str:
        return f"Codec({self.name!r}, {self.cluster_size})"

    def decompress_into(self, data: ReadableBuffer, out: WriteableBuffer) -> None:
        """Decode *data* into *out*, a contiguous buffer of exactly one cluster.

        Bytes behind the end of the stream are ignored: compressed data is read
        in whole sectors.  Raises CorruptImage when *data* does not hold a whole
        cluster; *out* is then undefined.
        """
        result = native.codec_decompress(self._kind, self._allow, data, self._check(out))
        if result == -2:
            self._decompress_python(data, out)
        elif result:
            raise self._corrupt()

    def decompress_many(self, pieces: ReadableBuffer, source: ReadableBuffer, out: WriteableBuffer) -> None:
        """Decode many clusters in one call, without the GIL where a C library is there.

        *pieces* is an ``array("Q")`` (or like buffer) of triples: offset and
        length of the data in *source*, offset of the cluster in *out*; bytes.
        Raises CorruptImage at the first cluster that cannot be decoded, and
        ValueError if a piece lies outside of its buffer.
        """
        index = 0
        while True:
            index, result = native.codec_decompress_many(
                self._kind, self._allow, self.cluster_size, pieces, source, out, index
            )
            if result == 0:
                return
            if result != -2:
                raise self._corrupt()
            start, length, place = memoryview(pieces).cast("B").cast("Q")[3 * index : 3 * index + 3]
            whole = memoryview(out).cast("B")
            self._decompress_python(
                memoryview(source).cast("B")[start : start + length], whole[place : place + self.cluster_size]
            )
            index += 1

    def compress(self, cluster: ReadableBuffer, level: Level = "fast") -> bytes | None:
        """Return *cluster* compressed, or ``None`` when that is not smaller than the cluster.

        *cluster* must hold exactly ``cluster_size`` bytes (the last cluster of
        an image padded with zeros).
        """
        self._check(cluster)
        try:
            idle = self._idle[level]
        except KeyError:
            raise UsageError(f"unknown compression level: {level}") from None
        try:
            run = idle.pop()
        except IndexError:
            run = self._zstd_compressor(level) if self._kind == ZSTD else self._zlib_compressor(level)
        data = run(cluster)
        idle.append(run)
        return data if 0 < len(data) < self.cluster_size else None

    def _check(self, buffer: ReadableBuffer) -> WriteableBuffer:
        if memoryview(buffer).nbytes != self.cluster_size:
            raise UsageError(f"a buffer of {memoryview(buffer).nbytes} bytes is not one cluster of {self.cluster_size}")
        return buffer

    def _corrupt(self) -> CorruptImage:
        return CorruptImage(f"compressed cluster is not valid {self.name} data")

    def _decompress_python(self, data: ReadableBuffer, out: WriteableBuffer) -> None:
        size = self.cluster_size
        if self._kind == ZSTD:
            made = _unzstd(data, size)
        else:
            made = _inflate_isal(data, size) if "isal" in self._using else None
            if made is None:
                made = _inflate_zlib(data, size)
        if made is None:
            raise self._corrupt()
        memoryview(out).cast("B")[:] = made

    def _zlib_compressor(self, level: Level) -> _Compressor:
        isal = _isal() if level == FAST and "isal" in self._using else None
        if isal is not None:
            squeeze, flag, memory = isal.compress, isal.COMP_DEFLATE, isal.MEM_LEVEL_DEFAULT

            def run_isal(cluster: ReadableBuffer) -> bytes:
                made: bytes = squeeze(cluster, 2, flag, memory, 12)
                return made

            return run_isal
        if "deflater" in self._using:
            machine = native.Deflater()
            room = memoryview(bytearray(self.cluster_size + _SCRATCH))

            def run_own(cluster: ReadableBuffer) -> bytes:
                return bytes(room[: max(0, machine.compress(cluster, room))])

            return run_own

        def run_zlib(cluster: ReadableBuffer) -> bytes:
            # The settings of QEMU's writer: the same bytes where it uses the same zlib.
            stream = zlib.compressobj(6, zlib.DEFLATED, -12, 9)
            return stream.compress(cluster) + stream.flush()

        return run_zlib

    def _zstd_compressor(self, level: Level) -> _Compressor:
        effort = 3 if level == SMALL else 1
        zstd = _zstd() if "zstd" in self._using else None
        if zstd is not None:
            machine = zstd.ZstdCompressor(effort)
            end = machine.FLUSH_FRAME

            def run(cluster: ReadableBuffer) -> bytes:
                made: bytes = machine.compress(cluster, end)
                return made

            return run
        room = memoryview(bytearray(self.cluster_size))

        def run_native(cluster: ReadableBuffer) -> bytes:
            return bytes(room[: max(0, native.codec_compress_zstd(effort, cluster, room))])

        return run_native


def available() -> dict[str, str]:
    """Return which implementation does what here: ``{"inflate": "libdeflate", "deflate": "isal", ...}``.

    Keys: ``inflate``, ``deflate``, ``unzstd``, ``zstd`` (empty text: none).
    """
    loaded = native.codec_load()
    version = native.codec_zstd_version()
    library = f"libzstd {version // 10000}.{version // 100 % 100}.{version % 100}" if version else ""
    module = _zstd()
    python = f"{module.__name__} {module.zstd_version}" if module else ""
    isal = "isal" if _isal() else ""
    return {
        "inflate": "libdeflate" if loaded & 1 else "libz" if loaded & 2 else isal or "zlib",
        "deflate": isal or "deflater",
        "unzstd": library or python,
        "zstd": python or library,
    }


def _isal() -> ModuleType | None:
    try:
        from isal import igzip_lib
    except ImportError:
        return None
    return igzip_lib


def _zstd() -> ModuleType | None:
    try:
        if sys.version_info >= (3, 14):
            from compression import zstd
        else:
            from backports import zstd
    except ImportError:
        return None
    return zstd


def _inflate_zlib(data: ReadableBuffer, size: int) -> bytes | None:
    """Return the first *size* bytes of the stream, ``None`` if there are fewer."""
    try:
        made = zlib.decompressobj(-15).decompress(data, size)
    except zlib.error:
        return None
    return made if len(made) == size else None


def _inflate_isal(data: ReadableBuffer, size: int) -> bytes | None:
    """As :func:`_inflate_zlib`, which judges whatever this one refuses."""
    isal = _isal()
    if isal is None:
        return None
    try:
        made: bytes = isal.IgzipDecompressor(isal.DECOMP_DEFLATE, 15).decompress(data, size)
    except isal.error:
        return None
    return made if len(made) == size else None


def _unzstd(data: ReadableBuffer, size: int) -> bytes | None:
    """Return *size* bytes out of as many frames as that takes, ``None`` if they do not end there."""
    zstd = _zstd()
    if zstd is None:
        return None
    parts: list[bytes] = []
    options = {zstd.DecompressionParameter.window_log_max: _ZSTD_WINDOW}
    rest = memoryview(data).cast("B")
    while size:
        try:
            frame = zstd.get_frame_size(rest)
            machine = zstd.ZstdDecompressor(options=options)
            part = machine.decompress(rest[:frame], size)
            # The frame may have an end mark left to read, and must have no more data.
            if not machine.eof and (machine.decompress(b"", 1) or not machine.eof):
                return None
        except zstd.ZstdError:
            return None
        parts.append(part)
        size -= len(part)
        rest = rest[frame:]
    return b"".join(parts)
