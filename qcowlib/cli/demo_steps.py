# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""The steps of ``demo``, in order; each leaves in the directory what the next ones use.

Caches are those of qemu-img where times are compared: its convert does not wait for the device either.

Invariant: a step compares with something it did not get from this library (a
hash of what was written, or qemu-img), or it proves nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import qcowlib
from qcowlib.cli.demo import Demo, Figures, Problem, Step
from qcowlib.cli.demo_beyond import carry_difference, draw_picture, find_silent_damage, salvage_damaged
from qcowlib.cli.demo_nbd import read_by_ranges, serve_disk
from qcowlib.errors import Error
from qcowlib.inspection import inspect
from qcowlib.qcow2.repair import repair
from qcowlib.storage.file import FileStorage
from qcowlib.units import MiB, human_size

__all__ = ["STEPS", "write_load"]

LAYERS = 8
_TURNS = 3
TREES = ("/usr/bin", "/usr/lib", "/usr/share", "/etc")


def _hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hash_image(path: Path) -> str:
    digest = hashlib.sha256()
    with qcowlib.open(path) as image:
        for offset in range(0, image.size, 4 * MiB):
            digest.update(image.pread(4 * MiB, offset))
    return digest.hexdigest()


def _same(demo: Demo, left: str, right: str, what: str, size: int) -> None:
    if left != right:
        raise Problem(f"{what} differs")
    demo.guest_bytes += size


# -- the disk ------------------------------------------------------------------


def _collect(limit: int) -> Iterator[Path]:
    """Yield regular files of this machine, *limit* bytes in all."""
    for tree in TREES:
        for folder, folders, names in os.walk(tree):
            folders.sort()
            for name in sorted(names):
                path = Path(folder, name)
                if path.is_symlink() or not path.is_file() or not os.access(path, os.R_OK):
                    continue
                size = path.stat().st_size
                if size <= limit:
                    limit -= size
                    yield path
                if limit < 4096:
                    return


