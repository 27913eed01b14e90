# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""LVM: what is run, what is read, and real volume groups on loop devices."""

import os
import threading

import pytest

from storage_pool.errors import InvalidName, LvmError, NoSpace, NotFound
from storage_pool.ids import BLANK, make_id
from storage_pool.layout import volume_tags
from storage_pool.lvm import Lvm, LvmHost
from storage_pool.process import SystemRunner
from storage_pool.testing.lvm import local_lvm, loop_devices
from storage_pool.testing.process import ScriptedRunner, completed

GIB = 1 << 30
MIB = 1 << 20


@pytest.fixture
def devices(tmp_path):
    with loop_devices(tmp_path, 12 * GIB, 12 * GIB, 12 * GIB) as made:
        yield made


@pytest.fixture
def lvm(tmp_path, devices):
    return local_lvm(tmp_path / "host", devices)


@pytest.fixture
def group(lvm, devices):
    name = make_id()
    lvm.create_group(name, devices[:2], ["RHAT_storage_domain_UNREADY"])
    return name


@pytest.mark.real("lvm", "losetup")
def test_bd01_one_pv_keeps_the_metadata_and_the_others_ignore_it(lvm, devices, group):
    state = lvm.group(group)
    assert {(pv.name, pv.mda_count, pv.mda_used_count) for pv in state.pvs.values()} == {
        (devices[0], 2, 2),
        (devices[1], 2, 0),
    }
    assert state.metadata_pv.name == devices[0]
    assert state.vg.tags == {"RHAT_storage_domain_UNREADY"}
    assert (state.vg.extent_size, state.pvs[devices[0]].pe_start) == (128 * MIB, 129 * MIB)
    lvm.remove_group(group)
    with pytest.raises(NotFound):
        lvm.group(group)


@pytest.mark.real("lvm", "losetup")
def test_a_group_is_one_report_whatever_its_number_of_volumes(lvm, group):
    names = sorted(make_id() for _ in range(5))
    for slot, name in enumerate(names, 1):
        lvm.create_volume(group, name, 1, volume_tags(slot, BLANK, make_id()))
    before = lvm.commands
    state = lvm.group(group)
    assert lvm.commands - before == 1
    assert sorted(state.lvs) == names and {lv.size for lv in state.lvs.values()} == {128 * MIB}
    assert [other.vg.name for other in lvm.groups()] == [group]


class Vanishing:
    """LVM that finds, after it made its list, that a group of it is gone."""

    def __init__(self, group):
        self.names = group, make_id()

    def run(self, argv, **options):
        return SystemRunner().run([*argv, *self.names], **options)


@pytest.mark.real("lvm", "losetup")
def test_a_foreign_group_that_vanishes_during_the_report_hides_no_other(tmp_path, devices, group):
    late = local_lvm(tmp_path / "late", devices, Vanishing(group))
    assert [state.vg.name for state in late.groups()] == [group]
    with pytest.raises(NotFound):
        late.group(make_id())


@pytest.mark.real("lvm", "losetup")
def test_bd12_extending_grows_over_devices_and_does_nothing_when_big_enough(lvm, devices, group):
    name = make_id()
    lvm.create_volume(group, name, 1024, [])
    lvm.extend_volume(group, name, 14 * 1024)
    lvm.extend_volume(group, name, 1024)
    state = lvm.group(group)
    assert state.lv(name).size == 14 * GIB
    places = state.placements(name)
    assert [place.device for place in places] == devices[:2]
    assert sum(place.size for place in places) == 14 * GIB and places[0].offset == 129 * MIB
    with pytest.raises(NoSpace, match=r"[Ii]nsufficient"):
        lvm.extend_volume(group, name, 100 * 1024)


@pytest.mark.real("lvm", "losetup")
def test_bd13_reducing_gives_extents_back(lvm, group):
    name = make_id()
    lvm.create_volume(group, name, 1024, [])
    lvm.reduce_volume(group, name, 200)
    assert lvm.group(group).lv(name).size == 256 * MIB


@pytest.mark.real("lvm", "losetup")
def test_tags_change_in_one_command_for_many_volumes(lvm, group):
    names = [make_id(), make_id()]
    for name in names:
        lvm.create_volume(group, name, 1, ["OVIRT_VOL_INITIALIZING"])
    tags = volume_tags(3, BLANK, make_id())
    before = lvm.commands
    lvm.change_tags(group, names, add=tags, remove=["OVIRT_VOL_INITIALIZING"])
    assert lvm.commands - before == 1
    assert {lvm.group(group).lv(name).tags for name in names} == {frozenset(tags)}
    lvm.remove_volumes(group, names)
    assert not lvm.group(group).lvs


@pytest.mark.real("lvm", "losetup")
def test_every_special_character_of_a_tag_survives_lvm(lvm, group):
    tag = "MDT_X=&38&a+b-c./d=e!f:g#h"
    lvm.change_group_tags(group, add=[tag], remove=["RHAT_storage_domain_UNREADY"])
    assert lvm.group(group).vg.tags == {tag}


@pytest.mark.real("lvm", "losetup")
def test_bd16_q01_a_middle_pv_is_removed_and_the_group_extended_again(lvm, devices, group):
    lvm.extend_group(group, [devices[2]])
    lvm.reduce_group(group, devices[1])
    lvm.extend_group(group, [devices[1]], force=True)
    assert set(lvm.group(group).pvs) == set(devices)


