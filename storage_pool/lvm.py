# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""LVM by its command: typed rows out of one report, and the changes a domain makes.

Invariant: every argument is checked or made here, nothing but a warning is
parsed out of text meant for people, and one question about a volume group is one command
whatever its number of volumes.  Reports come on a descriptor of their own,
for messages may stand in standard output.  Without device mapper nothing is
activated, and what would need it (``pvmove``) is refused.

Not here: any cache.  Who changes a group reads it again.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final, NamedTuple

from .errors import InvalidName, LvmError, NoSpace, NotFound, printable
from .ids import is_id
from .layout import SPECIAL_VOLUMES, twin_of
from .process import Completed, ProcessRunner

__all__ = ["Lv", "LvSegment", "Lvm", "LvmHost", "Placement", "Pv", "Vg", "VgState", "has_device_mapper"]

EXTENT_MIB: Final = 128
METADATA_MIB: Final = 128
_TAG: Final = re.compile(r"[A-Za-z0-9_+.\-/=!:#&]{1,1024}")
_DEVICE: Final = re.compile(r"/dev/[A-Za-z0-9_+.\-/:@=#]{1,200}")
_VG_COLUMNS: Final = (
    "vg_name,vg_uuid,vg_attr,vg_size,vg_free,vg_extent_size,vg_extent_count,vg_free_count,vg_tags,"
    "vg_mda_size,vg_mda_free,lv_count,pv_count,vg_seqno,vg_missing_pv_count"
)
_PV_COLUMNS: Final = (
    "pv_name,pv_uuid,pv_size,pe_start,pv_pe_count,pv_pe_alloc_count,pv_mda_count,pv_mda_used_count,dev_size,pv_missing"
)
_LV_COLUMNS: Final = "lv_name,lv_uuid,lv_attr,lv_size,lv_tags,lv_health_status,lv_active_locally,lv_device_open"
_SEG_COLUMNS: Final = "lv_name,segtype,seg_start,seg_size,seg_pe_ranges"
_TWIN: Final = re.compile(r"Not using device (/dev/\S{1,200}) for PV (\S{38})\.")


#: What LVM says when a group has no extents left, or no room for its own text.
_NO_SPACE: Final = (
    "nsufficient free space",
    "nsufficient suitable allocatable extents",
    "too large for circular buffer",
)
#: What else it says that people can do something about.
_HINTS: Final = (
    ("Can't open", "Something else uses the device, as a mount, a multipath map or another volume group."),
    ("is already in volume group", "Take the device out of its volume group first, or use another one."),
    ("by filter", "LVM sees only the devices that it was given; name this one too."),
    ("No device found", "LVM sees only the devices that it was given; name this one too."),
    ("Couldn't find device with uuid", "A device of the volume group is missing; look at the storage and its paths."),
    ("Multiple VGs found", "Let LVM see the devices of one of these groups only."),
    ("in use", "Somebody on this host has the volume open."),
    ("signature", "The device holds something; say so explicitly if it may be lost."),
)


class Vg(NamedTuple):
    """A volume group; sizes in bytes."""

    name: str
    uuid: str
    attr: str
    size: int
    free: int
    extent_size: int
    extent_count: int
    free_count: int
    tags: frozenset[str]
    mda_size: int
    mda_free: int
    lv_count: int
    pv_count: int
    seqno: int
    missing_pv_count: int

    @property
    def partial(self) -> bool:
        """Whether a physical volume is missing."""
        return self.missing_pv_count > 0 or (len(self.attr) > 3 and self.attr[3] == "p")


class Pv(NamedTuple):
    """A physical volume; sizes in bytes, ``pe_*`` counts in extents but ``pe_start`` in bytes."""

    name: str
    uuid: str
    size: int
    pe_start: int
    pe_count: int
    pe_alloc_count: int
    mda_count: int
    mda_used_count: int
    dev_size: int
    missing: bool

    @property
    def guid(self) -> str:
        """The last part of the device's path: for multipath devices their identity."""
        return self.name.rpartition("/")[2]


