# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""The text record of one volume: 512 bytes that say what the volume is.

Lines ``KEY=value``, sorted, then ``EOF``; at most 512 bytes of UTF-8.  A file
domain keeps exactly the text in ``<volume>.meta``, a block domain the text
with NULs after it in the volume's slot.

Invariant: pure; a record is either written whole within its limit or refused
before anything is changed, and no value can end its line or the record.

Source: VDSM's volume metadata, domain versions 0 to 5.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final, NamedTuple, TypedDict

from .errors import InvalidName, MetadataError, printable
from .ids import BLANK, check_id
from .sealed import check_value

__all__ = [
    "COW",
    "DISK_TYPES",
    "FAKE",
    "ILLEGAL",
    "INTERNAL",
    "LEAF",
    "LEGAL",
    "PREALLOCATED",
    "RAW",
    "RECORD_SIZE",
    "SHARED",
    "SPARSE",
    "STATUS_INIT",
    "STATUS_INVALID",
    "STATUS_OK",
    "STATUS_REMOVED",
    "ParsedVolume",
    "VolumeMetadata",
    "VolumeValues",
    "next_generation",
    "parse",
    "parse_lenient",
]

RAW: Final = "RAW"
COW: Final = "COW"
PREALLOCATED: Final = "PREALLOCATED"
SPARSE: Final = "SPARSE"
LEAF: Final = "LEAF"
INTERNAL: Final = "INTERNAL"
SHARED: Final = "SHARED"
LEGAL: Final = "LEGAL"
ILLEGAL: Final = "ILLEGAL"
FAKE: Final = "FAKE"

STATUS_OK: Final = "OK"
STATUS_INIT: Final = "INIT"
STATUS_INVALID: Final = "INVALID"
STATUS_REMOVED: Final = "REMOVED"

#: Bytes of a record; also the size of a slot below version 5.
RECORD_SIZE: Final = 512
#: Characters of a description; longer ones are cut.
DESCRIPTION_LIMIT: Final = 210
GENERATION_LIMIT: Final = 999
SEQUENCE_LIMIT: Final = 2**32 - 1
_SECTOR: Final = 512

#: What new volumes may be for; "1" and "2" come from old tools.
DISK_TYPES: Final = frozenset(
    {"DATA", "ISOF", "MEMD", "MEMM", "OVFS", "HEVD", "HESD", "HEMD", "HECI", "SCRD", "1", "2"}
)
FORMATS: Final = frozenset({RAW, COW})
TYPES: Final = frozenset({PREALLOCATED, SPARSE})
ROLES: Final = frozenset({LEAF, INTERNAL, SHARED})
LEGALITIES: Final = frozenset({LEGAL, ILLEGAL, FAKE})

_NUMBER: Final = re.compile(r"[0-9]{1,20}")
_WORD: Final = re.compile(r"[A-Za-z0-9_]{1,32}")


class VolumeValues(TypedDict, total=False):
    """The fields that could be read of a record, by name."""

    domain: str
    image: str
    parent: str
    capacity: int
    format: str
    type: str
    voltype: str
    disktype: str
    description: str
    legality: str
    ctime: int
    generation: int
    sequence: int


