# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Reading runs of one layer that need more than a file descriptor.

Blocking and thread-safe: it works on what a lookup answered and touches no
table.  Invariants: a compressed cluster always yields exactly one cluster, in
bounded memory; bytes that lie wholly past the end of the file are an error,
never zeros (L10); encrypted bytes never leave without being decrypted.
"""

from __future__ import annotations

from qcowlib.driver import COMPRESSED, DATA
from qcowlib.errors import CorruptImage
from qcowlib.ondisk import CRYPT_LUKS, unpack_compressed
from qcowlib.units import SECTOR, KiB, MiB, round_down, round_up

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol

    from _typeshed import WriteableBuffer

    from qcowlib.codec import Codec
    from qcowlib.ondisk import Header
    from qcowlib.storage.base import Storage
else:
    Protocol = object

__all__ = ["Cipher", "LayerReader"]

_KEPT_CLUSTERS = 8
#: Stored bytes that one call reads, about, and those between two clusters that are read rather than skipped.
_BATCH = 1 * MiB
_GAP = 4 * KiB


class Cipher(Protocol):
    """Encrypts whole sectors in place; *first_sector* counts 512-byte sectors."""

    def encrypt(self, buffer: WriteableBuffer, first_sector: int) -> None: ...

    def decrypt(self, buffer: WriteableBuffer, first_sector: int) -> None: ...


class LayerReader:
    """What a layer of QCOW2 adds to plain reads: compression, encryption, non-descriptor storage."""

    __slots__ = ("_codec", "_kept", "cipher", "data", "header", "storage")

    def __init__(self, storage: Storage, data: Storage, header: Header, cipher: Cipher | None) -> None:
        self.storage = storage
        self.data = data
        self.header = header
        self.cipher = cipher
        self._codec: Codec | None = None
        # Small reads of one compressed cluster come in a row: the last few stay decoded.
        self._kept: dict[int, bytes] = {}

    @property
    def codec(self) -> Codec:
        """The image's codec, made when the first compressed cluster is met."""
        if self._codec is None:
            from qcowlib.codec import Codec

            self._codec = Codec(self.header.compression_type, self.header.cluster_size)
        return self._codec

    def read_run(self, kind: int, host: int, guest: int, length: int, view: memoryview) -> None:
        """Fill *view* (*length* bytes) from a DATA or COMPRESSED run at guest offset *guest*."""
        if kind == COMPRESSED:
            self._read_compressed(host, guest, length, view)
        elif kind == DATA:
            if self.cipher is None:
                self._read_plain(host, view)
            else:
                self._read_encrypted(self.cipher, host, guest, length, view)

    def missing(self, offset: int) -> CorruptImage:
        """The error for a cluster that the file does not have."""
        return CorruptImage(f"data at offset {offset:#x} lies past the end of the file", path=self.data.name)

    def _read_plain(self, host: int, view: memoryview) -> None:
        if host + len(view) > round_up(self.data.size, self.header.cluster_size):
            raise self.missing(max(host, self.data.size))
        self.data.read_into(host, [view])

    def _read_encrypted(self, cipher: Cipher, host: int, guest: int, length: int, view: memoryview) -> None:
        start, end = round_down(host, SECTOR), round_up(host + length, SECTOR)
        whole = start == host and end == host + length
        buffer = view if whole else memoryview(bytearray(end - start))
        self._read_plain(start, buffer)
        number = start if self.header.crypt_method == CRYPT_LUKS else guest - (host - start)
        cipher.decrypt(buffer, number // SECTOR)
        if not whole:
            view[:] = buffer[host - start : host - start + length]

    def _read_compressed(self, entry: int, guest: int, length: int, view: memoryview) -> None:
        cluster_size = self.header.cluster_size
        inside = guest % cluster_size
        if length == cluster_size:
            self._decode(entry, guest - inside, view)
            return
        cluster = self._kept.get(entry)
        if cluster is None:
            out = bytearray(cluster_size)
            self._decode(entry, guest - inside, memoryview(out))
            cluster = bytes(out)
            if len(self._kept) >= _KEPT_CLUSTERS:
                self._kept.clear()
            self._kept[entry] = cluster
        view[:] = cluster[inside : inside + length]

    def read_packed(self, clusters: list[tuple[int, int, int]], view: memoryview) -> None:
        """Fill whole clusters of *view* from compressed ones: ``(entry, guest offset, place in view)`` each.

        What lies together in the file is read and decoded by one call.
        """
        from array import array

        bits, end = self.header.cluster_bits, self.data.size
        most = 2 * self.header.cluster_size + SECTOR
        places = sorted((*unpack_compressed(entry, bits), guest, place, entry) for entry, guest, place in clusters)
        index = 0
        while index < len(places):
            start = stop = places[index][0]
            pieces, first = array("Q"), index
            while index < len(places) and places[index][0] <= stop + _GAP and stop - start < _BATCH:
                offset, length, _, place, _ = places[index]
                if offset >= end:
                    raise self.missing(offset)
                length = min(length, end - offset, most)
                pieces.extend((offset - start, length, place))
                stop = max(stop, offset + length)
                index += 1
            stored = bytearray(stop - start)
            self.data.read_into(start, [stored])
            try:
                self.codec.decompress_many(pieces, stored, view)
            except CorruptImage:
                # One by one, to tell which.
                for _, _, guest, place, entry in places[first:index]:
                    self._decode(entry, guest, view[place : place + self.header.cluster_size])
                raise

    def forget(self) -> None:
        """Drop decoded clusters: their space may be somebody else's now."""
        self._kept.clear()

    def raw_compressed(self, entry: int) -> bytes:
        """The stored bytes behind a compressed entry, up to the end of its last sector."""
        offset, length = unpack_compressed(entry, self.header.cluster_bits)
        size = self.data.size
        if offset >= size:
            raise self.missing(offset)
        # A whole cluster never shrinks below nothing: more than two of input is no valid stream.
        data = bytearray(min(length, size - offset, 2 * self.header.cluster_size + SECTOR))
        self.data.read_into(offset, [data])
        return bytes(data)

    def _decode(self, entry: int, guest: int, view: memoryview) -> None:
        data = self.raw_compressed(entry)
        try:
            self.codec.decompress_into(data, view)
        except CorruptImage as error:
            raise CorruptImage(
                f"compressed cluster at guest offset {guest:#x} cannot be decoded: {error.message}",
                path=self.storage.name,
            ) from error