class LvSegment(NamedTuple):
    """*size* bytes of a volume from *start* on lie on *device* from *first_extent* on."""

    start: int
    size: int
    segtype: str
    device: str
    first_extent: int


class Lv(NamedTuple):
    """A logical volume; size in bytes."""

    name: str
    uuid: str
    attr: str
    size: int
    tags: frozenset[str]
    health: str
    segments: tuple[LvSegment, ...]

    @property
    def active(self) -> bool:
        """Whether this host has it active."""
        return len(self.attr) > 4 and self.attr[4] == "a"

    @property
    def opened(self) -> bool:
        """Whether somebody on this host has it open."""
        return len(self.attr) > 5 and self.attr[5] == "o"

    @property
    def writable(self) -> bool:
        """Its permission in the group's metadata."""
        return len(self.attr) > 1 and self.attr[1] == "w"

    @property
    def devices(self) -> str:
        """First device and extent as LVM prints them: ``/dev/x(5)``."""
        if not self.segments:
            return ""
        return f"{self.segments[0].device}({self.segments[0].first_extent})"


def has_device_mapper() -> bool:
    """Whether this host can activate volumes: the control node may be there in a kernel without device mapper."""
    try:
        os.close(os.open("/dev/mapper/control", os.O_RDWR | os.O_CLOEXEC))
    except OSError:
        return False
    return True


class Placement(NamedTuple):
    """*size* bytes of a volume from *start* on are at byte *offset* of *device*."""

    start: int
    size: int
    device: str
    offset: int


class VgState(NamedTuple):
    """A volume group with all its parts, of one report; *twins* are devices that say they are one of *pvs* too."""

    vg: Vg
    pvs: Mapping[str, Pv]
    lvs: Mapping[str, Lv]
    twins: tuple[str, ...] = ()

    def lv(self, name: str) -> Lv:
        """Return a volume.  Raises: NotFound."""
        try:
            return self.lvs[name]
        except KeyError:
            raise NotFound(f"there is no logical volume {printable(name[:64])}", path=self.vg.name) from None

    def placements(self, name: str) -> list[Placement]:
        """Return where the bytes of volume *name* are, in order.

        Raises: NotFound, LvmError for anything but linear segments on present devices.
        """
        lv = self.lv(name)
        if any(segment.device.startswith("pvmove") for segment in lv.segments):
            raise LvmError(f"logical volume {name} is being moved to another device", path=self.vg.name)
        # The segments of a snapshot look linear; what they hold is not its bytes.
        if not lv.attr.startswith("-"):
            raise LvmError(f"logical volume {name} is not linear", path=self.vg.name)
        places = []
        end = 0
        for segment in lv.segments:
            pv = self.pvs.get(segment.device)
            if segment.segtype not in ("linear", "striped") or segment.start != end:
                raise LvmError(f"logical volume {name} is not linear", path=self.vg.name)
            if pv is None or pv.missing:
                raise LvmError(f"a physical volume of {name} is missing", path=self.vg.name)
            offset = pv.pe_start + segment.first_extent * self.vg.extent_size
            places.append(Placement(segment.start, segment.size, pv.name, offset))
            end += segment.size
        if end != lv.size:
            raise LvmError(f"the segments of {name} cover {end} of its {lv.size} bytes", path=self.vg.name)
        return places

    @property
    def metadata_pv(self) -> Pv | None:
        """The physical volume whose metadata areas are in use."""
        return next((pv for pv in self.pvs.values() if pv.mda_used_count > 0), None)


