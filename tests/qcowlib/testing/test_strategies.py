# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""What the strategies draw is what they promise, and hostile images meet bounded readers."""

from __future__ import annotations

import subprocess
import tempfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcowlib.testing.reference import ReferenceError, reference_check, reference_read
from qcowlib.testing.strategies import Geometry, WorkOp, geometries, hostile_images, tiny_specs, workloads
from qcowlib.testing.tiny import TinySpec, build


@given(geometries().flatmap(lambda g: st.tuples(st.just(g), workloads(g.size, 1 << g.cluster_bits))))
def test_workloads_stay_inside_the_image(drawn: tuple[Geometry, list[WorkOp]]) -> None:
    geometry, ops = drawn
    assert geometry.size > 0
    assert geometry.size % 512 == 0
    for op in ops:
        if op.kind != "flush":
            assert 0 <= op.offset < op.offset + op.length <= geometry.size
            assert op.offset % 512 == op.length % 512 == 0


@given(workloads(1 << 20, 4096, kinds=("snapshot", "revert", "delete", "write")))
def test_snapshot_names_exist_when_they_are_used(ops: list[WorkOp]) -> None:
    names: set[str] = set()
    for op in ops:
        if op.kind == "snapshot":
            assert op.name not in names
            names.add(op.name)
        elif op.kind in ("revert", "delete"):
            assert op.name in names
            if op.kind == "delete":
                names.remove(op.name)


@pytest.mark.real("qemu-img")
@settings(max_examples=10)
@given(geometries())
def test_geometries_are_accepted_by_qemu(geometry: Geometry) -> None:
    with tempfile.TemporaryDirectory() as folder:
        command = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", geometry.qemu_options(), f"{folder}/image"]
        result = subprocess.run([*command, str(geometry.size)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@given(tiny_specs())
def test_specs_can_be_built_and_are_clean(spec: TinySpec) -> None:
    image = build(spec)
    assert reference_read(image.raw) == image.guest
    assert reference_check(image.raw).corruptions == 0


@given(hostile_images())
def test_the_reference_reader_survives_hostile_images(raw: bytes) -> None:
    for call in (reference_read, reference_check):
        try:
            call(raw)
        except ReferenceError:
            pass
