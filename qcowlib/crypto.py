# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Passphrases, and ciphers over 512-byte sectors.

Invariant: no key and no passphrase is ever part of a ``repr``, an error or a
pickle; and a cipher changes whole sectors in place, each with an initial
vector made from its number, so that any run of sectors can be transformed on
its own.

AES comes from the system's libcrypto (without the GIL), else from the
``cryptography`` package; without both, encrypted images are refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from qcowlib import native
from qcowlib.errors import SecretError, StorageError, UnsupportedFeature, UsageError, printable
from qcowlib.units import SECTOR

if TYPE_CHECKING:
    from typing import Any, NoReturn, Protocol

    from _typeshed import ReadableBuffer, WriteableBuffer

    class _Engine(Protocol):
        def crypt(
            self, source: ReadableBuffer, target: WriteableBuffer, first_sector: int, encrypt: bool, /
        ) -> None: ...


__all__ = [
    "Cipher",
    "CipherSpec",
    "Secret",
    "available",
    "decrypt_secret",
    "legacy_aes",
    "new_hash",
    "passphrase_of",
]

# Larger files are no passphrases.
_SECRET_LIMIT = 1 << 20


class Secret:
    """A named passphrase, as ``--object secret`` defines it; ``repr`` shows the name only."""

    __slots__ = ("_data", "id")

    def __init__(self, id: str, data: bytes) -> None:
        self.id = id
        self._data = data

    def __repr__(self) -> str:
        return f"Secret({self.id!r})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a secret cannot be pickled")

    @classmethod
    def load(cls, id: str, *, data: str | None = None, file: str | None = None, encoding: str = "raw") -> Secret:
        """Return the secret given as *data* or as the content of *file* (all of it, newlines too).

        *encoding* is ``raw`` or ``base64``.  Raises UsageError for arguments
        that cannot be right, StorageError when *file* cannot be read.
        """
        if encoding not in ("raw", "base64"):
            raise UsageError(f"Parameter 'format' does not accept value '{printable(encoding)}'")
        if data is not None and file is not None:
            raise UsageError("'file' and 'data' are mutually exclusive")
        if file is not None:
            try:
                with open(file, "rb") as stream:
                    raw = stream.read(_SECRET_LIMIT + 1)
            except OSError as error:
                text = f"Unable to read {printable(file)}: {error.strerror}"
                raise StorageError(error.errno or 5, path=file, message=text) from error
            if len(raw) > _SECRET_LIMIT:
                raise UsageError(f"{printable(file)} is too large for a secret")
        elif data is not None:
            raw = data.encode("utf-8", "surrogateescape")
        else:
            raise UsageError("Either 'file' or 'data' must be provided")
        if encoding == "base64":
            raw = _from_base64(raw)
        return cls(id, raw)

    @classmethod
    def parse(cls, text: str) -> Secret:
        """Return the secret that the text of an ``--object`` option defines.

        ``secret,id=ID,data=TEXT[,format=raw|base64]`` or ``...,file=PATH``; a
        doubled comma is a comma.  Messages never repeat a value of ``data``.
        """
        kind, *items = _split(text)
        if kind != "secret":
            raise UsageError("only objects of type 'secret' are known")
        options: dict[str, str] = {}
        for item in items:
            key, equals, value = item.partition("=")
            if key not in ("id", "data", "file", "format") or not equals:
                raise UsageError(f"Parameter '{printable(key) if equals else 'secret'}' is unexpected")
            options[key] = value
        if "id" not in options:
            raise UsageError("Parameter 'id' is missing")
        return cls.load(
            options["id"],
            data=options.get("data"),
            file=options.get("file"),
            encoding=options.get("format", "raw"),
        )

    def reveal(self) -> bytes:
        """Return the bytes of the secret."""
        return self._data

    def passphrase(self) -> bytes:
        """Return the bytes as a passphrase; raises SecretError when they are not UTF-8."""
        try:
            self._data.decode()
        except UnicodeDecodeError:
            # Without the cause, which holds the bytes.
            raise SecretError(f"Data from secret {printable(self.id)} is not valid UTF-8") from None
        return self._data


def _split(text: str) -> list[str]:
    """Split at single commas; two commas are one that does not split."""
    parts = [""]
    pieces = text.split(",")
    index = 0
    while index < len(pieces):
        parts[-1] += pieces[index]
        if index + 2 < len(pieces) and pieces[index + 1] == "":
            parts[-1] += ","
            index += 2
            continue
        index += 1
        if index < len(pieces):
            parts.append("")
    return parts