class LvmHost(NamedTuple):
    """How LVM runs on this host.

    *devices* gives the devices LVM may see (``None``: as the host is
    configured).  *activation* says whether there is a device mapper.
    *system_dir* and *locking_dir* separate hosts that live on one machine.
    """

    devices: Callable[[], Sequence[str]] | None = None
    activation: bool = True
    system_dir: str | None = None
    locking_dir: str | None = None

    def config(self, devices: Sequence[str] | None) -> str:
        """Return LVM's configuration for one command.  Raises: InvalidName."""
        device_filter = ""
        if devices is not None:
            rules = [f'"a|^{_regex(device)}$|"' for device in devices]
            device_filter = " use_devicesfile=0 filter=[" + ", ".join([*rules, '"r|.*|"']) + "]"
        locking = ""
        if self.locking_dir is not None:
            locking = f' locking_dir="{_plain_path(self.locking_dir)}"'
        own = "" if self.activation else " activation { udev_sync=0 udev_rules=0 monitoring=0 }"
        return (
            'devices { preferred_names=["^/dev/mapper/"] ignore_suspended_devices=1 write_cache_state=0'
            ' disable_after_error_count=3 hints="none" obtain_device_list_from_udev=0'
            f' external_device_info_source="none"{device_filter} }}'
            " global { prioritise_write_locks=1 wait_for_locks=1 use_lvmpolld=0 use_aio=0 event_activation=0"
            f" notify_dbus=0{locking} }} backup {{ backup=0 archive=0 }}{own}"
        )


def _regex(device: str) -> str:
    if not _DEVICE.fullmatch(device) or "/../" in device or device.endswith("/.."):
        raise InvalidName(f"not the path of a device: '{printable(device[:80])}'")
    # Backslashes are doubled, as the configuration's strings want it.
    return re.sub(r"[.+]", r"\\\\\g<0>", device)


def _plain_path(path: str) -> str:
    if not re.fullmatch(r"/[A-Za-z0-9_.\-/]+", path):
        raise InvalidName(f"not a plain path: '{printable(path[:80])}'")
    return path


def _names(tags: str) -> frozenset[str]:
    return frozenset(tags.split(",")) if tags else frozenset()


def _check_tags(tags: Iterable[str]) -> list[str]:
    checked = list(tags)
    for tag in checked:
        if not _TAG.fullmatch(tag) or tag.startswith("-"):
            raise InvalidName(f"not an LVM tag: '{printable(tag[:80])}'")
    return checked


def _check_lv(name: str) -> str:
    if name not in SPECIAL_VOLUMES and not is_id(name) and twin_of(name) is None:
        raise InvalidName(f"not the name of a volume: '{printable(name[:64])}'")
    return name


def _check_vg(name: str) -> str:
    if not is_id(name):
        raise InvalidName(f"not the name of a domain's volume group: '{printable(name[:64])}'")
    return name