class VolumeMetadata(NamedTuple):
    """One volume's record; capacity in bytes, ctime in seconds since 1970.

    ``parent`` is BLANK for a base.  ``generation`` counts finished jobs (0 to
    999, then 0 again), ``sequence`` the volumes made in the image.
    """

    domain: str
    image: str
    parent: str
    capacity: int
    format: str
    type: str
    voltype: str
    disktype: str
    description: str
    legality: str
    ctime: int
    generation: int = 0
    sequence: int = 0

    def to_bytes(self, version: int, overrides: Mapping[str, str] | None = None) -> bytes:
        """Return the record's text for a domain of *version*.

        *overrides* are keys to add or replace, for a record that two versions
        must be able to read (both sizes while a domain is converted).  The
        description is cut at 210 characters.

        Raises: InvalidName for a value that cannot be written, MetadataError
        when the text exceeds 512 bytes (non-ASCII descriptions can).
        """
        self._check()
        pairs = {
            "CTIME": str(self.ctime),
            "DESCRIPTION": self.description[:DESCRIPTION_LIMIT],
            "DISKTYPE": self.disktype,
            "DOMAIN": self.domain,
            "FORMAT": self.format,
            "GEN": str(self.generation),
            "IMAGE": self.image,
            "LEGALITY": self.legality,
            "PUUID": self.parent,
            "TYPE": self.type,
            "VOLTYPE": self.voltype,
        }
        if version < 5:
            # Versions below 5 count in sectors; a last partial one is lost
            # here, so capacities are rounded before they come here.
            pairs["SIZE"] = str(self.capacity // _SECTOR)
            pairs["MTIME"] = "0"
        else:
            pairs["CAP"] = str(self.capacity)
            pairs["SEQ"] = str(self.sequence)
        pairs.update(overrides or {})
        data = ("".join(f"{key}={pairs[key]}\n" for key in sorted(pairs)) + "EOF\n").encode()
        if len(data) > RECORD_SIZE:
            raise MetadataError(
                f"the record of a volume needs {len(data)} bytes, its limit is {RECORD_SIZE}",
                hint=f"Shorten the description by {len(data) - RECORD_SIZE} bytes; non-ASCII characters take 2 to 4.",
            )
        return data

    def to_slot(self, version: int, overrides: Mapping[str, str] | None = None) -> bytes:
        """Return the text padded with NULs to 512 bytes, as block domains store it."""
        return self.to_bytes(version, overrides).ljust(RECORD_SIZE, b"\0")

    def _check(self) -> None:
        check_id(self.domain, "domain UUID")
        check_id(self.image, "image UUID")
        check_id(self.parent, "parent UUID", blank=True)
        words = {"FORMAT": self.format, "TYPE": self.type, "VOLTYPE": self.voltype, "LEGALITY": self.legality}
        for key, word in words.items():
            if not _WORD.fullmatch(word):
                raise InvalidName(f"not a value of {key}: '{printable(word[:40])}'")
        check_value(self.disktype, "DISKTYPE")
        check_value(self.description, "DESCRIPTION")
        numbers = (
            ("capacity", self.capacity, 2**63 - 1),
            ("ctime", self.ctime, 2**63 - 1),
            ("generation", self.generation, GENERATION_LIMIT),
            ("sequence", self.sequence, SEQUENCE_LIMIT),
        )
        for name, number, limit in numbers:
            if not 0 <= number <= limit:
                raise InvalidName(f"the {name} of a volume must be within 0 and {limit}, not {number}")

    @property
    def is_base(self) -> bool:
        """Whether it has no parent."""
        return self.parent == BLANK

    @property
    def is_shared(self) -> bool:
        """Whether it is a template: immutable, possibly with children in other images."""
        return self.voltype == SHARED


class ParsedVolume(NamedTuple):
    """What a lenient reader got: *values* that are good, *problems* in words."""

    values: VolumeValues
    problems: tuple[str, ...]

    @property
    def status(self) -> str:
        """``OK`` or ``INVALID``."""
        return STATUS_INVALID if self.problems else STATUS_OK


def next_generation(generation: int) -> int:
    """Return the generation after a finished job."""
    return (generation + 1) % (GENERATION_LIMIT + 1)


_TEXT_FIELDS: Final = (
    ("DOMAIN", "domain"),
    ("IMAGE", "image"),
    ("PUUID", "parent"),
    ("FORMAT", "format"),
    ("TYPE", "type"),
    ("VOLTYPE", "voltype"),
    ("DISKTYPE", "disktype"),
    ("DESCRIPTION", "description"),
    ("LEGALITY", "legality"),
)


def _pairs(data: bytes) -> tuple[dict[str, str], list[str]]:
    pairs: dict[str, str] = {}
    problems = []
    for raw in data[: RECORD_SIZE * 8].rstrip(b"\0").split(b"\n"):
        if raw.startswith(b"EOF"):
            break
        key, separator, value = raw.partition(b"=")
        if not separator:
            continue
        try:
            pairs[key.decode().strip()] = value.decode().strip().strip("\0")
        except UnicodeDecodeError:
            problems.append(f"line '{printable(raw[:40])}' is not UTF-8")
    return pairs, problems


def _number(pairs: Mapping[str, str], key: str, problems: list[str]) -> int | None:
    text = pairs[key]
    if not _NUMBER.fullmatch(text):
        problems.append(f"{key} is not a number: '{printable(text[:40])}'")
        return None
    return int(text)


def parse_lenient(data: bytes) -> ParsedVolume:
    """Return all that is good in a record and a list of what is not.

    Reading stops at a line that begins ``EOF``; lines without ``=`` are
    skipped; the last of two equal keys counts; ``SIZE`` (sectors) counts only
    without ``CAP`` (bytes).
    """
    pairs, problems = _pairs(data)
    if "NONE" in pairs:
        problems.append("the record was cleared when its volume was deleted")
    values: VolumeValues = {"generation": 0, "sequence": 0}
    for key, field in _TEXT_FIELDS:
        if key in pairs:
            values[field] = pairs[key]  # type: ignore[literal-required]
        else:
            problems.append(f"{key} is missing")
    for key, field in (("CTIME", "ctime"), ("GEN", "generation"), ("SEQ", "sequence")):
        if key in pairs:
            number = _number(pairs, key, problems)
            if number is not None:
                values[field] = number  # type: ignore[literal-required]
        elif key == "CTIME":
            problems.append("CTIME is missing")
    size_key, unit = ("CAP", 1) if "CAP" in pairs else ("SIZE", _SECTOR)
    if size_key in pairs:
        number = _number(pairs, size_key, problems)
        if number is not None:
            values["capacity"] = number * unit
    else:
        problems.append("CAP and SIZE are missing")
    return ParsedVolume(values, tuple(problems))


def parse(data: bytes, path: str | None = None) -> VolumeMetadata:
    """Return the record; every problem is an error.

    Raises: MetadataError with all problems.
    """
    values, problems = parse_lenient(data)
    if problems:
        raise MetadataError(f"invalid volume metadata: {'; '.join(problems)}", path=path, problems=problems)
    return VolumeMetadata(**values)
