# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""UUIDs as text: the only names that become paths, tags and lines of metadata.

Invariant: one object has one spelling.  Only lower-case hexadecimal with four
dashes passes, so that no braces, URN, upper case, line end or glob pattern can
make a second name for a file.  The library's ``uuid`` module accepts all of
those and is not used for checks.
"""

from __future__ import annotations

import os
import re
from typing import Final

from .errors import InvalidName, printable

__all__ = ["BLANK", "ISO_IMAGE", "check_id", "is_id", "make_id"]

#: The UUID that stands for "none": the parent of a base volume.
BLANK: Final = "00000000-0000-0000-0000-000000000000"
#: The image directory of an ISO domain.
ISO_IMAGE: Final = "11111111-1111-1111-1111-111111111111"

_ID: Final = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")


def is_id(text: object) -> bool:
    """Whether *text* is a UUID in its one accepted spelling."""
    return isinstance(text, str) and _ID.fullmatch(text) is not None


def check_id(text: str, what: str = "UUID", *, blank: bool = False) -> str:
    """Return *text* if it is a UUID, else raise :class:`InvalidName` naming *what*.

    The blank UUID is refused unless *blank* is set.
    """
    if not is_id(text) or (text == BLANK and not blank):
        shown = printable(text[:64]) if isinstance(text, str) else type(text).__name__
        raise InvalidName(f"not a valid {what}: '{shown}'")
    return text


def make_id() -> str:
    """Return a new random (version 4) UUID."""
    raw = bytearray(os.urandom(16))
    raw[6] = raw[6] & 0x0F | 0x40
    raw[8] = raw[8] & 0x3F | 0x80
    text = raw.hex()
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"
