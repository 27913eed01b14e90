# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Random images, made alike for both programs, and what the real one says of them afterwards.

Invariant: images are built by the real programs alone and judged by the real
``qemu-img`` alone; what the host file system decides (dates, allocation) is
left out of the judgement.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from hypothesis import strategies as st

import qcowlib
from tests.qcowlib.cli.conftest import Pair, run_real, visible

__all__ = ["LONG", "NAMES", "SIZES", "Images", "assert_alike", "images", "recorded", "writes"]

LONG = int(os.environ.get("QCOWLIB_LONG", "1"))
#: ``top`` stands on ``mid``, that on ``base`` (qcow2 or raw); ``other`` stands alone.
NAMES = ("top", "mid", "base", "other")
SIZES = ("64k", "1000k", "1M", "1536k", "3M")


class Images(NamedTuple):
    """How the images of one example are made: lines of :meth:`Pair.setup`, and the format of ``base``."""

    lines: tuple[str, ...]
    base: str

    def build(self, root: Path) -> Pair:
        """Make them twice."""
        pair = Pair(root)
        for line in self.lines:
            # A compressed write over an allocated cluster is refused, in both alike.
            (pair.attempt if line.startswith("io ") else pair.setup)(line)
        return pair


#: With several, the likely one more often.
CLUSTERS = ("512", "4k", "64k", "64k", "64k", "2M")


def _layer(versions: Sequence[str], clusters: Sequence[str]) -> st.SearchStrategy[str]:
    """Options of an image that exist in one of *versions*."""

    def options(version: str, cluster: str, bits: int, more: str) -> str:
        if version == "0.10":
            return f"compat=0.10,cluster_size={cluster}"
        extended = ",extended_l2=on" if more == "extended" and cluster in ("64k", "2M") else ""
        lazy = ",lazy_refcounts=on" if more == "lazy" else ""
        return f"cluster_size={cluster},refcount_bits={bits}{extended}{lazy}"

    return st.builds(
        options,
        st.sampled_from(versions),
        st.sampled_from(clusters),
        st.sampled_from((16, 16, 16, 8, 64)),
        st.sampled_from(("", "", "extended", "lazy")),
    )


def writes(*, top: int = 900) -> st.SearchStrategy[str]:
    """One command of qemu-io within the first *top* KiB and 100 more."""
    kinds = ("write -P 3", "write -P 4", "write -P 0", "write -z", "write -z -u", "discard")
    return st.builds(
        "{} {}k {}k".format, st.sampled_from(kinds), st.integers(0, top), st.sampled_from((1, 4, 17, 64, 100))
    )


def _compressed(cluster: str) -> st.SearchStrategy[str]:
    """Write one cluster compressed: of several, qemu-io would stop at a place that depends on its threads."""
    size = _bytes(cluster)
    return st.builds(
        "write -c -P 5 {}k {}k".format, st.integers(0, 3).map(lambda at: at * size >> 10), st.just(size >> 10)
    )


def _fits(command: str, size: str) -> bool:
    """Whether qemu-io may run *command* on an image of *size*."""
    offset, length = (_bytes(word) for word in command.split()[-2:])
    return offset + length <= _bytes(size)


def _bytes(text: str) -> int:
    return int(text.rstrip("kM")) << {"k": 10, "M": 20}.get(text[-1], 0)


@st.composite
def images(
    draw: st.DrawFn, *, versions: Sequence[str] = ("1.1", "1.1", "1.1", "0.10"), clusters: Sequence[str] = CLUSTERS
) -> Images:
    """Give a chain of three and one image beside it, with random geometry and content."""
    base = draw(st.sampled_from(("qcow2", "raw")))
    lines: list[str] = []
    below = ""
    for name in ("base", "mid", "top", "other"):
        size, command = draw(st.sampled_from(SIZES)), writes()
        raw = name == "base" and base == "raw"
        if raw:
            lines.append(f"create -q base {size}")
        else:
            over = f"-b {below} -F {base if below == 'base' else 'qcow2'}" if below and name != "other" else ""
            options = draw(_layer(versions, clusters))
            lines.append(f"create -q -f qcow2 -o {options} {over} {name} {size}")
            cluster = options.partition("cluster_size=")[2].partition(",")[0]
            if cluster != "512":
                command = st.one_of(command, command, command, _compressed(cluster))
        chosen = [f'"{each}"' for each in draw(st.lists(command, max_size=5)) if _fits(each, size)]
        if chosen:
            lines.append(f"io{' -f raw' if raw else ''} {name} {' '.join(chosen)}")
        below = name
    return Images(tuple(lines), base)


def _allocation(folder: Path, name: str) -> list[list[object]]:
    """Return what lies where by depth and kind; holes of the host file inside data are the file system's."""
    rows: list[list[object]] = []
    for entry in json.loads(run_real(["map", "--output=json", name], folder).out):
        zero = entry["zero"] and not entry["data"]
        row = [entry["start"], entry["length"], entry["depth"], entry["present"], zero, entry["data"]]
        if rows and rows[-1][2:] == row[2:]:
            rows[-1][1] += row[1]
        else:
            rows.append(row)
    return rows


def tell(folder: Path, name: str) -> tuple[object, int]:
    """Return what the real tool says of an image, without what the host file system decides."""
    text = visible(run_real(["info", "--output=json", "-U", name], folder)).out
    told = json.loads(text.replace('"date"', '"date": 0'))
    told.pop("actual-size")
    return told, run_real(["check", "-q", name], folder).status


def recorded(path: Path) -> dict[str, set[int]]:
    """Return the granules that each bitmap has recorded."""
    with qcowlib.open(path, backing=False) as image:
        return {
            bitmap.name: {
                at
                for start, length in image.bitmap_extents(bitmap.name)
                for at in range(start >> 16, (start + length + 65535) >> 16)
            }
            for bitmap in image.bitmaps()
        }


def assert_alike(pair: Pair, *names: str, allocation: bool = True) -> None:
    """The real tool must say the same of the images *names* in both folders, and find the same content."""
    assert sorted(os.listdir(pair.ours)) == sorted(os.listdir(pair.real))  # noqa: PTH208
    for name in names:
        assert tell(pair.ours, name) == tell(pair.real, name), name
        same = run_real(["compare", str(pair.real / name), str(pair.ours / name)], pair.real.parent)
        assert same.status == 0, (name, same)
        if allocation:
            assert _allocation(pair.ours, name) == _allocation(pair.real, name), name
