# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Encryption options of new images.

Invariant: a passphrase goes from ``--object`` into the key derivation and
nowhere else.
"""

from __future__ import annotations

from qcowlib.cli.console import Failure
from qcowlib.cli.objects import passphrase
from qcowlib.ondisk import CRYPT_AES, CRYPT_LUKS
from qcowlib.qcow2.create import Encryption

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from qcowlib.cli.optlist import OptionList
    from qcowlib.luks import LuksHeader
    from qcowlib.storage.base import Storage

__all__ = ["encrypted_bytes", "encryption_of", "luks_area", "luks_header", "luks_size"]

_DEFAULT_TIME = 2000

_CIPHERS = (
    "aes-128 aes-192 aes-256 des 3des cast5-128 serpent-128 serpent-192 serpent-256 twofish-128 twofish-192 twofish-256"
)
_HASHES = "md5 sha1 sha224 sha256 sha384 sha512 ripemd160"
#: What QEMU knows by name, whether or not it can be used here.
_CHOICES = {
    "cipher-alg": _CIPHERS,
    "cipher-mode": "ecb cbc xts ctr",
    "ivgen-alg": "plain plain64 essiv",
    "ivgen-hash-alg": _HASHES,
    "hash-alg": _HASHES,
}


def encryption_of(values: OptionList, secrets: Mapping[str, bytes]) -> Encryption | None:
    """Return what a new qcow2 image stores, None without encryption.

    Raises :class:`Failure`, UsageError, UnsupportedFeature, SecretError.
    """
    method = "aes" if values.flag("encryption") else values.text("encrypt.format")
    if method is None:
        return None
    if method == "aes":
        for name in ("cipher-alg", "cipher-mode", "ivgen-alg", "ivgen-hash-alg", "hash-alg", "iter-time"):
            if f"encrypt.{name}" in values:
                raise Failure(f"Parameter 'encrypt.{name}' is unexpected")
        phrase = _passphrase(values, "encrypt.", secrets)
        from qcowlib.crypto import legacy_aes

        legacy_aes(phrase)
        return Encryption(CRYPT_AES)
    if method == "luks":
        return Encryption(CRYPT_LUKS, luks_area(values, "encrypt.", secrets, host_sectors=True))
    raise Failure(f"Parameter 'format' does not accept value '{method}'")


def luks_area(values: OptionList, prefix: str, secrets: Mapping[str, bytes], *, host_sectors: bool) -> bytes:
    """Return a new LUKS header with its key material; the options are named *prefix* + name.

    Raises :class:`Failure`, UsageError, UnsupportedFeature, SecretError.
    """
    _check_choices(values, prefix)
    phrase = _passphrase(values, prefix, secrets)
    from qcowlib.luks import LuksHeader

    area, _ = LuksHeader.create(
        phrase,
        cipher_alg=values.text(f"{prefix}cipher-alg") or "aes-256",
        cipher_mode=values.text(f"{prefix}cipher-mode") or "xts",
        ivgen_alg=values.text(f"{prefix}ivgen-alg") or "plain64",
        ivgen_hash_alg=values.text(f"{prefix}ivgen-hash-alg"),
        hash_alg=values.text(f"{prefix}hash-alg") or "sha256",
        iter_time=values.number(f"{prefix}iter-time", _DEFAULT_TIME),
        host_sectors=host_sectors,
    )
    return area


def luks_header(storage: Storage) -> LuksHeader:
    """Return the header of a LUKS file.  Raises FormatError, CorruptImage."""
    from qcowlib.luks import HEADER_BYTES, LuksHeader

    area = bytearray(HEADER_BYTES)
    storage.read_into(0, [area])
    return LuksHeader.parse(area)


def luks_size(storage: Storage) -> int:
    """Return the bytes inside a LUKS file, in whole sectors; needs no key."""
    return max(0, storage.size - luks_header(storage).payload) // 512 * 512


def encrypted_bytes(fmt: str, values: OptionList, secrets: Mapping[str, bytes]) -> int:
    """Return how long the encryption header of a new image is (0 without one).  Raises :class:`Failure`."""
    if fmt == "raw" or (fmt == "qcow2" and values.text("encrypt.format") != "luks"):
        return 0
    prefix = "" if fmt == "luks" else "encrypt."
    _check_choices(values, prefix)
    _passphrase(values, prefix, secrets)
    from qcowlib.luks import luks_header_length

    return luks_header_length(
        values.text(f"{prefix}cipher-alg") or "aes-256", values.text(f"{prefix}cipher-mode") or "xts"
    )


def _check_choices(values: OptionList, prefix: str) -> None:
    for option, known in _CHOICES.items():
        value = values.text(prefix + option)
        if value is not None and value not in known.split():
            raise Failure(f"Parameter '{option}' does not accept value '{value}'")


def _passphrase(values: OptionList, prefix: str, secrets: Mapping[str, bytes]) -> bytes:
    name = values.text(f"{prefix}key-secret")
    if name is None:
        raise Failure(f"Parameter '{prefix}key-secret' is required for cipher")
    return passphrase(name, secrets)
