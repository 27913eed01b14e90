# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Measure against qemu-img measure: the same numbers."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qcowlib
from qcowlib.jobs.measure import Measurement, measure
from qcowlib.native import RunList, data_clusters
from tests.qcowlib.jobs.samples import make_source, qemu_img

FEATURES: list[dict[str, Any]] = [
    {},
    {"extended_l2": True},
    {"compat": "0.10"},
    {"refcount_bits": 1},
    {"refcount_bits": 64},
    {"preallocation": "full"},
    {"preallocation": "metadata"},
]


def words_of(options: dict[str, Any]) -> list[str]:
    texts = [f"{key}={'on' if value is True else value}" for key, value in options.items()]
    return ["-o", ",".join(texts)] if texts else []


def qemu_measure(*words: object) -> Measurement:
    answer = json.loads(qemu_img("measure", "--output=json", *words).stdout)
    return Measurement(answer["required"], answer["fully-allocated"], answer.get("bitmaps"))


sizes = st.one_of(st.integers(0, 1 << 22), st.integers(0, 1 << 45), st.integers(0, 40).map(lambda bits: 1 << bits))


@pytest.mark.real("qemu-img")
@given(size=sizes, bits=st.integers(9, 21), options=st.sampled_from(FEATURES))
@settings(max_examples=60)
def test_size_is_measured_as_by_qemu_img(size: int, bits: int, options: dict[str, Any]) -> None:
    options = {**options, "cluster_size": 1 << bits}
    answer = qemu_img("measure", "--output=json", "-O", "qcow2", *words_of(options), "--size", size, check=False)
    if answer.returncode:
        with pytest.raises(qcowlib.UsageError) as caught:
            measure(size, **options)
        assert str(caught.value) in answer.stderr
        return
    theirs = json.loads(answer.stdout)
    assert measure(size, **options) == Measurement(theirs["required"], theirs["fully-allocated"])


@pytest.mark.real("qemu-img")
@pytest.mark.parametrize("kind", ["raw", "qcow2", "chain"])
@pytest.mark.parametrize("bits", [9, 12, 16, 21])
def test_image_is_measured_as_by_qemu_img(tmp_path: Path, kind: str, bits: int) -> None:
    source = make_source(random.Random(f"{kind} {bits}"), tmp_path, kind, 5 * (1 << 20) + 1536)
    format = "raw" if kind == "raw" else "qcow2"
    for options in FEATURES[0], FEATURES[1] if bits > 13 else FEATURES[2], FEATURES[5]:
        options = {**options, "cluster_size": 1 << bits}
        theirs = qemu_measure("-O", "qcow2", "-f", format, *words_of(options), source)
        assert measure(source, source_format=format, **options) == theirs
    assert measure(source, source_format=format, format="raw") == qemu_measure("-O", "raw", "-f", format, source)


@pytest.mark.real("qemu-img")
def test_backing_file_makes_every_cluster_count(tmp_path: Path) -> None:
    qemu_img("create", "-q", "-f", "raw", tmp_path / "base", 4 << 20)
    qemu_img("create", "-q", "-f", "qcow2", tmp_path / "src", 4 << 20)
    theirs = qemu_measure("-O", "qcow2", "-o", f"backing_file={tmp_path / 'base'},backing_fmt=raw", tmp_path / "src")
    assert measure(tmp_path / "src", backing=str(tmp_path / "base")) == theirs


@pytest.mark.real("qemu-img")
def test_bitmaps_are_measured_as_by_qemu_img(tmp_path: Path) -> None:
    source = tmp_path / "src"
    qemu_img("create", "-q", "-f", "qcow2", source, "10G")
    for number, granularity in enumerate((4096, 65536, 1 << 20)):
        qemu_img("bitmap", "--add", "-g", granularity, source, f"bitmap{'x' * number}")
    for bits in 9, 16, 21:
        options = {"cluster_size": 1 << bits}
        assert measure(source, **options) == qemu_measure("-O", "qcow2", *words_of(options), source)


def test_runs_that_share_a_cluster_count_it_once() -> None:
    runs = RunList()
    runs.add(2, 0, 512, 0)
    runs.add(0, 512, 512)
    runs.add(2, 1024, 7168, 4096)
    runs.add(1, 8192, 8192)
    assert data_clusters(runs, 4096, 0) == (8192, 8192)
    assert data_clusters(runs, 65536, 0) == (65536, 65536)
    assert data_clusters(runs, 4096, 4096) == (4096, 8192)
    with pytest.raises(ValueError, match="empty"):
        data_clusters(runs, 0, 0)
