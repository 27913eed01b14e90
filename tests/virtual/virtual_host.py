# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""A small virtual host with a real device mapper, made of Debian packages only.

A qemu machine boots Debian's cloud kernel, takes this machine's own file tree
as its root (read-only, changes go to memory) and runs commands that come over
a virtio serial port.  The kernel and busybox are downloaded by ``apt-get`` once
and unpacked under ``build/virtual-host``, not installed.

    with VirtualHost(["lun.raw"]) as host:
        print(host.run(["lvs", "--noheadings"]).stdout)

As a program it fetches what it needs: ``python3 tests/virtual/virtual_host.py``.
"""

import base64
import contextlib
import io
import json
import lzma
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from pathlib import Path

CACHE = Path(__file__).resolve().parent.parent.parent / "build/virtual-host"
KERNEL = "linux-image-cloud-amd64"
VIRTIOFSD = Path("/usr/lib/qemu/virtiofsd")
# Loaded before the root is there; any other module is a modprobe away.
BOOT_MODULES = ("virtio_pci", "virtiofs", "overlay", "virtio_console", "virtio_blk", "dm-mod")
# No machine outlives the thread that launched it, however that ends.
DIE_WITH_US = ("setpriv", "--pdeathsig", "KILL")

GUEST_INIT = r"""#!/bin/busybox sh
B=/bin/busybox
$B mount -t proc proc /proc
$B mount -t sysfs sysfs /sys
$B mount -t devtmpfs dev /dev
while read m; do $B insmod /m/$m; done < /m/order
$B ip link set lo up
$B mount -t virtiofs -o ro root /lower || $B poweroff -f
$B mount -t tmpfs -o size=50% upper /upper
$B mkdir /upper/u /upper/w
$B mount -t overlay -o lowerdir=/lower,upperdir=/upper/u,workdir=/upper/w root /newroot
for d in proc sys dev; do $B mount --move /$d /newroot/$d; done
$B mount -t tmpfs run /newroot/run
$B mount -t tmpfs tmp /newroot/tmp
$B cp /agent.py /bin/busybox /newroot/run/
exec $B switch_root /newroot /usr/bin/python3 -S -E /run/agent.py
"""

# Process 1 of the guest: a JSON line with a command in, a JSON line with its
# result out.  Every command has a thread, so slow ones hold nothing up.
GUEST_AGENT = r"""
import base64, ctypes, glob, json, os, re, signal, subprocess, threading

def option(name):
    return re.search(rf"\bvirtual_host\.{name}=(\S+)", open("/proc/cmdline").read())[1]

def mount(source, target, kind=None, flags=0):
    os.makedirs(target, exist_ok=True)
    args = [a and a.encode() for a in (source, target, kind)]
    if ctypes.CDLL(None, use_errno=True).mount(*args, ctypes.c_ulong(flags), None):
        raise OSError(ctypes.get_errno(), target)

BIND = 4096
mount("devpts", "/dev/pts", "devpts")
mount("shm", "/dev/shm", "tmpfs")
mount(option("modules"), "/lib/modules", flags=BIND)
for folder in ("/run/lock", "/run/bin"):
    os.mkdir(folder)
for tool in ("modprobe", "rmmod", "lsmod"):
    os.symlink("../busybox", "/run/bin/" + tool)
os.makedirs("/etc/lvm", exist_ok=True)
with open("/etc/lvm/lvm.conf", "w") as conf:      # there is no udev
    conf.write('''
devices { use_devicesfile=0 obtain_device_list_from_udev=0 external_device_info_source="none" hints="none" }
activation { udev_sync=0 udev_rules=0 monitoring=0 }
backup { backup=0 archive=0 }
global { event_activation=0 notify_dbus=0 use_lvmpolld=0 use_aio=0 }
''')
os.environ.update(PATH="/run/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
                  HOME="/root", LANG="C.UTF-8", LVM_SUPPRESS_FD_WARNINGS="1")
port = open(glob.glob("/dev/vport*p1")[0], "r+b", buffering=0)
lock = threading.Lock()

def say(**answer):
    data = json.dumps(answer).encode() + b"\n"
    with lock:
        while data:
            data = data[port.write(data):]