def decrypt_secret(data: bytes, key: bytes, iv: bytes) -> bytes:
    """Return the secret that AES-256-CBC with PKCS 7 padding made *data* of.  Raises UsageError in qemu's words."""
    if len(key) != 32:
        raise UsageError("Key should be 32 bytes in length")
    if len(iv) != 16:
        raise UsageError(f"IV should be 16 bytes in length not {len(iv)}")
    if len(data) % 16:
        raise UsageError(f"Length {len(data)} must be a multiple of block size 16")
    cipher = Cipher(CipherSpec("cbc", 32, "plain64"), key, host_sectors=False)
    plain = bytearray()
    previous = iv
    for at in range(0, len(data), SECTOR):
        piece = data[at : at + SECTOR]
        sector = bytearray(piece.ljust(SECTOR, b"\0"))
        # Sector 0 has a vector of zeros: the link to what precedes it is added here.
        cipher.decrypt(sector, 0)
        native.xor_into(memoryview(sector)[:16], previous)
        plain += sector[: len(piece)]
        previous = piece[-16:]
    padding = plain[-1] if plain else 0
    if not 0 < padding <= 16 or plain[-padding:] != bytes((padding,)) * padding:
        raise UsageError(f"Incorrect number of padding bytes ({padding}) found on decrypted data")
    return bytes(plain[:-padding])


def _from_base64(raw: bytes) -> bytes:
    import binascii

    try:
        return binascii.a2b_base64(raw.translate(None, b" \t\r\n"), strict_mode=True)
    except binascii.Error:
        raise UsageError("Base64 data contains invalid characters") from None


def passphrase_of(value: Secret | str | bytes) -> bytes:
    """Return the passphrase in bytes of whatever form it was given in."""
    if isinstance(value, Secret):
        return value.passphrase()
    return value.encode() if isinstance(value, str) else bytes(value)


def new_hash(name: str, data: bytes = b"") -> Any:
    """Return a hashlib object; raises UnsupportedFeature when this Python lacks the algorithm."""
    import hashlib

    try:
        return hashlib.new(name, data, usedforsecurity=True)
    except ValueError:
        raise UnsupportedFeature(f"hash algorithm '{printable(name)}' is not available") from None


class CipherSpec(NamedTuple):
    """Which cipher: AES with *key_bytes* of key (both halves for XTS).

    *mode* is ``xts`` or ``cbc``, *ivgen* ``plain`` (sector number, 32 bits),
    ``plain64`` or ``essiv`` (number encrypted with the hash of the key, *ivgen_hash*).
    """

    mode: str
    key_bytes: int
    ivgen: str
    ivgen_hash: str | None = None

    @classmethod
    def parse(cls, name: str, text: str, key_bytes: int) -> CipherSpec:
        """Return the spec of a LUKS header's cipher name and mode (``xts-plain64``, ``cbc-essiv:sha256``).

        Raises UnsupportedFeature for everything but AES in these modes.
        """
        mode, _, rest = text.partition("-")
        ivgen, _, ivgen_hash = rest.partition(":")
        if name != "aes":
            raise UnsupportedFeature(f"cipher '{printable(name)}' is not supported, only aes")
        if mode not in ("xts", "cbc") or ivgen not in ("plain", "plain64", "essiv"):
            raise UnsupportedFeature(f"cipher mode '{printable(text)}' is not supported")
        if ivgen == "essiv" and not ivgen_hash:
            raise UnsupportedFeature("essiv needs a hash algorithm")
        size = key_bytes // 2 if mode == "xts" else key_bytes
        if size not in (16, 24, 32) or (mode == "xts" and key_bytes % 2):
            raise UnsupportedFeature(f"a key of {key_bytes} bytes is not a key of aes in mode {mode}")
        return cls(mode, key_bytes, ivgen, ivgen_hash if ivgen == "essiv" else None)

    @property
    def algorithm(self) -> str:
        """``aes-128``, ``aes-192`` or ``aes-256``."""
        return f"aes-{self.key_bytes * (4 if self.mode == 'xts' else 8)}"

    @property
    def text(self) -> str:
        """The mode as a LUKS header holds it."""
        return f"{self.mode}-{self.ivgen}" + (f":{self.ivgen_hash}" if self.ivgen_hash else "")


