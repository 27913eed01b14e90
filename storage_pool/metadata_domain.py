# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Keys of a domain and of the pool it may be master of, for versions 0 to 5.

The text form is in :mod:`.sealed`; here is what the keys mean.  Version 0 is
what people call V1; there is no 1.  Invariant: pure, and values that a
version does not have are refused when written, tolerated when read.

Source: VDSM's domain and pool metadata.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final, NamedTuple

from .errors import InvalidName, MetadataError, UnsupportedVersion, printable
from .ids import BLANK, check_id, is_id
from .sealed import check_value, from_lines, split_lines, to_lines

__all__ = [
    "ACTIVE",
    "ATTACHED",
    "BACKUP",
    "BLOCK_TYPES",
    "DATA",
    "ISO",
    "LATEST_VERSION",
    "MASTER",
    "POOL_KEYS",
    "REGULAR",
    "VERSIONS",
    "DomainMetadata",
    "PvEntry",
    "decode_pool_domains",
    "encode_pool_domains",
    "new_domain_values",
    "new_pool_values",
    "pack_v1",
    "unpack_v1",
    "v1_bytes_needed",
]

VERSIONS: Final = (0, 2, 3, 4, 5)
LATEST_VERSION: Final = 5

#: Storage types by name; the number is what old interfaces use.
TYPES: Final = {"NFS": 1, "FCP": 2, "ISCSI": 3, "LOCALFS": 4, "CIFS": 5, "POSIXFS": 6, "GLUSTERFS": 7}
BLOCK_TYPES: Final = frozenset({"FCP", "ISCSI"})
DATA: Final = "Data"
ISO: Final = "Iso"
#: The class of export domains.
BACKUP: Final = "Backup"
CLASSES: Final = {DATA: 1, ISO: 2, BACKUP: 3}
MASTER: Final = "Master"
REGULAR: Final = "Regular"

DESCRIPTION_LIMIT: Final = 50
#: Pools are limited to this many domains.
POOL_DOMAINS_LIMIT: Final = 100
#: The text of a version 0 block domain, at the start of its volume ``metadata``.
V1_TEXT_SIZE: Final = 2048
POOL_KEYS: Final = ("POOL_DOMAINS", "POOL_DESCRIPTION", "POOL_SPM_LVER", "POOL_SPM_ID", "MASTER_VERSION")
ACTIVE: Final = "Active"
ATTACHED: Final = "Attached"


class PvEntry(NamedTuple):
    """One ``PVn`` value: a physical volume and where its extents begin in the domain.

    *guid* is the device's multipath name, *uuid* LVM's, the numbers count extents.
    """

    guid: str
    uuid: str
    pestart: int
    pecount: int
    mapoffset: int

    def encode(self) -> str:
        """Return the value of the key."""
        for text in (self.guid, self.uuid):
            if not text or any(character in text for character in ",;\n ") or not text.isprintable():
                raise InvalidName(f"a physical volume's name cannot be in the mapping: '{printable(text[:80])}'")
        return (
            f"pv:{self.guid},uuid:{self.uuid},pestart:{self.pestart},pecount:{self.pecount},mapoffset:{self.mapoffset}"
        )

    @classmethod
    def decode(cls, text: str) -> PvEntry:
        """Read a value; the name may hold colons.  Raises: MetadataError."""
        items = {}
        for item in text.split(","):
            key, separator, value = item.partition(":")
            if separator:
                items[key.strip()] = value
        try:
            numbers = [int(items[key]) for key in ("pestart", "pecount", "mapoffset")]
            return cls(items["pv"], items["uuid"], *numbers)
        except (KeyError, ValueError) as error:
            raise MetadataError(f"not a physical volume mapping: '{printable(text[:80])}'") from error

    def as_dict(self) -> dict[str, str]:
        """Return all fields as text, as reports show them."""
        return {key: str(value) for key, value in self._asdict().items()}