class Lvm:
    """Runs LVM commands on one host and counts them (``commands``)."""

    __slots__ = ("_host", "_runner", "commands")

    def __init__(self, runner: ProcessRunner, host: LvmHost) -> None:
        self._runner = runner
        self._host = host
        self.commands = 0

    @property
    def activation(self) -> bool:
        """Whether volumes can be activated here."""
        return self._host.activation

    @property
    def runner(self) -> ProcessRunner:
        """What runs the commands."""
        return self._runner

    def _once(self, command: str, arguments: Sequence[str], devices: Sequence[str] | None, report: bool) -> Completed:
        argv = ["lvm", command, "--config", self._host.config(devices)]
        if not self._host.activation:
            argv += ["--driverloaded", "n"]
        env = {"LVM_SUPPRESS_FD_WARNINGS": "1"}
        if self._host.system_dir is not None:
            env["LVM_SYSTEM_DIR"] = self._host.system_dir
        self.commands += 1
        return self._runner.run(
            [*argv, *arguments], env=env, report_variable="LVM_REPORT_FD" if report else None, timeout_s=120.0
        )

    def _devices(self) -> Sequence[str] | None:
        return None if self._host.devices is None else list(self._host.devices())

    def run(self, command: str, *arguments: str, report: bool = False, partial: bool = False) -> Completed:
        """Run one LVM command whose arguments are safe; with *partial* a report need not be of everything.

        Raises: NoSpace when the group is full, LvmError for any other
        failure, after a second try where the list of devices has changed
        meanwhile.
        """
        devices = self._devices()
        done = self._once(command, arguments, devices, report)
        if done.returncode and devices is not None and (wider := self._devices()) != devices:
            # Devices came or went since the list was made.
            done = self._once(command, arguments, wider, report)
        if done.returncode and not (partial and done.report):
            text = _text(done.stderr)
            if any(words in text for words in _NO_SPACE):
                raise NoSpace(f"lvm {command}: {_complaint(done)}")
            hint = next((hint for words, hint in _HINTS if words in text), None)
            raise LvmError(f"lvm {command}: {_complaint(done)}", returncode=done.returncode, stderr=text, hint=hint)
        return done

    # Reports

    def _report(self, *names: str) -> list[VgState]:
        # Of all groups those that can be read: a foreign one may be damaged, or vanish meanwhile.
        done = self.run("fullreport", *_REPORT_ARGUMENTS, *names, report=True, partial=not names)
        try:
            document = json.loads(done.report or b'{"report": []}')
            states = [_state(part) for part in document["report"] if part.get("vg")]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise LvmError(f"lvm fullreport: unreadable answer ({printable(str(error))})") from error
        # No column of the report has them.
        twins = [(match[1], match[2]) for match in _TWIN.finditer(_text(done.stderr))]
        return [_with_twins(state, twins) for state in states] if twins else states

    def groups(self) -> list[VgState]:
        """Return all volume groups that can be read and have a UUID for a name; one command."""
        return [state for state in self._report() if is_id(state.vg.name)]

    def group(self, name: str) -> VgState:
        """Return one volume group with its parts; one command.  Raises: NotFound, LvmError."""
        _check_vg(name)
        try:
            states = self._report(name)
        except LvmError as error:
            if "not found" in error.stderr:
                raise NotFound(f"there is no volume group {name}") from error
            raise
        if not states:
            raise NotFound(f"there is no volume group {name}", hint="Its metadata device may be missing.")
        return states[0]

    # Volume groups

    def create_group(self, name: str, devices: Sequence[str], tags: Iterable[str], *, force: bool = False) -> None:
        """Make a volume group; the first device keeps the metadata, the others have unused areas for it.

        *force* takes devices that hold something else.
        """
        checked = _check_tags(tags)
        _check_vg(name)
        self._create_pvs(devices, force=force)
        self.run("pvchange", "--metadataignore", "n", devices[0])
        tagging = [argument for tag in checked for argument in ("--addtag", tag)]
        size = f"{EXTENT_MIB}m"
        self.run("vgcreate", "--setautoactivation", "n", "--physicalextentsize", size, *tagging, name, *devices)

    def _create_pvs(self, devices: Sequence[str], *, force: bool) -> None:
        if not devices:
            raise InvalidName("a volume group needs a device")
        for device in devices:
            _regex(device)
        areas = ["--metadatasize", f"{METADATA_MIB}m", "--metadatacopies", "2", "--metadataignore", "y"]
        self.run("pvcreate", *(["-y", "-ff"] if force else []), *areas, *devices)

    def extend_group(self, name: str, devices: Sequence[str], *, force: bool = False) -> None:
        """Add devices to a volume group."""
        _check_vg(name)
        self._create_pvs(devices, force=force)
        self.run("vgextend", name, *devices)

    def reduce_group(self, name: str, device: str) -> None:
        """Take an unused device out of a volume group."""
        _regex(device)
        self.run("vgreduce", _check_vg(name), device)

    def resize_pv(self, device: str) -> None:
        """Let LVM see that a device has grown."""
        _regex(device)
        self.run("pvresize", device)

    def remove_group(self, name: str) -> None:
        """Remove a volume group with all its volumes."""
        self.run("vgremove", "-f", _check_vg(name))

    def change_group_tags(self, name: str, *, add: Iterable[str] = (), remove: Iterable[str] = ()) -> None:
        """Change tags of a volume group in one commit."""
        self.run("vgchange", *_tag_arguments(add, remove), _check_vg(name))

    # Volumes

    def create_volume(self, vg: str, name: str, mib: int, tags: Iterable[str], device: str | None = None) -> None:
        """Make a volume of *mib* MiB, rounded up to extents, on *device* where given."""
        if mib <= 0:
            raise InvalidName(f"a volume cannot have {mib} MiB")
        tagging = [argument for tag in _check_tags(tags) for argument in ("--addtag", tag)]
        where = []
        if device is not None:
            _regex(device)
            where = [device]
        inactive = [] if self._host.activation else ["-an", "-Zn"]
        options = ["--autobackup", "n", "--contiguous", "n", "--size", f"{mib}m", "--wipesignatures", "n", *inactive]
        self.run("lvcreate", *options, *tagging, "--name", _check_lv(name), _check_vg(vg), *where)

    def extend_volume(self, vg: str, name: str, mib: int) -> None:
        """Grow a volume to at least *mib* MiB; nothing happens when it is as big.

        Invariant: S3, S4.  The device node of an active volume keeps its size
        (``--driverloaded n``), as a machine that uses it must see none.
        """
        target = f"{_check_vg(vg)}/{_check_lv(name)}"
        no_driver = ["--driverloaded", "n"] if self._host.activation else []
        try:
            self.run("lvextend", "--autobackup", "n", *no_driver, "--size", f"{mib}m", target)
        except LvmError:
            lv = self.group(vg).lv(name)
            if lv.size < mib << 20:
                raise

    def reduce_volume(self, vg: str, name: str, mib: int) -> None:
        """Shrink a volume; what lies beyond is lost."""
        target = f"{_check_vg(vg)}/{_check_lv(name)}"
        self.run("lvreduce", "--autobackup", "n", "--force", "--size", f"{mib}m", target)

    def remove_volumes(self, vg: str, names: Sequence[str]) -> None:
        """Remove volumes in one command."""
        if names:
            targets = [f"{_check_vg(vg)}/{_check_lv(name)}" for name in names]
            self.run("lvremove", "-f", "--autobackup", "n", *targets)

    def rename_volume(self, vg: str, old: str, new: str) -> None:
        """Give a volume another name."""
        self.run("lvrename", "--autobackup", "n", _check_vg(vg), _check_lv(old), _check_lv(new))

    def change_tags(
        self, vg: str, names: Sequence[str], *, add: Iterable[str] = (), remove: Iterable[str] = ()
    ) -> None:
        """Change tags of volumes in one command, in one commit per volume."""
        if names:
            targets = [f"{_check_vg(vg)}/{_check_lv(name)}" for name in names]
            self.run("lvchange", "--autobackup", "n", *_tag_arguments(add, remove), *targets)

    def set_writable(self, vg: str, names: Sequence[str], writable: bool) -> None:
        """Set the permission of volumes, which below V3 guards what must not change."""
        if names:
            targets = [f"{_check_vg(vg)}/{_check_lv(name)}" for name in names]
            self.run("lvchange", "--autobackup", "n", "--permission", "rw" if writable else "r", *targets)

    def activate(self, vg: str, names: Sequence[str], *, active: bool = True) -> None:
        """Activate or deactivate volumes; nothing where there is no device mapper."""
        if names and self._host.activation:
            targets = [f"{_check_vg(vg)}/{_check_lv(name)}" for name in names]
            self.run("lvchange", "--autobackup", "n", "--available", "y" if active else "n", *targets)

    def refresh(self, vg: str, name: str) -> None:
        """Let an active volume's device see its new size; nothing where there is no device mapper."""
        if self._host.activation:
            self.run("lvchange", "--refresh", f"{_check_vg(vg)}/{_check_lv(name)}")


