# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Drawings: well-formed whatever an image is called, true to the cells, and seen in a real browser."""

from __future__ import annotations

import re
import struct
import subprocess
import zlib
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

import qcowlib
from qcowlib.picture.heat import heat
from qcowlib.picture.page import page
from qcowlib.picture.panels import KINDS, OWNERS, Panel, Picture, depths
from qcowlib.picture.shade import Shade, panel_shades
from qcowlib.picture.svg import svg

CELL = 512
SVG = "{http://www.w3.org/2000/svg}"


def picture_of(cells: list[tuple[int, ...]], name: str = "disk") -> Picture:
    total = len(cells) * CELL
    return Picture(name, "qcow2", total, (("virtual size", name),), (Panel("Disk", name, total, CELL, KINDS, cells),))


names = st.text(st.characters(codec=None), max_size=20)
grids = st.lists(st.tuples(*[st.integers(0, 512)] * len(KINDS)).filter(any), max_size=300)


@given(grids, names)
def test_drawings_are_well_formed_whatever_the_name(cells: list[tuple[int, ...]], name: str) -> None:
    picture = picture_of(cells, name)
    root = ElementTree.fromstring(svg(picture))
    assert root.tag == f"{SVG}svg"
    text = page(picture)
    body = text[text.index("<svg") : text.index("</svg>") + 6]
    ElementTree.fromstring(body)
    assert "<script" not in text
    text.encode("utf-8")


@given(grids)
def test_areas_cover_every_cell_once(cells: list[tuple[int, ...]]) -> None:
    root = ElementTree.fromstring(svg(picture_of(cells)))
    areas = [rect for rect in root.iter(f"{SVG}rect") if rect.find(f"{SVG}title") is not None]
    told = [re.search(r"\((0x[0-9a-f]+), (\d+) bytes\)", rect.findtext(f"{SVG}title") or "") for rect in areas]
    end = 0
    for match in told:
        assert match is not None and int(match[1], 16) == end
        end += int(match[2])
    assert end == len(cells) * CELL


def test_a_cell_that_holds_anything_is_not_drawn_as_empty() -> None:
    panel = Panel("", "", 3000, 1000, KINDS, [(999, 0, 1, 0, 0, 0), (400, 600, 0, 0, 0, 0), (0, 0, 300, 700, 0, 0)])
    assert panel_shades(panel) == [Shade(2, 1), Shade(1, 4), Shade(3, 4)]


def test_a_leak_is_shown_beside_more_of_something_else() -> None:
    panel = Panel("", "", 100, 100, OWNERS, [(0, 0, 0, 0, 99, 0, 0, 0, 1)])
    assert panel_shades(panel) == [Shade(8, 4)]


def test_deep_chains_share_their_last_colour() -> None:
    assert [category.label for category in depths(["a", "b"])] == ["nothing stored", "a", "b"]
    labels = [category.label for category in depths([f"l{n}" for n in range(20)])]
    assert len(labels) == 9 and labels[-1] == "l7 and below"


@given(grids.filter(bool), st.integers(1, 200))
def test_colours_say_no_more_than_letters(cells: list[tuple[int, ...]], width: int) -> None:
    picture = picture_of(cells)
    plain = list(heat(picture, width, colour=False))
    coloured = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in heat(picture, width, colour=True)]
    assert not any("\x1b" in line for line in plain)
    assert [len(line) for line in plain[:-2]] == [len(line) for line in coloured[:-2]]


def pixels(path: Path) -> tuple[int, list[bytes]]:
    """Return bytes a pixel and the rows of a PNG of 8 bits a channel."""
    data = path.read_bytes()
    width, _, depth, kind = struct.unpack_from(">IIBB", data, 16)
    assert depth == 8
    channels = {2: 3, 6: 4}[kind]
    at, packed = 8, b""
    while at < len(data):
        (length,) = struct.unpack_from(">I", data, at)
        if data[at + 4 : at + 8] == b"IDAT":
            packed += data[at + 8 : at + 8 + length]
        at += 12 + length
    flat, stride, rows = zlib.decompress(packed), width * channels, []
    last = bytearray(stride)
    for start in range(0, len(flat), stride + 1):
        row = bytearray(flat[start + 1 : start + 1 + stride])
        for x in range(stride):
            left, above = (row[x - channels] if x >= channels else 0), last[x]
            corner = last[x - channels] if x >= channels else 0
            guess = left + above - corner
            nearest = min((left, above, corner), key=lambda value: abs(guess - value))
            row[x] = (row[x] + (0, left, above, (left + above) // 2, nearest)[flat[start]]) & 255
        rows.append(bytes(row))
        last = row
    return channels, rows


@pytest.mark.real("chromium")
def test_a_browser_shows_the_page(tmp_path: Path) -> None:
    image = tmp_path / "disk.qcow2"
    qcowlib.create(image, 64 << 20)
    with qcowlib.open(image, "r+") as disk:
        disk.pwrite(b"x" * (32 << 20), 0)
    document, shot = tmp_path / "disk.html", tmp_path / "shot.png"
    document.write_text(page(qcowlib.survey(image)))
    subprocess.run(
        [
            "chromium",
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            f"--user-data-dir={tmp_path}/profile",
            "--window-size=1100,500",
            f"--screenshot={shot}",
            document.as_uri(),
        ],
        check=True,
        capture_output=True,
        timeout=120,
    )
    channels, rows = pixels(shot)
    blue = bytes.fromhex(KINDS[2].colour[1:])
    counts = [sum(row[at : at + 3] == blue for at in range(0, len(row), channels)) for row in rows]
    # The upper half of the grid is data from edge to edge, the lower half is not.
    full = [number for number, count in enumerate(counts) if count > 900]
    assert len(full) > 150 and full == list(range(full[0], full[-1] + 1))
    assert max(counts[full[-1] + 1 : full[-1] + 100]) < 100