def decode_pool_domains(text: str) -> dict[str, str]:
    """Return ``{domain UUID: Active or Attached}`` of a ``POOL_DOMAINS`` value.

    Entries that are no UUID are left out.
    """
    domains = {}
    for item in text.replace("'", "").split(","):
        uuid, separator, status = item.strip().partition(":")
        if separator and is_id(uuid):
            domains[uuid] = status.capitalize()
    return domains


def encode_pool_domains(domains: Mapping[str, str]) -> str:
    """Return the value of ``POOL_DOMAINS``.  Raises: InvalidName."""
    if len(domains) > POOL_DOMAINS_LIMIT:
        raise InvalidName(f"a pool has at most {POOL_DOMAINS_LIMIT} domains, not {len(domains)}")
    for uuid, status in domains.items():
        check_id(uuid, "domain UUID")
        if status not in (ACTIVE, ATTACHED):
            raise InvalidName(f"a domain of a pool is Active or Attached, not '{printable(status[:40])}'")
    return ",".join(f"{uuid}:{status}" for uuid, status in domains.items())


class DomainMetadata:
    """A read-only view of a domain's keys with their types.

    Raises (on construction): MetadataError when a key that every use needs is
    missing or unreadable; *path* is for the message.
    """

    __slots__ = ("alignment", "block_size", "path", "raw", "uuid", "version")

    def __init__(self, raw: Mapping[str, str], path: str | None = None) -> None:
        self.raw: Mapping[str, str] = dict(raw)
        self.path = path
        self.version = self._integer("VERSION")
        if self.version not in VERSIONS:
            raise MetadataError(f"domain version {self.version} is not known", path=path)
        self.uuid = self._text("SDUUID")
        if not is_id(self.uuid):
            raise MetadataError(f"SDUUID is not a UUID: '{printable(self.uuid[:64])}'", path=path)
        self.block_size, self.alignment = self._geometry()

    def _text(self, key: str) -> str:
        try:
            return self.raw[key]
        except KeyError:
            raise MetadataError(f"the metadata of the domain lacks {key}", path=self.path) from None

    def _integer(self, key: str, default: int | None = None) -> int:
        text = self.raw.get(key)
        if text is None and default is not None:
            return default
        digits = self._text(key).strip()
        if not (digits.isascii() and digits.removeprefix("-").isdigit() and len(digits) < 20):
            raise MetadataError(f"{key} is not a number: '{printable(digits[:40])}'", path=self.path)
        return int(digits)

    def _geometry(self) -> tuple[int, int]:
        if self.version >= 5:
            block_size, alignment = self._integer("BLOCK_SIZE"), self._integer("ALIGNMENT")
        else:
            block_size, alignment = self._integer("BLOCK_SIZE", 512), self._integer("ALIGNMENT", 1 << 20)
            if (block_size, alignment) != (512, 1 << 20):
                raise MetadataError(
                    f"version {self.version} has 512 bytes a block, 1 MiB alignment, not {block_size}, {alignment}",
                    path=self.path,
                )
        if block_size not in (512, 4096) or alignment not in (1 << 20, 2 << 20, 4 << 20, 8 << 20):
            raise MetadataError(f"impossible block size {block_size} or alignment {alignment}", path=self.path)
        return block_size, alignment

    @property
    def type(self) -> str:
        """Storage type by name."""
        return self._text("TYPE")

    @property
    def domain_class(self) -> str:
        """``Data``, ``Iso`` or ``Backup``."""
        return self._text("CLASS")

    @property
    def role(self) -> str:
        """``Master`` or ``Regular``."""
        return self.raw.get("ROLE", REGULAR)

    @property
    def description(self) -> str:
        """The name that people see."""
        return self.raw.get("DESCRIPTION", "")

    @property
    def pools(self) -> tuple[str, ...]:
        """UUIDs of the pools it is attached to."""
        names = (name.strip() for name in self.raw.get("POOL_UUID", "").split(","))
        return tuple(name for name in names if name and name != BLANK)

    @property
    def pool_domains(self) -> dict[str, str]:
        """Members of the pool with their status; of a master only."""
        return decode_pool_domains(self.raw.get("POOL_DOMAINS", ""))

    @property
    def master_version(self) -> int:
        """Version of the master, 0 for a former one or none."""
        return self._integer("MASTER_VERSION", 0)

    @property
    def spm_id(self) -> int:
        """Host id of the pool manager, -1 for none."""
        return self._integer("POOL_SPM_ID", -1)

    @property
    def spm_lver(self) -> int:
        """Term of the pool manager, -1 at the start."""
        return self._integer("POOL_SPM_LVER", -1)

    @property
    def pv_mapping(self) -> dict[int, PvEntry]:
        """Physical volumes by their number; numbers may have gaps."""
        entries = {}
        for key, text in self.raw.items():
            if key.startswith("PV") and key[2:].isascii() and key[2:].isdigit() and len(key) < 8:
                entries[int(key[2:])] = PvEntry.decode(text)
        return dict(sorted(entries.items()))

    def info(self) -> dict[str, object]:
        """Return what reports show of a domain."""
        return {
            "alignment": self.alignment,
            "block_size": self.block_size,
            "class": self.domain_class,
            "name": self.description,
            "pool": list(self.pools),
            "role": self.role,
            "type": self.type,
            "uuid": self.uuid,
            "version": str(self.version),
        }