def make_disk(demo: Demo) -> tuple[str, Figures]:
    """A raw image with a file system of files from this machine (a tar archive without mke2fs)."""
    tree, disk = demo.path("tree"), demo.path("disk.raw")
    count = 0
    for source in _collect(demo.data):
        target = tree / source.relative_to("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
        count += 1
    mke2fs = shutil.which("mke2fs", path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if mke2fs is not None:
        command = [mke2fs, "-q", "-F", "-t", "ext4", "-d", str(tree), str(disk), f"{demo.size // 1024}k"]
        subprocess.run(command, check=True, capture_output=True)
        kind = "ext4"
    else:
        with tarfile.open(disk, "w") as archive:
            archive.add(tree, "tree")
        os.truncate(disk, max(demo.size, disk.stat().st_size))
        kind = "tar"
    shutil.rmtree(tree)
    stored = disk.stat().st_blocks * 512
    text = f"{kind}, {count} files, {human_size(demo.size)} with {human_size(stored)} stored"
    return text, {"files": count, "file-system": kind, "size": demo.size, "stored": stored}


# -- convert -------------------------------------------------------------------


def convert_plain(demo: Demo) -> tuple[str, Figures]:
    """raw to qcow2; the guest's bytes must be those of the raw file."""
    disk, image, other = demo.path("disk.raw"), demo.path("disk.qcow2"), demo.path("qemu.qcow2")
    ours, theirs = [], []
    # By turns: who comes first finds the source as its maker left it, on its way to storage.
    for _ in range(_TURNS):
        started = time.monotonic()
        with demo.progress("convert") as report:
            qcowlib.convert(disk, image, source_format="raw", format="qcow2", cache="unsafe", progress=report)
        ours.append(time.monotonic() - started)
        if demo.judge:
            theirs.append(_timed_qemu(demo, "convert", "-f", "raw", "-O", "qcow2", disk, other))
    _same(demo, _hash_image(image), _hash(disk), "the converted image", demo.size)
    demo.judge.check(image)
    demo.judge.compare(disk, "raw", image, "qcow2")
    size = image.stat().st_size
    text, figures = human_size(size), {"seconds-ours": min(ours), "file-size": size}
    if theirs:
        text += f", {min(theirs) / min(ours):.1f} times as fast as qemu-img"
        figures["seconds-qemu-img"] = min(theirs)
    return text, figures


def _timed_qemu(demo: Demo, *arguments: str | Path) -> float:
    started = time.monotonic()
    status, text = demo.judge.run(*arguments)
    if status:
        raise Problem(f"qemu-img {arguments[0]}: {text.strip()}")
    return time.monotonic() - started


def convert_compressed(demo: Demo) -> tuple[str, Figures]:
    """raw to compressed qcow2, beside ``qemu-img convert -c``."""
    disk, image, other = demo.path("disk.raw"), demo.path("small.qcow2"), demo.path("qemu.qcow2")
    started = time.monotonic()
    with demo.progress("compress") as report:
        qcowlib.convert(disk, image, source_format="raw", compress=True, cache="unsafe", progress=report)
    ours = time.monotonic() - started
    size = image.stat().st_size
    _same(demo, _hash_image(image), _hash(disk), "the compressed image", demo.size)
    demo.judge.check(image)
    demo.judge.compare(disk, "raw", image, "qcow2")
    text, figures = human_size(size), {"seconds-ours": ours, "file-size": size}
    if demo.judge:
        theirs = _timed_qemu(demo, "convert", "-c", "-f", "raw", "-O", "qcow2", disk, other)
        ratio = size / other.stat().st_size
        text += f", {theirs / ours:.1f} times as fast as qemu-img convert -c at {ratio:.2f} of its size"
        figures |= {"seconds-qemu-img": theirs, "size-ratio": ratio}
        _same(demo, _hash_image(other), _hash(disk), "what qemu-img compressed", demo.size)
    return text, figures


def show_info(demo: Demo) -> tuple[str, Figures]:
    """What an image is, beside what qemu-img says."""
    image = demo.path("small.qcow2")
    with qcowlib.open(image) as opened:
        size, cluster_size = opened.size, opened.cluster_size
        kinds: dict[str, int] = {}
        for extent in opened.extents():
            kinds[extent.kind] = kinds.get(extent.kind, 0) + extent.length
    if sum(kinds.values()) != size:
        raise Problem(f"the extents cover {sum(kinds.values())} of {size} bytes")
    if demo.judge:
        _, text = demo.judge.run("info", "--output=json", image)
        told = json.loads(text)
        if (told["virtual-size"], told["cluster-size"]) != (size, cluster_size):
            raise Problem(f"qemu-img tells another size: {told}")
        demo.judge.verdicts += 1
    parts = ", ".join(f"{human_size(length)} {kind}" for kind, length in sorted(kinds.items()))
    return f"{human_size(size)}: {parts}", {"size": size, **{f"bytes-{kind}": n for kind, n in kinds.items()}}


# -- overlays ------------------------------------------------------------------


def _is_clean(path: str) -> bool:
    with qcowlib.open(path, backing=False) as image:
        return image.check().clean


def thin_overlays(demo: Demo) -> tuple[str, Figures]:
    """Many thin disks on one base, each with a write of its own."""
    base, folder = demo.path("small.qcow2"), demo.path("vms")
    folder.mkdir()
    started = time.monotonic()
    for number in range(demo.overlays):
        qcowlib.create(folder / f"vm{number}.qcow2", None, backing=base, backing_format="qcow2", cache="unsafe")
    os.sync()
    each = (time.monotonic() - started) / demo.overlays
    for number in range(0, demo.overlays, max(1, demo.overlays // 20)):
        path, mark = folder / f"vm{number}.qcow2", f"vm {number}".encode().ljust(4096)
        with qcowlib.open(path, "r+") as image:
            image.pwrite(mark, 8192)
        with qcowlib.open(path) as image, qcowlib.open(base) as below:
            if image.pread(4096, 8192) != mark or image.pread(8192, 0) != below.pread(8192, 0):
                raise Problem(f"{path.name} does not show its write over its base")
        demo.guest_bytes += 4096 + 8192
        demo.judge.check(path)
    answers = [answer.value for answer in qcowlib.many(_is_clean, qcowlib.images_in([folder]))]
    if answers != [True] * demo.overlays:
        raise Problem(f"{answers.count(True)} of {demo.overlays} overlays are clean")
    text = f"{demo.overlays} overlays, {each * 1e3:.2f} ms each, all checked by one call"
    figures = {"overlays": demo.overlays, "seconds-each": each}
    if demo.judge:
        theirs = _timed_qemu(demo, "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", demo.path("one.qcow2"))
        text += f", {theirs / each:.0f} times as fast as a qemu-img for each"
        figures["seconds-each-qemu-img"] = theirs
    shutil.rmtree(folder)
    return text, figures


def layer_chain(demo: Demo) -> tuple[str, Figures]:
    """Eight layers with writes, read through and flattened; a plain file gets the same writes."""
    chance = random.Random(8)
    below, model = demo.path("small.qcow2"), demo.path("model.raw")
    shutil.copyfile(demo.path("disk.raw"), model)
    writes = 0
    with open(model, "r+b") as plain:
        for layer in range(1, LAYERS + 1):
            path = demo.path(f"layer{layer}.qcow2")
            qcowlib.create(path, None, backing=below, backing_format="qcow2")
            with qcowlib.open(path, "r+") as image:
                for _ in range(200):
                    data = chance.randbytes(chance.choice((512, 4096, 65536, 100_000)))
                    offset = chance.randrange(demo.size - len(data))
                    image.pwrite(data, offset)
                    plain.seek(offset)
                    plain.write(data)
                    writes += 1
                image.flush()
            demo.judge.check(path)
            below = path
    wanted, flat = _hash(model), demo.path("flat.qcow2")
    _same(demo, _hash_image(below), wanted, f"the chain of {LAYERS} layers", demo.size)
    qcowlib.convert(below, flat, source_format="qcow2", format="qcow2")
    _same(demo, _hash_image(flat), wanted, "the flattened chain", demo.size)
    with qcowlib.open(flat) as image:
        if len(image.layers) != 1:
            raise Problem("the flattened image has a backing file")
    demo.judge.check(flat)
    demo.judge.compare(below, "qcow2", model, "raw")
    demo.judge.compare(flat, "qcow2", model, "raw")
    text = f"{LAYERS} layers, {writes} writes, read through and flattened with equal hashes"
    return text, {"layers": LAYERS, "writes": writes}


def merge_layers(demo: Demo) -> tuple[str, Figures]:
    """The seven upper layers into the first, which must become as long as the plan says."""
    lowest, top, model = demo.path("layer1.qcow2"), demo.path(f"layer{LAYERS}.qcow2"), demo.path("model.raw")
    plan = qcowlib.plan_merge(top, lowest=lowest)
    with demo.progress("merge") as report:
        qcowlib.merge(top, lowest=lowest, delete=True, progress=report)
    _same(demo, _hash_image(lowest), _hash(model), "the merged layer", demo.size)
    demo.judge.check(lowest)
    demo.judge.compare(lowest, "qcow2", model, "raw")
    if lowest.stat().st_size != plan.file_size or top.exists():
        raise Problem("the merge is not what its plan said")
    text = f"{len(plan.sources) + 1} layers in one pass, {human_size(plan.data)}, file size as planned"
    return text, {"merged": plan.data, "file-size": plan.file_size}


def compact_image(demo: Demo) -> tuple[str, Figures]:
    """A flat copy of the chain loses its first half to discards, and becomes as short as the plan says."""
    path = demo.path("flat.qcow2")
    with qcowlib.open(path, "r+") as image:
        image.discard(image.size // 2 // MiB * MiB, 0)
    wanted, before = _hash_image(path), path.stat().st_size
    plan = qcowlib.plan_compact(path)
    with demo.progress("compact") as report:
        qcowlib.compact(path, progress=report)
    _same(demo, _hash_image(path), wanted, "the compacted image", demo.size)
    demo.judge.check(path)
    after = path.stat().st_size
    if after != plan.new_size:
        raise Problem("the compaction is not what its plan said")
    text = f"{human_size(before)} to {human_size(after)} in place, {human_size(plan.moved)} moved, as planned"
    return text, {"before": before, "after": after, "moved": plan.moved}


# -- kill ----------------------------------------------------------------------

BLOCK = 20480


def _load_data(number: int) -> bytes:
    return hashlib.sha256(number.to_bytes(8, "big")).digest() * (BLOCK // 32)


def _load_offset(number: int, size: int) -> int:
    """Place of write *number*: no two overlap, neighbours in time are apart."""
    slots = size // BLOCK
    return number * 7919 % slots * BLOCK


def write_load(path: str, acknowledge: int) -> None:
    """Write without end; after each flush send the number of writes it covers to file descriptor *acknowledge*."""
    with qcowlib.open(path, "r+") as image:
        for number in range(image.size // BLOCK):
            image.pwrite(_load_data(number), _load_offset(number, image.size))
            if number % 25 == 24:
                image.flush()
                os.write(acknowledge, struct.pack("<Q", number + 1))


def _killed_load(path: Path, flushes: int) -> int:
    """Run the load in a process, kill it between two of its flushes; return how many writes were flushed."""
    read_end, write_end = os.pipe()
    code = f"from qcowlib.cli.demo_steps import write_load; write_load({os.fspath(path)!r}, {write_end})"
    child = subprocess.Popen([sys.executable, "-c", code], pass_fds=[write_end])
    os.close(write_end)
    flushed = 0
    with open(read_end, "rb", buffering=0) as acknowledged:
        for _ in range(flushes):
            message = acknowledged.read(8)
            if len(message) != 8:
                break
            (flushed,) = struct.unpack("<Q", message)
        child.send_signal(signal.SIGKILL)
        child.wait()
        while len(message := acknowledged.read(8)) == 8:
            (flushed,) = struct.unpack("<Q", message)
    if child.returncode != -signal.SIGKILL:
        raise Problem(f"the writer ended by itself with status {child.returncode}")
    return flushed


def _release_leaks(path: Path) -> None:
    """Release what the killed writer had taken and not yet used; anything worse is a problem."""
    storage = FileStorage.open(path, writable=True)
    try:
        report = repair(storage, "leaks")
    finally:
        storage.close()
    if not report.clean:
        raise Problem(f"the image is not clean after a kill: {report!r}")


def kill_writer(demo: Demo) -> tuple[str, Figures]:
    """kill -9 in the middle of a load; nothing flushed may be lost."""
    path = demo.path("killed.qcow2")
    qcowlib.create(path, demo.size, cluster_size=4096)
    total = 0
    for flushes in (3, 20):
        flushed = _killed_load(path, flushes)
        demo.judge.check(path, allowed=(0, 3))
        _release_leaks(path)
        with qcowlib.open(path) as image:
            for number in range(flushed):
                if image.pread(BLOCK, _load_offset(number, image.size)) != _load_data(number):
                    raise Problem(f"flushed write {number} is lost")
        demo.judge.check(path)
        demo.guest_bytes += flushed * BLOCK
        total += flushed
    return f"2 kills, all {total} flushed writes are there, check is clean", {"kills": 2, "flushed-writes": total}


# -- hostile -------------------------------------------------------------------


def _header(*, backing: bytes = b"", l1_size: int = 1, incompatible: int = 0, extension: bytes = b"") -> bytes:
    """A qcow2 header as an attacker would write it."""
    head = struct.pack(
        ">4sIQIIQIIQQIIQQQQIIQ", b"QFI\xfb", 3, 0, 0, 16, 1 << 30, 0, l1_size, 3 << 16, 1 << 16, 1, 0, 0,
        incompatible, 0, 0, 4, 112, 0,
    )  # fmt: skip
    body = extension + bytes(8)
    if backing:
        head = head[:8] + struct.pack(">QI", 112 + len(body), len(backing)) + head[20:]
    return (head + body + backing).ljust(4 << 16, b"\0")


def _hostile_images(secret: Path) -> dict[str, bytes]:
    name = os.fsencode(secret)
    json_name = b'json:{"driver":"raw","file":{"driver":"host_device","filename":"%s"}}' % name
    data_file = struct.pack(">II", 0x44415441, len(name)) + name + bytes(-len(name) % 8)
    return {
        "a backing file of the host": _header(backing=name),
        "a device in json:": _header(backing=json_name),
        "a network backing file": _header(backing=b"nbd://203.0.113.1/disk"),
        "an external data file of the host": _header(incompatible=4, extension=data_file),
        "an L1 table of 32 GiB": _header(l1_size=0xFFFFFFFF),
        "an unknown incompatible feature": _header(incompatible=1 << 40),
    }


def _require_refusal(path: Path, what: str) -> None:
    if inspect(path).safe:
        raise Problem(f"inspect finds {what} safe")
    try:
        qcowlib.open(path, references=qcowlib.deny_all).close()
    except Error as error:
        if "\n" in str(error):
            raise Problem(f"{what}: more than one line") from error
    else:
        raise Problem(f"{what} was accepted")


def refuse_hostile(demo: Demo) -> tuple[str, Figures]:
    """Images from a stranger: refused by one line, and what they name is not opened."""
    secret = demo.path("secret")
    secret.write_text("for the owner only\n")
    opened: list[str] = []
    watching = [True]

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        if watching and event in ("open", "socket.connect", "subprocess.Popen"):
            opened.append(f"{event} {arguments[0]!r}")

    sys.addaudithook(watch)
    images = _hostile_images(secret)
    try:
        for what, content in images.items():
            path = demo.path("hostile.qcow2")
            path.write_bytes(content)
            _require_refusal(path, what)
    finally:
        watching.clear()
    touched = [event for event in opened if str(secret) in event or not event.startswith("open")]
    if touched:
        raise Problem(f"opened on behalf of a hostile image: {touched[0]}")
    return f"{len(images)} images refused, nothing they name was opened", {"refused": len(images)}


# -- back ----------------------------------------------------------------------


def back_to_raw(demo: Demo) -> tuple[str, Figures]:
    """Compressed qcow2 to raw: the bytes that the demo began with."""
    disk, back = demo.path("disk.raw"), demo.path("back.raw")
    started = time.monotonic()
    with demo.progress("convert") as report:
        qcowlib.convert(
            demo.path("small.qcow2"), back, source_format="qcow2", format="raw", cache="unsafe", progress=report
        )
    ours = time.monotonic() - started
    _same(demo, _hash(back), _hash(disk), "the raw image", demo.size)
    demo.judge.compare(disk, "raw", back, "raw")
    stored, before = back.stat().st_blocks * 512, disk.stat().st_blocks * 512
    text = f"every byte equal, {human_size(stored)} stored ({human_size(before)} before)"
    return text, {"seconds-ours": ours, "stored": stored}


STEPS = (
    Step("file system image from files of this machine", make_disk),
    Step("convert raw to qcow2", convert_plain),
    Step("convert with compression", convert_compressed),
    Step("info and extents", show_info),
    Step("thin overlays", thin_overlays),
    Step("chain of layers", layer_chain),
    Step("layers merged into one", merge_layers),
    Step("a file compacted in place", compact_image),
    Step("a difference as a stream, applied elsewhere", carry_difference),
    Step("silent damage found and mended", find_silent_damage),
    Step("what a damaged image still holds", salvage_damaged),
    Step("a picture of 1 TiB", draw_picture),
    Step("kill -9 in the middle of a write load", kill_writer),
    Step("images from strangers", refuse_hostile),
    Step("served over NBD", serve_disk),
    Step("out of an object store, by ranges", read_by_ranges),
    Step("back to raw", back_to_raw),
)