class Cipher:
    """A cipher with its key; safe for any number of threads.

    ``host_sectors`` says which number the engine must pass: that of the
    sector in the file (LUKS inside of qcow2) or that of the guest's sector.
    """

    __slots__ = ("_engine", "host_sectors", "spec")

    def __init__(self, spec: CipherSpec, key: bytes, *, host_sectors: bool) -> None:
        if len(key) != spec.key_bytes:
            raise UsageError("the key does not have the length of the cipher's")
        essiv: bytes | None = None
        if spec.ivgen_hash is not None:
            essiv = new_hash(spec.ivgen_hash, key).digest()
            if len(essiv) not in (16, 24, 32):
                raise UnsupportedFeature(f"No AES cipher with key size {len(essiv)} available")
        self.spec = spec
        self.host_sectors = host_sectors
        self._engine = _engine(spec, key, essiv)

    def __repr__(self) -> str:
        return f"Cipher({self.spec.algorithm}, {self.spec.text})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a cipher cannot be pickled")

    def encrypt(self, buffer: WriteableBuffer, first_sector: int) -> None:
        """Encrypt whole sectors in place; *first_sector* is the number of the first."""
        self._run(buffer, buffer, first_sector, True)

    def decrypt(self, buffer: WriteableBuffer, first_sector: int) -> None:
        """Decrypt whole sectors in place."""
        self._run(buffer, buffer, first_sector, False)

    def encrypt_into(self, source: ReadableBuffer, target: WriteableBuffer, first_sector: int) -> None:
        """Encrypt *source* into *target*, of equal length and elsewhere in memory."""
        self._run(source, target, first_sector, True)

    def _run(self, source: ReadableBuffer, target: WriteableBuffer, first_sector: int, encrypt: bool) -> None:
        length = memoryview(source).nbytes
        if length % SECTOR or memoryview(target).nbytes != length:
            raise UsageError(f"{length} bytes are not whole sectors, or the target has another length")
        if not 0 <= first_sector < 1 << 55:
            raise UsageError(f"sector number out of range: {first_sector}")
        self._engine.crypt(source, target, first_sector, encrypt)


def legacy_aes(passphrase: Secret | str | bytes) -> Cipher:
    """Return the cipher of crypt_method 1: AES-128-CBC, guest sectors, the key is the passphrase itself.

    There is nothing to check it against: a wrong passphrase yields noise.
    """
    key = passphrase_of(passphrase)[:16].ljust(16, b"\0")
    return Cipher(CipherSpec("cbc", 16, "plain64"), key, host_sectors=False)


def available() -> str:
    """Return what does AES here: ``libcrypto``, ``cryptography`` or an empty text."""
    if native.crypt_load():
        return "libcrypto"
    try:
        import cryptography
    except ImportError:
        return ""
    return cryptography.__name__


def _engine(spec: CipherSpec, key: bytes, essiv: bytes | None) -> _Engine:
    if native.crypt_load():
        return native.SectorCipher(key, xts=spec.mode == "xts", short_numbers=spec.ivgen == "plain", essiv=essiv)
    return PackageCipher(key, xts=spec.mode == "xts", short_numbers=spec.ivgen == "plain", essiv=essiv)


class PackageCipher:
    """The same transformations through the ``cryptography`` package.

    XTS and decryption in CBC take a few calls for all sectors together: a
    context for each sector would be twenty times slower.
    """

    __slots__ = ("_essiv", "_key", "_short", "_tweak")

    def __init__(self, key: bytes, *, xts: bool, short_numbers: bool, essiv: bytes | None) -> None:
        half = len(key) // 2
        self._key = key[:half] if xts else key
        self._tweak = key[half:] if xts else None
        self._essiv = essiv
        self._short = short_numbers
        self._ecb(self._key, b"", True)

    def _ecb(self, key: bytes, data: ReadableBuffer, encrypt: bool) -> bytearray:
        try:
            from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
        except ImportError:
            raise UnsupportedFeature(
                "encrypted images need libcrypto or the cryptography package", hint="Install qcowlib[luks]."
            ) from None
        cipher = Cipher(algorithms.AES(key), modes.ECB())
        machine = cipher.encryptor() if encrypt else cipher.decryptor()
        return bytearray(machine.update(bytes(data)))

    def crypt(self, source: ReadableBuffer, target: WriteableBuffer, first_sector: int, encrypt: bool) -> None:
        """As ``SectorCipher.crypt``."""
        view = memoryview(source).cast("B")
        vectors = native.sector_numbers(first_sector, len(view) // SECTOR, self._short)
        if self._essiv is not None:
            vectors = self._ecb(self._essiv, vectors, True)
        if self._tweak is not None:
            mask = native.expand_tweaks(self._ecb(self._tweak, vectors, True))
            made = bytearray(view)
            native.xor_into(made, mask)
            made = self._ecb(self._key, made, encrypt)
            native.xor_into(made, mask)
        elif encrypt:
            made = self._chain(bytes(view), vectors)
        else:
            previous = bytearray(len(view))
            for start in range(0, len(view), SECTOR):
                previous[start : start + 16] = vectors[start // 32 : start // 32 + 16]
                previous[start + 16 : start + SECTOR] = view[start : start + SECTOR - 16]
            made = self._ecb(self._key, view, False)
            native.xor_into(made, previous)
        memoryview(target).cast("B")[:] = made

    def _chain(self, data: bytes, vectors: bytearray) -> bytearray:
        """CBC encryption: the chain of a sector goes block by block, so all sectors' n-th blocks are one call."""
        made = bytearray(len(data))
        link = vectors
        for block in range(0, SECTOR, 16):
            column = b"".join(data[at + block : at + block + 16] for at in range(0, len(data), SECTOR))
            native.xor_into(link, column)
            link = self._ecb(self._key, link, True)
            for index in range(len(link) // 16):
                made[index * SECTOR + block : index * SECTOR + block + 16] = link[16 * index : 16 * index + 16]
        return made