def check_description(text: str, version: int, what: str = "DESCRIPTION") -> str:
    """Return *text* if a domain or pool of *version* can be called so.  Raises: InvalidName."""
    check_value(text, what)
    if len(text) > DESCRIPTION_LIMIT:
        raise InvalidName(f"the description has {len(text)} characters, the limit is {DESCRIPTION_LIMIT}")
    if version < 3 and not text.isascii():
        raise InvalidName("below version 3 descriptions are ASCII text", hint="Upgrade the domain to V3 first.")
    return text


def check_combination(version: int, storage_type: str, domain_class: str, block_size: int) -> None:
    """Refuse combinations of version, type, class and block size that do not exist.

    Raises: UnsupportedVersion.
    """
    if version not in VERSIONS:
        raise UnsupportedVersion(f"there is no domain version {version}; V1 is 0", hint="Versions: 0, 2, 3, 4, 5.")
    if storage_type not in TYPES:
        raise UnsupportedVersion(f"there is no storage type '{printable(storage_type[:40])}'")
    if domain_class not in CLASSES:
        raise UnsupportedVersion(f"there is no domain class '{printable(domain_class[:40])}'")
    if storage_type in BLOCK_TYPES:
        if domain_class != DATA:
            raise UnsupportedVersion(f"{domain_class} domains exist on file storage only")
        if block_size != 512:
            raise UnsupportedVersion("block storage has blocks of 512 bytes")
    elif version == 2:
        raise UnsupportedVersion("version 2 is for block storage; use 0 or 3")
    if domain_class != DATA and version != 0:
        raise UnsupportedVersion(f"{domain_class} domains stay at version 0 (V1)")
    if block_size != 512 and (version < 5 or storage_type not in ("LOCALFS", "GLUSTERFS")):
        raise UnsupportedVersion(f"blocks of {block_size} bytes need version 5 on local or Gluster storage")


