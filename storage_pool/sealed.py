# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Sealed text: the dictionary of a domain and its pool, as lines or as LVM tags.

Lines ``KEY=VALUE``, sorted, then ``_SHA_CKSUM=`` with the SHA-1 over all lines
without their ends.  Invariant: what is written can be read back by every
writer of these domains; nothing that would make another line, or be changed
by a reader's stripping, is accepted.  Keys that are not known are kept.

Source: VDSM's persistent dictionary, domain versions 0 to 5.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Final

from .errors import InvalidName, MetadataError, printable

__all__ = [
    "CHECKSUM_KEY",
    "TAG_PREFIX",
    "SealedStore",
    "check_value",
    "checksum",
    "decode_tag",
    "encode_tag",
    "from_lines",
    "from_tags",
    "split_lines",
    "to_lines",
    "to_tags",
]

CHECKSUM_KEY: Final = "_SHA_CKSUM"
TAG_PREFIX: Final = "MDT_"

_KEY: Final = re.compile(r"[A-Z_][A-Z0-9_]{0,63}")
# Control characters (but the tabulator), the Unicode line ends and what no
# UTF-8 text can hold.
_LINE_BREAKING: Final = re.compile("[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
# Tags may also hold "&", which is what the code of other characters needs.
_UNSAFE: Final = re.compile(r"[^a-zA-Z0-9_+.\-/=!:#]")
_CODED: Final = re.compile(r"&([0-9]{1,7})&")
#: LVM's own limit on the length of a tag.
TAG_LIMIT: Final = 1024


def checksum(lines: Iterable[str]) -> str:
    """Return the seal of *lines* (sorted, without line ends) as hexadecimal text."""
    digest = hashlib.sha1(usedforsecurity=False)
    for line in lines:
        digest.update(line.encode("ascii", "xmlcharrefreplace"))
    return digest.hexdigest()


def _check_pair(key: str, value: str) -> None:
    if not _KEY.fullmatch(key):
        raise InvalidName(f"not a valid metadata key: '{printable(key[:64])}'")
    check_value(value, key)


def check_value(value: str, key: str) -> str:
    """Return *value* if it stays one line under every way to split lines, else raise InvalidName."""
    if _LINE_BREAKING.search(value):
        raise InvalidName(f"the value of {printable(key[:64])} has characters that do not belong in one line of text")
    return value


def to_lines(values: Mapping[str, str]) -> list[str]:
    """Return the sealed lines of *values*.

    Raises: InvalidName for a key or value that cannot be one line.
    """
    for key, value in values.items():
        _check_pair(key, value)
    lines = [f"{key}={values[key]}" for key in sorted(values)]
    return [*lines, f"{CHECKSUM_KEY}={checksum(lines)}"]


def split_lines(data: bytes, path: str | None = None) -> list[str]:
    """Return the lines of *data*, a file's content possibly padded with NULs.

    Only line feed and carriage return end a line, as for the other readers.
    """
    try:
        return [line.decode() for line in data.rstrip(b"\0").splitlines()]
    except UnicodeDecodeError as error:
        raise MetadataError("metadata is not UTF-8 text", path=path) from error


def from_lines(lines: Iterable[str], path: str | None = None) -> dict[str, str]:
    """Return the dictionary of sealed *lines*; empty when there is nothing.

    A line without ``=`` is skipped, the last of two equal keys counts, the
    order does not matter, and text without a checksum is trusted.

    Raises: MetadataError when the seal does not fit.
    """
    values: dict[str, str] = {}
    for line in lines:
        key, separator, value = line.partition("=")
        if separator:
            values[key.strip()] = value
    stored = values.pop(CHECKSUM_KEY, None)
    if stored is not None and values:
        computed = checksum(f"{key}={values[key]}" for key in sorted(values))
        if stored.strip() != computed:
            raise MetadataError(
                f"the seal of the metadata is broken: it is {printable(stored[:40])}, the content's {computed}",
                path=path,
            )
    return values


def encode_tag(text: str) -> str:
    """Return *text* with every character that an LVM tag cannot hold as ``&code&``."""
    return _UNSAFE.sub(lambda match: f"&{ord(match[0])}&", text)


def decode_tag(tag: str) -> str:
    """Undo :func:`encode_tag`; a code that is no character stays as it is."""

    def character(match: re.Match[str]) -> str:
        code = int(match[1])
        return chr(code) if code <= 0x10FFFF else match[0]

    return _CODED.sub(character, tag)


def to_tags(values: Mapping[str, str]) -> set[str]:
    """Return the ``MDT_`` tags of *values*, seal included.

    Raises: InvalidName as :func:`to_lines`, or when a tag would exceed LVM's 1024 characters.
    """
    tags = {TAG_PREFIX + encode_tag(line) for line in to_lines(values)}
    for tag in tags:
        if len(tag) > TAG_LIMIT:
            key = tag.partition("=")[0][len(TAG_PREFIX) :]
            raise InvalidName(f"{key} needs {len(tag)} characters as an LVM tag, the limit is {TAG_LIMIT}")
    return tags


def from_tags(tags: Iterable[str], path: str | None = None) -> dict[str, str]:
    """Return the dictionary of the ``MDT_`` tags among *tags*."""
    return from_lines((decode_tag(tag[len(TAG_PREFIX) :]) for tag in sorted(tags) if tag.startswith(TAG_PREFIX)), path)


class SealedStore:
    """A dictionary kept in sealed form: read once, written once per transaction.

    Invariant: memory equals what was last read or successfully written; when
    a transaction's body or its write fails, memory has the old values again.
    """

    __slots__ = ("_depth", "_read", "_values", "_write")

    def __init__(
        self, read: Callable[[], dict[str, str]], write: Callable[[Mapping[str, str], Mapping[str, str]], None]
    ) -> None:
        """*write* gets the new values and those they replace."""
        self._read = read
        self._write = write
        self._values: dict[str, str] | None = None
        self._depth = 0

    def values(self) -> dict[str, str]:
        """Return a copy of the dictionary, reading it the first time."""
        return dict(self._loaded())

    def _loaded(self) -> dict[str, str]:
        if self._values is None:
            self._values = self._read()
        return self._values

    def invalidate(self) -> None:
        """Forget what was read; the next use reads again.

        Raises: ValueError inside a transaction, whose changes it would drop.
        """
        if self._depth:
            raise ValueError("invalidate inside a transaction")
        self._values = None

    @contextmanager
    def transaction(self) -> Iterator[dict[str, str]]:
        """Give the dictionary to change; written once at the outermost end, if changed."""
        values = self._loaded()
        before = dict(values)
        self._depth += 1
        try:
            yield values
            if self._depth == 1 and values != before:
                self._write(dict(values), before)
        except BaseException:
            values.clear()
            values.update(before)
            raise
        finally:
            self._depth -= 1

    def update(self, changes: Mapping[str, str | None]) -> None:
        """Set the given keys, remove those whose value is ``None``, and write."""
        with self.transaction() as values:
            for key, value in changes.items():
                if value is None:
                    values.pop(key, None)
                else:
                    values[key] = value
