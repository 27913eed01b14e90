# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Domains made anew from golden data: small files as they are, big ones by their non-zero sectors."""

from __future__ import annotations

import json
import os
from pathlib import Path

from storage_pool.lv_storage import open_logical_volume
from storage_pool.lvm import Lvm
from storage_pool.xlease import INDEX_SIZE, format_index

__all__ = ["expand", "index_area", "rebuild_block_domain", "rebuild_file_domain"]


def expand(description: Path) -> tuple[int, list[tuple[int, bytes]]]:
    """Return size and pieces of the content that *description* tells of."""
    told = json.loads(description.read_text())
    pieces = [(offset, bytes.fromhex(text)) for offset, text in told.get("sectors", [])]
    slots = told.get("host_slots", {})
    pieces += [((int(host) - 1) * 512, bytes.fromhex(text)) for host, text in slots.items()]
    return told["size"], pieces


def index_area(start: Path) -> bytes:
    """Return a whole index of external leases whose first bytes are in *start*."""
    data = start.read_bytes()
    empty = format_index("00000000-0000-0000-0000-000000000001", 0)[-64:]
    return data + empty * ((INDEX_SIZE - len(data)) // 64)


def rebuild_file_domain(case: Path, mount: Path) -> Path:
    """Make the domain of golden folder *case* below *mount* and return its directory."""
    expected = json.loads((case / "expected.json").read_text())
    root = mount / str(expected["sd_uuid"])
    root.mkdir(parents=True)
    groups: dict[str, Path] = {}
    for entry in expected["tree"]:
        path = root / entry["path"]
        if entry["path"].endswith("/"):
            path.mkdir()
            path.chmod(int(entry["mode"], 8))
            continue
        first = groups.setdefault(entry.get("hardlink_group", entry["path"]), path)
        if first != path:
            os.link(first, path)
            continue
        small = case / "files" / entry["path"]
        sparse = case / "sparse" / f"{entry['path']}.json"
        with path.open("xb") as file:
            if small.exists():
                file.write(small.read_bytes())
            elif sparse.exists():
                for offset, data in expand(sparse)[1]:
                    file.seek(offset)
                    file.write(data)
            index = case / "files" / "dom_md" / "xleases.index"
            if entry["path"] == "dom_md/xleases" and index.exists():
                file.seek(expected["alignment"])
                file.write(index_area(index))
            file.truncate(entry["size"])
        path.chmod(int(entry["mode"], 8))
    return root


def rebuild_block_domain(case: Path, lvm: Lvm, devices: list[str]) -> str:
    """Make the domain of golden folder *case* on *devices*, as big as the original ones; return its UUID.

    The volume group comes out of LVM's own text, so that all UUIDs, tags and
    extents are the original ones; then the special volumes get their content.
    """
    expected = json.loads((case / "expected.json").read_text())
    text = str(case / "vg_metadata.txt")
    name = str(expected["sd_uuid"])
    for device, pv in zip(devices, expected["pvs"], strict=True):
        areas = ["--metadatasize", "128m", "--metadatacopies", "2"]
        ignored = ["--metadataignore", "n" if pv["metadata_pv"] else "y"]
        lvm.run("pvcreate", "-y", "-ff", "--uuid", pv["uuid"], "--restorefile", text, *areas, *ignored, device)
    lvm.run("vgcfgrestore", "--file", text, name)
    state = lvm.group(name)
    for description in sorted(case.glob("lv_*.json")):
        size, pieces = expand(description)
        volume = description.stem.removeprefix("lv_")
        if state.lv(volume).size != size:
            raise ValueError(f"{volume} has {state.lv(volume).size} bytes, its description {size}")
        if volume == "xleases":
            pieces.append((expected["alignment"], index_area(case / "xleases.index")))
        storage = open_logical_volume(lvm, state, volume, writable=True)
        try:
            for offset, data in pieces:
                storage.write(offset, [data])
        finally:
            storage.close()
    return name