def new_domain_values(
    uuid: str,
    *,
    version: int,
    storage_type: str,
    domain_class: str = DATA,
    description: str = "",
    remote_path: str | None = None,
    block_size: int = 512,
    alignment: int = 1 << 20,
) -> dict[str, str]:
    """Return the keys of a new, unattached domain.

    *remote_path* is for file domains; block domains get ``VGUUID`` and
    ``PVn`` when their volume group is known.

    Raises: UnsupportedVersion, InvalidName.
    """
    check_id(uuid, "domain UUID")
    check_combination(version, storage_type, domain_class, block_size)
    values = {
        "CLASS": domain_class,
        "DESCRIPTION": check_description(description, version),
        "IOOPTIMEOUTSEC": "10",
        "LEASERETRIES": "3",
        "LEASETIMESEC": "60",
        "LOCKPOLICY": "",
        "LOCKRENEWALINTERVALSEC": "5",
        "POOL_UUID": "",
        "ROLE": REGULAR,
        "SDUUID": uuid,
        "TYPE": storage_type,
        "VERSION": str(version),
    }
    if remote_path is not None:
        values["REMOTE_PATH"] = check_value(remote_path, "REMOTE_PATH")
    if version >= 5:
        values.update(BLOCK_SIZE=str(block_size), ALIGNMENT=str(alignment))
    elif storage_type in BLOCK_TYPES and version >= 2:
        values.update(LOGBLKSIZE="512", PHYBLKSIZE="512")
    return values


def new_pool_values(master: str, name: str, master_version: int, domain_version: int) -> dict[str, str]:
    """Return the pool keys of a master domain at the pool's creation."""
    return {
        "MASTER_VERSION": str(master_version),
        "POOL_DESCRIPTION": check_description(name, domain_version, "POOL_DESCRIPTION"),
        "POOL_DOMAINS": encode_pool_domains({master: ACTIVE}),
        "POOL_SPM_ID": "-1",
        "POOL_SPM_LVER": "-1",
    }


def _v1_text(values: Mapping[str, str]) -> bytes:
    return "".join(f"{line}\n" for line in to_lines(values)).encode()


def v1_bytes_needed(values: Mapping[str, str]) -> int:
    """Return how many of the 2048 bytes the text of a version 0 block domain takes."""
    return len(_v1_text(values))


def pack_v1(values: Mapping[str, str]) -> bytes:
    """Return the 2048 bytes of a version 0 block domain.

    Raises: MetadataError when the text does not fit; nothing is cut.
    """
    data = _v1_text(values)
    if len(data) > V1_TEXT_SIZE:
        raise MetadataError(
            f"the metadata of a V1 block domain needs {len(data)} bytes, its limit is {V1_TEXT_SIZE}",
            hint="Upgrade the domain to V2, which has no such limit, or attach fewer domains.",
        )
    return data.ljust(V1_TEXT_SIZE, b"\0")


def unpack_v1(data: bytes, path: str | None = None) -> dict[str, str]:
    """Return the keys in the first 2048 bytes of the volume ``metadata``."""
    return from_lines(split_lines(data[:V1_TEXT_SIZE], path), path)


def mapping_for(present: Mapping[int, PvEntry], added: Iterable[tuple[str, str, int]]) -> dict[int, PvEntry]:
    """Return the mapping with *added* ``(guid, uuid, extents)`` after the *present* entries.

    Present entries stay as they are; a new one takes the lowest free number
    and begins after the highest extent that is mapped.  (Numbers with gaps
    made VDSM fail in the middle of an extension.)
    """
    entries = dict(present)
    for guid, uuid, count in added:
        number = next(n for n in range(len(entries) + 1) if n not in entries)
        offset = max((entry.mapoffset + entry.pecount for entry in entries.values()), default=0)
        entries[number] = PvEntry(guid, uuid, 0, count, offset)
    return dict(sorted(entries.items()))


def v1_slot(mapping: Iterable[PvEntry], guid: str, first_extent: int) -> int | None:
    """Return the slot of a version 0 volume that begins at *first_extent* of device *guid*.

    ``None`` when the device or extent is not mapped, or the slot is one of the
    four that hold the domain's text.
    """
    for entry in mapping:
        if entry.guid == guid and entry.pestart <= first_extent < entry.pestart + entry.pecount:
            slot = first_extent + entry.mapoffset
            return slot if slot >= 4 else None
    return None