def _tag_arguments(add: Iterable[str], remove: Iterable[str]) -> list[str]:
    arguments = []
    for option, tags in (("--deltag", remove), ("--addtag", add)):
        for tag in sorted(_check_tags(tags)):
            arguments += [option, tag]
    return arguments


_REPORT_ARGUMENTS: Final = (
    *("--reportformat", "json", "--units", "b", "--nosuffix"),
    *("--configreport", "vg", "-o", _VG_COLUMNS),
    *("--configreport", "pv", "-o", _PV_COLUMNS),
    *("--configreport", "lv", "-o", _LV_COLUMNS),
    *("--configreport", "seg", "-o", _SEG_COLUMNS),
    *("--configreport", "pvseg", "-S", "pvseg_start=-1"),
)


def _with_twins(state: VgState, twins: Sequence[tuple[str, str]]) -> VgState:
    own = {pv.uuid for pv in state.pvs.values()}
    return state._replace(twins=tuple(sorted(device for device, uuid in twins if uuid in own)))


def _text(data: bytes) -> str:
    return data.decode("utf-8", "backslashreplace")


def _complaint(done: Completed) -> str:
    """Return what LVM said last that is no warning."""
    lines = [line.strip() for line in _text(done.stderr).splitlines()]
    lines = [line for line in lines if line and not line.startswith(("WARNING:", "Use --select"))]
    return printable(lines[-1]) if lines else f"exit status {done.returncode}"