@pytest.mark.real("lvm", "losetup")
def test_bd20_a_device_that_came_later_is_found_by_the_second_try(tmp_path, devices, group):
    lists = iter([devices[1:2], devices, devices])
    late = Lvm(local_lvm(tmp_path / "host", devices)._runner, LvmHost(lambda: next(lists), activation=False))
    with pytest.raises(NotFound):
        # A report over known devices does not fail, so it is not repeated.
        local_lvm(tmp_path / "other", [devices[2]]).group(group)
    assert late.group(group).vg.name == group and late.commands == 2


def test_bd20_the_filter_names_exactly_our_devices_and_is_quoted():
    config = LvmHost().config(["/dev/mapper/36001405b.x", "/dev/sda"])
    assert r'filter=["a|^/dev/mapper/36001405b\\.x$|", "a|^/dev/sda$|", "r|.*|"]' in config
    assert "filter" not in LvmHost().config(None)


@pytest.mark.parametrize(
    "bad", ["sda", '/dev/x"', "/dev/x|y", "/dev/x\n", "/dev/../etc/passwd", "/dev/a b", "-x", "/dev/x$"]
)
def test_a_device_that_could_change_the_configuration_is_refused(bad):
    runner = ScriptedRunner(completed)
    lvm = Lvm(runner, LvmHost(lambda: [bad]))
    with pytest.raises(InvalidName):
        lvm.groups()
    for call in (lambda: lvm.reduce_group(make_id(), bad), lambda: lvm.create_group(make_id(), [bad], [])):
        with pytest.raises(InvalidName):
            call()
    assert not runner.runs


@pytest.mark.parametrize("bad", ["", "x", "-x", "@tag", make_id() + "\n", "../x", "snapshot1", "pvmove0"])
def test_names_and_tags_are_checked_before_lvm_runs(bad):
    runner = ScriptedRunner(completed)
    lvm = Lvm(runner, LvmHost())
    good = make_id()
    for call in (
        lambda: lvm.group(bad),
        lambda: lvm.remove_group(bad),
        lambda: lvm.create_volume(good, bad, 1, []),
        lambda: lvm.remove_volumes(good, [good, bad]),
        lambda: lvm.extend_volume(bad, good, 1),
        lambda: lvm.rename_volume(good, good, bad),
    ):
        with pytest.raises(InvalidName):
            call()
    for tag in ("-x", "@x", "a b", "a,b", "", "x" * 1025, "a\n"):
        with pytest.raises(InvalidName):
            lvm.change_tags(good, [good], add=[tag])
    assert not runner.runs


def test_bd20_lvm_warnings_are_no_message_and_its_last_complaint_is():
    text = b"  Volume group is not there\n  WARNING: Activation disabled.\n"
    runner = ScriptedRunner(lambda argv: completed(argv, 5, stderr=text))
    with pytest.raises(LvmError, match="lvm vgremove: Volume group is not there"):
        Lvm(runner, LvmHost()).remove_group(make_id())


@pytest.mark.parametrize("report", [b"", b"{}", b"nonsense", b'{"report": [{"vg": [{}]}]}', b'{"report": 3}', b"[]"])
def test_a_report_that_is_no_report_is_an_error(report):
    runner = ScriptedRunner(lambda argv: completed(argv, report=report))
    with pytest.raises((LvmError, NotFound)):
        Lvm(runner, LvmHost()).group(make_id())


def test_without_device_mapper_nothing_is_activated():
    runner = ScriptedRunner(completed)
    lvm = Lvm(runner, LvmHost(activation=False))
    lvm.activate(make_id(), [make_id()])
    lvm.refresh(make_id(), make_id())
    assert not runner.runs


def test_bd20_at_most_so_many_programs_run_at_once(tmp_path):
    runner = SystemRunner(limit=2)
    gate, told = tmp_path / "gate", tmp_path / "told"
    ends = {}
    for fifo in (gate, told):
        os.mkfifo(fifo)
        ends[fifo] = os.open(fifo, os.O_RDWR)
    script = ["sh", "-c", f"echo > {told}; read line < {gate}"]
    threads = [threading.Thread(target=runner.run, args=(script,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    # Two said that they run; the third has no slot and cannot.
    assert [os.read(ends[told], 1) for _ in range(2)] == [b"\n"] * 2
    assert not runner.slots.acquire(blocking=False)
    os.write(ends[gate], b"\n")
    assert os.read(ends[told], 1) == b"\n"
    os.write(ends[gate], b"\n\n")
    for thread in threads:
        thread.join()
    for end in ends.values():
        os.close(end)
    assert [runner.slots.acquire(blocking=False) for _ in range(3)] == [True, True, False]


@pytest.mark.parametrize(
    ("text", "kind", "words"),
    [
        ("  Can't open /dev/sdb exclusively.  Mounted filesystem?\n", LvmError, "uses the device"),
        ("  WARNING: x\n  No device found for /dev/sdb.\n", LvmError, "name this one too"),
        ("  Couldn't find device with uuid abc.\n", LvmError, "is missing"),
        ("  VG g 1048000 metadata on /dev/sdb (1048576 bytes) too large for circular buffer\n", NoSpace, "circular"),
        ("  Something new.\n", LvmError, "lvm vgreduce: Something new"),
    ],
)
def test_what_lvm_says_becomes_a_line_and_what_to_do(text, kind, words):
    lvm = Lvm(ScriptedRunner(lambda argv: completed(argv, 5, stderr=text.encode())), LvmHost())
    with pytest.raises(kind) as caught:
        lvm.reduce_group(make_id(), "/dev/sdb")
    assert words in f"{caught.value} {caught.value.hint}" and len(str(caught.value).splitlines()) == 1