def serve(ask):
    try:
        child = subprocess.Popen(ask["argv"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                 cwd=ask["cwd"], env={**os.environ, **ask["env"]}, start_new_session=True)
        try:
            out, err = child.communicate(timeout=ask["timeout"])
            code = child.returncode
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            out, err = child.communicate()
            code = 124
    except OSError as e:
        out, err, code = b"", str(e).encode(), 127
    say(id=ask["id"], rc=code, out=base64.b64encode(out).decode(), err=base64.b64encode(err).decode())

say(id=0)
pending = b""
while True:
    *lines, pending = (pending + (port.read(65536) or b"")).split(b"\n")
    for line in lines:
        ask = json.loads(line)
        if ask.get("off"):
            os.sync()
            open("/proc/sysrq-trigger", "w").write("o")
            signal.pause()
        threading.Thread(target=serve, args=(ask,), daemon=True).start()
"""


class HostError(Exception):
    """A virtual host did not start, went away, or failed a command."""


# -- made once: kernel, modules, busybox


def fetch() -> str:
    """Download and unpack the packages of kernel and busybox where that was not done; return the kernel's release."""
    ready = CACHE / "ready"
    if not ready.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        depends = subprocess.check_output(["apt-cache", "depends", KERNEL], text=True)
        package = re.search(r"Depends: (linux-image-\S+)", depends)[1]
        with tempfile.TemporaryDirectory(dir=CACHE) as debs:
            command = ["apt-get", "download", "-qq", package, "busybox-static"]
            subprocess.run(command, cwd=debs, check=True, stderr=subprocess.DEVNULL, timeout=300)
            for deb in Path(debs).glob("*.deb"):
                subprocess.run(["dpkg-deb", "-x", deb, CACHE], check=True)
        release = package.removeprefix("linux-image-")
        subprocess.run([CACHE / "bin/busybox", "depmod", "-b", CACHE, release], check=True)
        ready.write_text(release)
    return ready.read_text()


def available() -> bool:
    """Whether a virtual host can be started here."""
    programs = ("qemu-system-x86_64", "unshare", "setpriv")
    return os.geteuid() == 0 and (CACHE / "ready").exists() and VIRTIOFSD.exists() and all(map(shutil.which, programs))


def _load_order(names, release):
    """Return module files by name, in the order insmod needs, from their own 'depends' fields."""
    files = {p.name.split(".ko")[0].replace("-", "_"): p for p in (CACHE / "lib/modules" / release).rglob("*.ko*")}
    order = {}

    def visit(name):
        name = name.replace("-", "_")
        if name in order or name not in files:  # there already, or built into the kernel
            return
        data = files[name].read_bytes()
        if files[name].suffix == ".xz":
            data = lzma.decompress(data)
        for needed in re.search(rb"\0depends=([^\0]*)", data)[1].decode().split(","):
            visit(needed)
        order[name] = data

    for name in names:
        visit(name)
    return order


def _cpio(entries):
    """Return an initramfs ('newc' cpio) of (name, mode, data, device) entries."""
    out = io.BytesIO()

    def padded(data):
        out.write(data)
        out.write(bytes(-out.tell() % 4))

    for number, (name, mode, data, device) in enumerate([*entries, ("TRAILER!!!", 0, b"", (0, 0))], 1):
        path = name.encode() + b"\0"
        fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(path), 0)
        padded(b"070701" + "".join(f"{n:08x}" for n in fields).encode() + path)
        padded(data)
    return out.getvalue()


def _initramfs(release):
    modules = _load_order(BOOT_MODULES, release)
    files = {
        "init": GUEST_INIT.encode(),
        "agent.py": GUEST_AGENT.encode(),
        "bin/busybox": (CACHE / "bin/busybox").read_bytes(),
        "m/order": "".join(f"{m}\n" for m in modules).encode(),
        **{f"m/{m}": data for m, data in modules.items()},
    }
    folders = ("bin", "dev", "lower", "m", "newroot", "proc", "sys", "upper")
    return _cpio(
        [
            *((name, 0o040755, b"", (0, 0)) for name in folders),
            ("dev/console", 0o020600, b"", (5, 1)),
            *((name, 0o100755, data, (0, 0)) for name, data in files.items()),
        ]
    )


def accelerator():
    """Return ``kvm`` where the processor's own virtualisation is behind /dev/kvm, else ``tcg``.

    A /dev/kvm served by other means opens, but may interpret a stock kernel
    so slowly that the guest does not come up.
    """
    hardware = any(Path("/sys/module", name).exists() for name in ("kvm_intel", "kvm_amd"))
    return "kvm" if hardware and os.access("/dev/kvm", os.R_OK | os.W_OK) else "tcg"


# -- a running host


