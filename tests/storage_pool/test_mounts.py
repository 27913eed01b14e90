# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Mounting: what is run for each type, and a real file system."""

from pathlib import Path

import pytest

from storage_pool.errors import InvalidName, ProcessError, UnsupportedVersion
from storage_pool.file_domain import FileDomain
from storage_pool.ids import make_id
from storage_pool.mounts import mount, mount_point, unmount
from storage_pool.process import SystemRunner
from storage_pool.testing.lvm import attached
from storage_pool.testing.process import ScriptedRunner, completed

NFS = "soft,nosharecache,timeo=100,retrans=3,nolock"


@pytest.mark.parametrize(
    ("kind", "remote", "options", "argv", "place"),
    [
        ("NFS", "h:/a_b/c/", {}, ["-t", "nfs", "-o", NFS, "h:/a_b/c/"], "mnt/h:_a__b_c"),
        ("NFS", "[fe80::1]:/x", {"options": ["vers=4.2"]}, ["-t", "nfs", "-o", f"{NFS},vers=4.2"], "mnt/[fe80::1]:_x"),
        ("GLUSTERFS", "h:/vol", {}, ["-t", "glusterfs", "h:/vol"], "mnt/glusterSD/h:_vol"),
        ("POSIXFS", "/dev/x", {"file_system": "xfs"}, ["-t", "xfs", "/dev/x"], "mnt/_dev_x"),
    ],
)
def test_each_type_is_mounted_where_other_hosts_look(tmp_path, kind, remote, options, argv, place):
    runner = ScriptedRunner(completed)
    target = mount(runner, str(tmp_path), kind, remote, **options)
    assert target == f"{tmp_path}/{place}" == mount_point(str(tmp_path), kind, remote)
    assert list(runner.runs[0][1 : 1 + len(argv)]) == argv and runner.runs[0][-2:] == (remote, target)
    unmount(runner, str(tmp_path), kind, remote)
    assert not Path(target).exists() and len(runner.runs) == 1


def test_local_storage_is_a_link(tmp_path):
    place = tmp_path / "place"
    place.mkdir()
    runner = ScriptedRunner(completed)
    for _ in range(2):
        target = mount(runner, str(tmp_path), "LOCALFS", str(place))
    assert Path(target).readlink() == place and not runner.runs
    unmount(runner, str(tmp_path), "LOCALFS", str(place))
    assert place.is_dir() and not Path(target).exists()


@pytest.mark.parametrize(
    ("kind", "remote", "options", "error"),
    [
        ("NFS", "h:/a,b", {}, InvalidName),
        ("NFS", "h:/a", {"options": ["a,b"]}, InvalidName),
        ("NFS", "h:/a", {"options": ["-v"]}, InvalidName),
        ("NFS", "h:/a", {"file_system": "xfs"}, InvalidName),
        ("POSIXFS", "/dev/x", {}, InvalidName),
        ("POSIXFS", "/dev/x", {"file_system": "-x"}, InvalidName),
        ("ISCSI", "x", {}, UnsupportedVersion),
    ],
)
def test_what_could_mean_something_else_is_refused_before_anything_runs(tmp_path, kind, remote, options, error):
    runner = ScriptedRunner(completed)
    with pytest.raises(error):
        mount(runner, str(tmp_path), kind, remote, **options)
    assert not runner.runs and not list(tmp_path.iterdir())


def test_a_mount_that_fails_is_told_in_its_words_and_leaves_no_directory(tmp_path):
    runner = ScriptedRunner(lambda argv: completed(argv, 32, stderr=b"mount.nfs: access denied\n"))
    with pytest.raises(ProcessError, match=r"h:/a: mount: mount\.nfs: access denied"):
        mount(runner, str(tmp_path), "NFS", "h:/a")
    assert not list((tmp_path / "mnt").iterdir())


@pytest.mark.real("losetup", "mke2fs")
def test_a_domain_is_made_on_a_file_system_that_was_mounted(tmp_path, token):
    runner, root, device_file = SystemRunner(), str(tmp_path / "root"), tmp_path / "device"
    with device_file.open("xb") as file:
        file.truncate(256 << 20)
    with attached([device_file]) as (device,):
        assert runner.run(["mke2fs", "-q", "-F", device]).returncode == 0
        target = mount(runner, root, "POSIXFS", device, file_system="ext2")
        try:
            assert mount(runner, root, "POSIXFS", device, file_system="ext2") == target
            options = {"version": 5, "storage_type": "POSIXFS", "remote_path": device, "ctime": 0}
            with FileDomain.create(token, target, make_id(), **options) as domain:
                assert domain.capacity()[0] < 256 << 20
                with pytest.raises(ProcessError, match="busy"):
                    unmount(runner, root, "POSIXFS", device)
        finally:
            unmount(runner, root, "POSIXFS", device)
        assert not Path(target).exists()
