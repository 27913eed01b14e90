# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""A thin volume under a real guest: grown at QEMU's write threshold, or after a pause for want of space.

The guest is one boot sector that writes stamped sectors.  Without device
mapper QEMU reaches the logical volume as a window of its physical volume,
which is made longer by blockdev-reopen, as a device would be by a refresh.
"""

import contextlib
import json
import os
import select
import socket
import struct
import subprocess
import time
from pathlib import Path

import pytest

from qcowlib.units import MiB
from spm.cli.endpoint import ask
from storage_pool.block_domain import BlockDomain
from storage_pool.block_group import create_block_domain
from storage_pool.embedded import FileToken
from storage_pool.ids import make_id
from storage_pool.pool import StoragePool
from storage_pool.process import SystemRunner
from storage_pool.testing.lvm import attached, local_lvm
from storage_pool.thin import ThinPolicy
from storage_pool.volume import VolumeSpec, create_volume, open_image

from .test_host_process import Host, manager, wait_for

pytestmark = [pytest.mark.real("lvm", "losetup", "qemu-system-x86_64"), pytest.mark.bare]

GIB = 1 << 30
CLUSTER_SECTORS = 128
CALLS = 2200
STAMP = 0xFEED


class Monitor:
    """One QMP connection; events wait in order."""

    def __init__(self, path):
        self.sock = socket.socket(socket.AF_UNIX)
        wait_for(lambda: self.sock.connect_ex(str(path)) == 0)
        self.pending, self.events = b"", []
        self._read(60)
        self("qmp_capabilities")

    def _read(self, timeout):
        while b"\n" not in self.pending:
            if not select.select([self.sock], [], [], timeout)[0]:
                return None
            self.pending += self.sock.recv(65536)
        line, self.pending = self.pending.split(b"\n", 1)
        return json.loads(line)

    def __call__(self, execute, **arguments):
        words = {name.replace("_", "-"): value for name, value in arguments.items()}
        self.sock.sendall(json.dumps({"execute": execute, "arguments": words}).encode() + b"\n")
        while True:
            message = self._read(60)
            assert message is not None and "error" not in message, (execute, message)
            if "event" not in message:
                return message["return"]
            self.events.append(message)

    def event(self, timeout):
        return self.events.pop(0) if self.events else self._read(timeout)


def boot_disk(folder):
    """Assemble the guest; returns the file it boots from."""
    source = Path(__file__).parent / "guest_writer.S"
    subprocess.run(["as", "--32", "-o", folder / "w.o", source], check=True)
    link = ["ld", "-m", "elf_i386", "-Ttext", "0x7c00", "--oformat", "binary", "-o", folder / "w.bin", folder / "w.o"]
    subprocess.run(link, check=True)
    sector = bytearray((folder / "w.bin").read_bytes())
    struct.pack_into("<III", sector, 0x1D0, CALLS * CLUSTER_SECTORS, CLUSTER_SECTORS, STAMP)
    (folder / "boot").write_bytes(sector + bytes(MiB - len(sector)))
    return folder / "boot"


class Volume:
    """A thin volume as QEMU sees it: a window of the physical volume."""

    def __init__(self, domain, device, volume):
        self.domain = domain
        self.device = device
        self.volume = volume
        self.look()

    def look(self):
        self.domain.refresh()
        (place,) = self.domain.state.placements(self.volume)
        self.offset, self.size = place.offset, place.size

    def node(self):
        return {"driver": "raw", "node-name": "volume", "offset": self.offset, "size": self.size, "file": "pv"}

    def nodes(self):
        cache = {"direct": False, "no-flush": True}
        pv = {"driver": "host_device", "node-name": "pv", "filename": self.device, "cache": cache}
        return [pv, self.node(), {"driver": "qcow2", "node-name": "image", "file": "volume"}]


@contextlib.contextmanager
def machine(folder, nodes):
    """Run the guest, paused."""
    argv = [
        "qemu-system-x86_64",
        "-accel",
        "tcg",
        "-m",
        "16",
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        "-S",
    ]
    argv += ["-debugcon", f"file:{folder}/said", "-qmp", f"unix:{folder}/qmp,server=on,wait=off"]
    argv += ["-blockdev", f"driver=raw,node-name=boot,file.driver=file,file.filename={boot_disk(folder)}"]
    argv += ["-device", "virtio-blk-pci,drive=boot,bootindex=0"]
    for node in nodes:
        argv += ["-blockdev", json.dumps(node)]
    argv += ["-device", "virtio-blk-pci,id=data,drive=image,bootindex=1,werror=stop,rerror=stop"]
    process = subprocess.Popen(argv, stderr=subprocess.DEVNULL)
    try:
        yield Monitor(folder / "qmp")
    finally:
        process.terminate()
        process.wait()


@pytest.mark.parametrize("watched", [True, False], ids=["threshold", "pause and resume"])
def test_volume_grows_under_a_guest(tmp_path, watched):
    lun = tmp_path / "lun"
    lun.touch()
    os.truncate(lun, 40 * GIB)
    with contextlib.ExitStack() as stack:
        (device,) = stack.enter_context(attached([lun]))
        lvm = local_lvm(tmp_path / "host1", [device])
        uuid = make_id()
        with FileToken(str(tmp_path / "lock")) as token:
            domain = create_block_domain(token, lvm, SystemRunner(), uuid, [device], version=5, ctime=1)
            StoragePool.create(token, make_id(), "pool", domain)
            spec = VolumeSpec(make_id(), make_id(), 2 * GIB, format="COW", initial_size=64 * MiB)
            create_volume(token, domain, spec, ctime=1)
        environment = {
            "LVM_SYSTEM_DIR": str(tmp_path / "host1/lvm"),
            "QPOOL_LVM_LOCKING_DIR": str(tmp_path / "host1/lock"),
        }
        words = ["--contend", "--leases", "embedded", "--lock-folder", tmp_path / "locks", "--place", tmp_path]
        host = Host(stack, tmp_path, uuid, 1, *words, "--device", device, environment=environment)
        wait_for(lambda: manager([host]), 60, [host])
        volume = Volume(BlockDomain.open(lvm, uuid), device, spec.volume)
        policy = ThinPolicy(128 * MiB, 50)
        events = []
        with machine(tmp_path, volume.nodes()) as qmp:

            def watch():
                if watched:
                    qmp("block-set-write-threshold", node_name="volume", write_threshold=policy.threshold(volume.size))

            def grow():
                size = policy.next_size(volume.size, spec.capacity)
                body = {"domain": uuid, "volume": spec.volume, "size_mib": size // MiB}
                code, text = ask(host.socket, "/extend", body)
                assert code == 200, text
                volume.look()
                qmp("blockdev-reopen", options=[volume.node()])
                watch()

            watch()
            qmp("cont")
            limit = time.monotonic() + 200
            while not (tmp_path / "said").read_bytes().endswith(b"D"):
                assert time.monotonic() < limit, (qmp("query-status"), events[-3:])
                event = qmp.event(0.1)
                if event is None:
                    continue
                events.append(event["event"])
                if event["event"] == "BLOCK_WRITE_THRESHOLD":
                    grow()
                elif event["event"] == "STOP":
                    assert qmp("query-status")["status"] == "io-error"
                    grow()
                    qmp("cont")
            qmp("quit")
        assert b"E" not in (tmp_path / "said").read_bytes()
        assert ("STOP" in events) != watched and ("BLOCK_WRITE_THRESHOLD" in events) == watched
        assert volume.size > 128 * MiB
        fresh = BlockDomain.open(lvm, uuid)
        with open_image(fresh, spec.volume) as image:
            assert image.check().clean
            for call in range(0, CALLS, 37):
                for sector in (0, 63):
                    lba = call * CLUSTER_SECTORS + sector
                    assert struct.unpack("<II", image.pread(8, lba * 512)) == (STAMP, lba)