class VirtualHost:
    """One virtual host; boots on entering a ``with`` block, is off after it.

    *disks* are raw images, the guest's /dev/vda, /dev/vdb...; hosts may share
    them, as hosts share a LUN.
    """

    def __init__(self, disks=(), *, memory=512, boot_timeout=180):
        self.disks, self.memory, self.boot_timeout = disks, memory, boot_timeout
        self.dir = self.qemu = self.share = self.port = None
        self.asked, self.answers, self.news = 0, {}, threading.Condition()
        self.boot_seconds = None

    def __enter__(self):
        try:
            self._launch()
            self._answer(0, self.boot_timeout)
            self.boot_seconds = time.monotonic() - self.began
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(self, *exc):
        self.stop()

    def _launch(self):
        release = fetch()
        self.dir = Path(tempfile.mkdtemp(prefix="virtual-host-"))
        (self.dir / "initrd").write_bytes(_initramfs(release))
        self.began = time.monotonic()
        self._start_share()
        self.qemu = self._spawn("qemu", *self._qemu_argv(release))
        self._await(self.dir / "port", self.qemu)
        self.port = socket.socket(socket.AF_UNIX)
        self.port.connect(str(self.dir / "port"))
        threading.Thread(target=self._listen, daemon=True).start()

    def _spawn(self, name, *argv):
        with open(self.dir / f"{name}.err", "wb") as err:
            return subprocess.Popen(
                [*DIE_WITH_US, *argv],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=err,
                start_new_session=True,
            )

    def _start_share(self):
        """Serve this machine's tree through a private bind mount that is read-only."""
        view, sock = self.dir / "view", self.dir / "share"
        view.mkdir()
        script = (
            'mount --rbind / "$0" && mount -o remount,bind,ro "$0" && exec "$2" --socket-path="$1"'
            ' -o source="$0" -o sandbox=chroot -o cache=auto -o log_level=warn --rlimit-nofile=0'
        )
        isolated = ("unshare", "--mount", "--propagation", "private")
        self.share = self._spawn("share", *isolated, "sh", "-c", script, view, sock, VIRTIOFSD)
        self._await(sock, self.share)

    def _qemu_argv(self, release):
        # Under TCG a processor without AVX runs user space twice as fast.
        cpu = ["kvm", "-cpu", "host"] if accelerator() == "kvm" else ["tcg,thread=multi", "-cpu", "Nehalem"]
        kernel = (
            "console=ttyS0 quiet panic=-1 mitigations=off no_timer_check random.trust_cpu=on "
            f"virtual_host.modules={CACHE}/lib/modules"
        )
        argv = ["qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
        argv += ["-accel", *cpu, "-machine", "q35,memory-backend=mem", "-m", f"{self.memory}M"]
        argv += ["-object", f"memory-backend-memfd,id=mem,size={self.memory}M,share=on"]
        argv += ["-kernel", f"{CACHE}/boot/vmlinuz-{release}", "-initrd", f"{self.dir}/initrd", "-append", kernel]
        argv += ["-serial", f"file:{self.dir}/console"]
        argv += ["-chardev", f"socket,id=share,path={self.dir}/share"]
        argv += ["-device", "vhost-user-fs-pci,chardev=share,tag=root", "-device", "virtio-serial-pci"]
        argv += ["-chardev", f"socket,id=port,path={self.dir}/port,server=on,wait=off"]
        argv += ["-device", "virtserialport,chardev=port,name=agent,nr=1"]
        argv += ["-object", "rng-random,id=rng,filename=/dev/urandom", "-device", "virtio-rng-pci,rng=rng"]
        for n, path in enumerate(self.disks):
            argv += ["-blockdev", f"driver=raw,node-name=d{n},discard=unmap,file.driver=file,file.filename={path},"]
            argv[-1] += "file.cache.direct=on,file.locking=off,file.discard=unmap"
            argv += ["-device", f"virtio-blk-pci,id=disk{n},drive=d{n},share-rw=on"]
        return argv

    def _await(self, path, process, timeout=20):
        limit = time.monotonic() + timeout
        while not path.exists():
            if process.poll() is not None or time.monotonic() > limit:
                raise HostError(f"no {path.name} socket\n{self.tails()}")
            time.sleep(0.01)

    def tails(self):
        """Return the ends of the guest's console and of the processes' messages."""
        logs = [self.dir / name for name in ("share.err", "qemu.err", "console")]
        return "\n".join(f"[{p.name}] {p.read_text(errors='replace')[-800:]}" for p in logs if p.exists())

    # -- commands

    def _listen(self):
        with self.port.makefile("rb") as lines, contextlib.suppress(OSError):
            for line in lines:
                answer = json.loads(line)
                with self.news:
                    self.answers[answer["id"]] = answer
                    self.news.notify_all()
        with self.news:
            self.answers["end"] = None
            self.news.notify_all()

    def _answer(self, ident, timeout):
        with self.news:
            if not self.news.wait_for(lambda: ident in self.answers or "end" in self.answers, timeout):
                raise HostError(f"no answer in {timeout} s\n{self.tails()}")
            if ident not in self.answers:
                raise HostError(f"the host is off\n{self.tails()}")
            return self.answers.pop(ident)

    def run(self, argv, *, timeout=120, cwd="/tmp", env=None):
        """Run a program in the guest; return its CompletedProcess (124: it ran past its timeout)."""
        with self.news:
            self.asked += 1
            ident = self.asked
            ask = {"id": ident, "argv": [*map(str, argv)], "timeout": timeout, "cwd": str(cwd), "env": env or {}}
            self.port.sendall(json.dumps(ask).encode() + b"\n")
        answer = self._answer(ident, timeout + 30)
        out, err = (base64.b64decode(answer[name]).decode(errors="backslashreplace") for name in ("out", "err"))
        return subprocess.CompletedProcess(argv, answer["rc"], out, err)

    def stop(self):
        """Shut the guest down; pull the plug if it does not."""
        if self.port and self.qemu.poll() is None:
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                self.port.sendall(b'{"off": 1}\n')
                self.qemu.wait(15)
        self.kill()

    def kill(self):
        """Cut the power."""
        for process in (self.qemu, self.share):
            if process and process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if self.port:
            self.port.close()
        if self.dir:
            shutil.rmtree(self.dir, ignore_errors=True)


if __name__ == "__main__":
    print(fetch())
