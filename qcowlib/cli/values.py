# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Values on the command line: sizes, booleans, numbers and ``-o`` lists.

Invariant: every number is bounded before it is used, and a text is either
accepted in full or refused with the words of qemu-img.
"""

from __future__ import annotations

from qcowlib.cli.console import Failure

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from qcowlib.cli.console import Console

__all__ = [
    "MAX_SIZE",
    "parse_bool",
    "parse_decimal",
    "parse_number",
    "parse_size",
    "size_option",
    "split_options",
]

MAX_SIZE = (1 << 63) - 1
_MAX_U64 = (1 << 64) - 1
_UNITS = "bkmgtpe"
_DIGITS = frozenset("0123456789")
_HEX = frozenset("0123456789abcdefABCDEF")

SIZE_HINT = "Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\nand exabytes, respectively.\n"


def parse_size(text: str, console: Console | None = None) -> int | None:
    """Return the bytes that *text* means, or None if it means none.

    Decimal with an optional fraction and suffix b k M G T P E (any case), or
    hexadecimal.  A fraction needs a suffix of k or more; halves round up.
    The result may exceed 64 bits; the caller bounds it.
    """
    text = text.lstrip(" \t\n\v\f\r")
    text = text.removeprefix("+")
    if text[:2] in ("0x", "0X") and text[2:3] in _HEX and len(text) > 2:
        return _hex_size(text, console)
    end = _span(text, 0, _DIGITS)
    if not 0 < end <= 400:
        return None
    whole, fraction = int(text[:end]), ""
    if text[end : end + 1] == ".":
        stop = _span(text, end + 1, _DIGITS)
        fraction, end = text[end + 1 : stop], stop
    shift = _suffix(text[end:])
    if shift is None or len(fraction) > 400 or (shift == 0 and fraction.strip("0")):
        return None
    if not fraction:
        return whole << shift
    # qemu-img takes the fraction from the whole number as a C double.
    part = float(text[:end]) % 1.0
    return (whole << shift) + int(part * (1 << shift) + 0.5)


def _hex_size(text: str, console: Console | None) -> int | None:
    end = _span(text, 2, _HEX)
    shift = _suffix(text[end:])
    if shift is None or end > 400:
        return None
    if end < len(text) and console is not None:
        console.warn(f"Using a multiplier suffix on hex numbers is deprecated: {text}")
    return int(text[2:end], 16) << shift


def _span(text: str, start: int, allowed: frozenset[str]) -> int:
    while start < len(text) and text[start] in allowed:
        start += 1
    return start


def _suffix(text: str) -> int | None:
    if not text:
        return 0
    index = _UNITS.find(text.lower()) if len(text) == 1 else -1
    return index * 10 if index >= 0 else None


def size_option(name: str, text: str, console: Console | None = None, *, low: int = 0, high: int = MAX_SIZE) -> int:
    """Return *text* as bytes between *low* and *high*; *name* is what it is called.

    Raises :class:`Failure`.
    """
    value = parse_size(text, console)
    if value is None:
        raise Failure(
            f"Invalid {name} specified. You may use k, M, G, T, P or E suffixes for",
            "kilobytes, megabytes, gigabytes, terabytes, petabytes and exabytes.",
        )
    if not low <= value <= high:
        raise Failure(f"Invalid {name} specified. Must be between {low} and {high}.")
    return value


def parse_decimal(text: str) -> int | None:
    """Return the unsigned decimal number *text*, or None."""
    stripped = text.lstrip(" \t").removeprefix("+")
    if not stripped or len(stripped) > 20 or _span(stripped, 0, _DIGITS) != len(stripped):
        return None
    return int(stripped)


def parse_number(name: str, text: str) -> int:
    """Return the 64-bit number of option *name*: decimal, octal (0...) or hexadecimal.

    A minus sign wraps around, as in C.  Raises :class:`Failure`.
    """
    body = text.lstrip(" \t\n\v\f\r")
    negative = body.startswith("-")
    body = body[1:] if body[:1] in ("-", "+") else body
    base, digits, allowed = 10, body, _DIGITS
    if body[:2] in ("0x", "0X"):
        base, digits, allowed = 16, body[2:], _HEX
    elif body.startswith("0"):
        base, allowed = 8, frozenset("01234567")
    if not digits or len(digits) > 400 or _span(digits, 0, allowed) != len(digits):
        raise Failure(f"Parameter '{name}' expects a number")
    value = int(digits, base)
    if value > _MAX_U64:
        raise Failure(f"Value '{text}' is too large for parameter '{name}'")
    return -value & _MAX_U64 if negative else value


def parse_bool(name: str, text: str) -> bool:
    """Return the boolean of option *name*.  Raises :class:`Failure`."""
    if text in ("on", "yes", "true", "y"):
        return True
    if text in ("off", "no", "false", "n"):
        return False
    raise Failure(f"Parameter '{name}' expects 'on' or 'off'")


def list_size(name: str, text: str, console: Console | None = None) -> int:
    """Return the size in an option list, 0 to 2**64 - 1.  Raises :class:`Failure`."""
    value = parse_size(text, console)
    if value is None:
        raise Failure(f"Parameter '{name}' expects a non-negative number below 2^64", hint=SIZE_HINT)
    if value > _MAX_U64:
        raise Failure(f"Value '{text}' is out of range for parameter '{name}'")
    return value


def check_list(text: str) -> None:
    """Refuse an option list that could not be joined with others.  Raises :class:`Failure`."""
    commas = len(text) - len(text.rstrip(","))
    if not text or text[0] == "," or commas % 2:
        raise Failure(f"Invalid option list: {text}")


def split_options(text: str) -> list[tuple[str, str | None]]:
    """Return the ``key=value`` items of *text*; a key alone has the value None.

    Commas separate items; in a value a doubled comma is a literal one.
    """
    items: list[tuple[str, str | None]] = []
    position, end = 0, len(text)
    while position < end:
        comma = text.find(",", position)
        comma = end if comma < 0 else comma
        equals = text.find("=", position, comma)
        if equals < 0:
            items.append((text[position:comma], None))
            position = comma + 1
            continue
        name, position = text[position:equals], equals + 1
        value, position = _value(text, position)
        items.append((name, value))
    return items


def _value(text: str, position: int) -> tuple[str, int]:
    parts = []
    while True:
        comma = text.find(",", position)
        if comma < 0:
            parts.append(text[position:])
            return "".join(parts), len(text)
        if text[comma + 1 : comma + 2] != ",":
            parts.append(text[position:comma])
            return "".join(parts), comma + 1
        parts.append(text[position : comma + 1])
        position = comma + 2


def wants_help(lists: Sequence[str]) -> bool:
    """Return whether an item of the lists is ``help`` or ``?``."""
    return any(name in ("help", "?") and value is None for text in lists for name, value in split_options(text))
