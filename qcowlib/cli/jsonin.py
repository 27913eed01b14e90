# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""A reader for ``json:{...}`` file names.

Invariant: nesting is bounded, so no name can exhaust the stack.  Differs from
:mod:`json` where QEMU does: strings may be in single quotes, and nothing is
imported for it at start.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    JsonIn = None | bool | int | str | list["JsonIn"] | dict[str, "JsonIn"]

__all__ = ["JsonError", "parse_json"]

_MAX_DEPTH = 64
_SPACE = " \t\r\n"
_KEYWORDS: dict[str, bool | None] = {"true": True, "false": False, "null": None}
_ESCAPES = {'"': '"', "'": "'", "\\": "\\", "/": "/", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}


class JsonError(ValueError):
    """The text is not JSON; the message says what was expected."""


def parse_json(text: str) -> JsonIn:
    """Return the value of *text*.  Raises :class:`JsonError`."""
    value, end = _value(text, _skip(text, 0), 0)
    if _skip(text, end) != len(text):
        raise JsonError("JSON parse error, expecting value")
    return value


def _skip(text: str, position: int) -> int:
    while position < len(text) and text[position] in _SPACE:
        position += 1
    return position


def _value(text: str, position: int, depth: int) -> tuple[JsonIn, int]:
    if depth > _MAX_DEPTH:
        raise JsonError("JSON parse error, too many nested levels")
    char = text[position : position + 1]
    if not char:
        raise JsonError("JSON parse error, premature EOI")
    if char == "{":
        return _object(text, position + 1, depth)
    if char == "[":
        return _array(text, position + 1, depth)
    if char in "\"'":
        return _string(text, position)
    if char == "-" or char.isdigit():
        return _number(text, position)
    end = position
    while end < len(text) and (text[end].isalnum() or text[end] == "_"):
        end += 1
    word = text[position:end]
    if word in _KEYWORDS:
        return _KEYWORDS[word], end
    if word:
        raise JsonError(f"JSON parse error, invalid keyword '{word}'")
    raise JsonError("JSON parse error, expecting value")


def _object(text: str, position: int, depth: int) -> tuple[dict[str, JsonIn], int]:
    result: dict[str, JsonIn] = {}
    position = _skip(text, position)
    if text[position : position + 1] == "}":
        return result, position + 1
    while True:
        if position >= len(text):
            raise JsonError("JSON parse error, premature EOI")
        if text[position] not in "\"'":
            raise JsonError("JSON parse error, key is not a string in object")
        key, position = _string(text, position)
        position = _skip(text, position)
        if text[position : position + 1] != ":":
            raise JsonError("JSON parse error, missing : in object pair")
        if key in result:
            raise JsonError("JSON parse error, duplicate key")
        result[key], position = _value(text, _skip(text, position + 1), depth + 1)
        position, done = _separator(text, position, "}", "dict")
        if done:
            return result, position


def _array(text: str, position: int, depth: int) -> tuple[list[JsonIn], int]:
    result: list[JsonIn] = []
    position = _skip(text, position)
    if text[position : position + 1] == "]":
        return result, position + 1
    while True:
        item, position = _value(text, _skip(text, position), depth + 1)
        result.append(item)
        position, done = _separator(text, position, "]", "list")
        if done:
            return result, position


def _separator(text: str, position: int, closing: str, what: str) -> tuple[int, bool]:
    position = _skip(text, position)
    char = text[position : position + 1]
    if char == closing:
        return position + 1, True
    if not char:
        raise JsonError("JSON parse error, premature EOI")
    if char != ",":
        raise JsonError(f"JSON parse error, expected separator in {what}")
    return _skip(text, position + 1), False


def _string(text: str, position: int) -> tuple[str, int]:
    quote, position = text[position], position + 1
    parts: list[str] = []
    while True:
        char = text[position : position + 1]
        if not char:
            raise JsonError("JSON parse error, premature EOI")
        if char == quote:
            return "".join(parts), position + 1
        position += 1
        if char != "\\":
            parts.append(char)
            continue
        escape, position = text[position : position + 1], position + 1
        if escape == "u":
            code, position = _hex_escape(text, position)
            if 0xD800 <= code < 0xDC00 and text[position : position + 2] == "\\u":
                low, after = _hex_escape(text, position + 2)
                if 0xDC00 <= low < 0xE000:
                    code, position = 0x10000 + ((code - 0xD800) << 10) + low - 0xDC00, after
            parts.append(chr(code))
        elif escape in _ESCAPES:
            parts.append(_ESCAPES[escape])
        else:
            raise JsonError("JSON parse error, invalid escape in string")


def _hex_escape(text: str, position: int) -> tuple[int, int]:
    digits = text[position : position + 4]
    if len(digits) != 4 or any(digit not in "0123456789abcdefABCDEF" for digit in digits):
        raise JsonError("JSON parse error, invalid hex escape in string")
    return int(digits, 16), position + 4


def _number(text: str, position: int) -> tuple[int, int]:
    end = position + 1
    while end < len(text) and text[end].isdigit():
        end += 1
    try:
        if end - position > 20:
            raise ValueError
        return int(text[position:end]), end
    except ValueError:
        raise JsonError(f"JSON parse error, invalid number '{text[position:end][:40]}'") from None