def _true_attr(row: Mapping[str, str]) -> str:
    """Return ``lv_attr`` with its bits of state known.

    LVM prints ``X`` for both where the device of an active volume has another
    size than its group says, as after an extension that left the device alone.
    """
    attr = row["lv_attr"]
    if attr[4:5] != "X" or row.get("lv_active_locally") != "active locally":
        return attr
    return f"{attr[:4]}a{'o' if row.get('lv_device_open') == 'open' else '-'}{attr[6:]}"


def _state(part: Mapping[str, list[dict[str, str]]]) -> VgState:
    row = part["vg"][0]
    vg = Vg(
        row["vg_name"],
        row["vg_uuid"],
        row["vg_attr"],
        int(row["vg_size"]),
        int(row["vg_free"]),
        int(row["vg_extent_size"]),
        int(row["vg_extent_count"]),
        int(row["vg_free_count"]),
        _names(row["vg_tags"]),
        int(row["vg_mda_size"]),
        int(row["vg_mda_free"]),
        int(row["lv_count"]),
        int(row["pv_count"]),
        int(row["vg_seqno"]),
        int(row["vg_missing_pv_count"]),
    )
    segments: dict[str, list[LvSegment]] = {}
    for row in part.get("seg", []):
        device, _, extents = row["seg_pe_ranges"].rpartition(":")
        first = extents.partition("-")[0]
        kind = row["segtype"] if " " not in row["seg_pe_ranges"] else "several"
        segment = LvSegment(int(row["seg_start"]), int(row["seg_size"]), kind, device, int(first or 0))
        segments.setdefault(row["lv_name"], []).append(segment)
    lvs = {
        row["lv_name"]: Lv(
            row["lv_name"],
            row["lv_uuid"],
            _true_attr(row),
            int(row["lv_size"]),
            _names(row["lv_tags"]),
            row["lv_health_status"],
            tuple(sorted(segments.get(row["lv_name"], ()))),
        )
        for row in part.get("lv", [])
    }
    pvs = {
        row["pv_name"]: Pv(
            row["pv_name"],
            row["pv_uuid"],
            int(row["pv_size"]),
            int(row["pe_start"]),
            int(row["pv_pe_count"]),
            int(row["pv_pe_alloc_count"]),
            int(row["pv_mda_count"]),
            int(row["pv_mda_used_count"]),
            int(row["dev_size"]),
            bool(row["pv_missing"]),
        )
        for row in part.get("pv", [])
    }
    return VgState(vg, pvs, lvs)
