# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""``--object secret,...``: passphrases for encrypted images.

Invariant: a secret is kept as bytes and appears in no message.
"""

from __future__ import annotations

from qcowlib.cli.console import Failure
from qcowlib.cli.values import split_options

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["parse_secrets", "passphrase"]

_KEYS = frozenset(("qom-type", "id", "data", "file", "format", "keyid", "iv"))


def parse_secrets(texts: Sequence[str]) -> dict[str, bytes]:
    """Return the passphrases by id.  Raises :class:`Failure`."""
    secrets: dict[str, bytes] = {}
    for text in texts:
        name, data = _secret(_properties(text), secrets)
        if name in secrets:
            raise Failure(f"attempt to add duplicate property '{name}' to object (type 'container')")
        secrets[name] = data
    return secrets


def passphrase(name: str, secrets: Mapping[str, bytes]) -> bytes:
    """Return the passphrase with id *name*.  Raises :class:`Failure` if there is none or it is not UTF-8."""
    if name not in secrets:
        raise Failure(f"No secret with id '{name}'")
    try:
        secrets[name].decode()
    except UnicodeDecodeError:
        # Without the cause, which holds the bytes.
        raise Failure(f"Data from secret {name} is not valid UTF-8") from None
    return secrets[name]


def _properties(text: str) -> dict[str, str]:
    found: dict[str, str] = {}
    if text.startswith("{"):
        from qcowlib.cli.jsonin import JsonError, parse_json

        value, wrong = None, ""
        try:
            value = parse_json(text)
        except JsonError as error:
            # Without the word that is wrong, which may be the passphrase.
            wrong = str(error).partition(" '")[0]
        if wrong:
            raise Failure(wrong)
        if isinstance(value, dict):
            found = {key: item for key, item in value.items() if isinstance(item, str)}
        return found
    for index, (key, item) in enumerate(split_options(text)):
        if item is not None:
            found[key] = item
        elif index == 0:
            found["qom-type"] = key
        else:
            raise Failure(f"Expected '=' after parameter '{_shown(key, found)}'")
    return found


def _shown(key: str, found: Mapping[str, str]) -> str:
    """Return *key* for a message; behind ``data`` it may be the rest of a passphrase with a comma in it."""
    before = list(found)
    if key in found:
        del before[before.index(key) :]
    return "..." if "data" in before else key


def _secret(found: dict[str, str], known: Mapping[str, bytes]) -> tuple[str, bytes]:
    kind = found.get("qom-type")
    if not kind:
        raise Failure("Parameter 'qom-type' is missing")
    if kind != "secret":
        raise Failure(f"Parameter 'qom-type' does not accept value '{kind}'")
    name = found.get("id")
    if name is None:
        raise Failure("Parameter 'id' is missing")
    for key in found:
        if key not in _KEYS:
            raise Failure(f"Parameter '{_shown(key, found)}' is unexpected")
    encoding = found.get("format", "raw")
    if encoding not in ("raw", "base64"):
        raise Failure(f"Parameter 'format' does not accept value '{encoding}'")
    if not (name[:1].isascii() and name[:1].isalpha() and all(c.isalnum() or c in "-._" for c in name)):
        raise Failure(
            "Parameter 'id' expects an identifier",
            hint="Identifiers consist of letters, digits, '-', '.', '_', starting with a letter.\n",
        )
    if "keyid" in found:
        return name, _decrypted(name, found, encoding, known)
    return name, _load(name, found, encoding)


def _decrypted(name: str, found: dict[str, str], encoding: str, known: Mapping[str, bytes]) -> bytes:
    """Return a secret that is given encrypted with another one.  Source: qemu ignores ``iv`` without ``keyid``."""
    from qcowlib.crypto import Secret, decrypt_secret
    from qcowlib.errors import Error

    key = known.get(found["keyid"])
    if key is None:
        raise Failure(f"No secret with id '{found['keyid']}'")
    if "iv" not in found:
        raise Failure("IV is required to decrypt secret")
    try:
        iv = Secret.load("iv", data=found["iv"], encoding="base64").reveal()
        return decrypt_secret(_load(name, found, encoding), key, iv)
    except Error as error:
        raise Failure(error.message) from None


def _load(name: str, found: dict[str, str], encoding: str) -> bytes:
    from qcowlib.crypto import Secret
    from qcowlib.errors import Error, StorageError

    path = found.get("file")
    try:
        return Secret.load(name, data=found.get("data"), file=path, encoding=encoding).reveal()
    except StorageError as error:
        raise Failure(f"Unable to read {path}: Failed to open file “{path}”: {error.strerror}") from None
    except Error as error:
        raise Failure(error.message) from None
