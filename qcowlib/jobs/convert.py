# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Copying images into a new or an existing one, as ``qemu-img convert`` does.

The maps of the sources give the plan (:mod:`.plan`), workers carry it out
(:mod:`.copy`), the target takes what they bring (:mod:`.targets`).

Invariants: a new image has no magic until all of it is durable (I11), and is
removed if the job fails; its bytes do not depend on the number of workers;
what is known to be zero is neither read nor written.

What :func:`convert` can be told:

=============== ==============================================================
snapshot        copy this internal snapshot (id or name), not the active state
backing         the target's backing file, stored as given; what the source's top
                layer does not hold stays unallocated
compress        compress clusters, with *level* ``fast`` or ``small``
sparse_size     zeros from this many bytes on are not stored (default 4 KiB; 0:
                everything is written)
existing        the target is there and large enough; with *target_is_zero* it
                reads as zeros
copy_offload    let the kernel copy; nobody looks for zeros in data then
out_of_order    only allows what this engine never needs for speed
salvage         called with ``(offset, error)`` for each sector that cannot be read
                and becomes zeros, and, the error's operation being ``block-status``, for
                one that is only read because nothing else tells what it holds
cache           of the target; with ``unsafe`` it is not made durable
=============== ==============================================================
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Final, NamedTuple, cast

from qcowlib.errors import Error, UsageError, printable
from qcowlib.gate import References, qemu_like
from qcowlib.image import Image
from qcowlib.image import open as open_image
from qcowlib.jobs.copy import Copier
from qcowlib.jobs.creation import Format, file_options, new_data_file, new_storage, open_backing
from qcowlib.jobs.held import HeldMagic
from qcowlib.jobs.pipeline import DEFAULT_MEMORY, Control, run
from qcowlib.jobs.plan import Plan, Source
from qcowlib.jobs.targets import BuildTarget, ImageTarget, RawTarget
from qcowlib.jobs.targets import Target as Sink
from qcowlib.qcow2.create import CreateOptions, create_raw, new_header
from qcowlib.qcow2.create import create as create_qcow2
from qcowlib.qcow2.image import Qcow2Image
from qcowlib.raw import RawImage
from qcowlib.units import KiB, MiB

if TYPE_CHECKING:
    from qcowlib.codec import Codec, Level
    from qcowlib.image import CacheMode
    from qcowlib.ondisk import Header
    from qcowlib.opening import Secrets
    from qcowlib.opening import Source as OpenSource
    from qcowlib.storage.base import Storage

    SourceOrImage = OpenSource | Image

__all__ = ["DEFAULT_SPARSE", "Job", "convert", "into_new"]

DEFAULT_SPARSE: Final = 4 * KiB
_MAX_SPARSE: Final = 16 * MiB


class Job(NamedTuple):
    """What the caller asked for, checked."""

    sources: list[Source]
    sparse: int
    compress: bool
    level: Level
    top_only: bool
    backing_end: int
    offload: bool
    salvage: Callable[[int, Error], object] | None
    control: Control

    @property
    def size(self) -> int:
        """Bytes of the target."""
        return self.sources[-1].end


def convert(
    source: SourceOrImage | Sequence[SourceOrImage],
    target: str | bytes | os.PathLike[str] | Storage | Image,
    *,
    format: Format = "qcow2",
    source_format: str | None = None,
    snapshot: str | None = None,
    backing: str | os.PathLike[str] | None = None,
    backing_format: str | None = None,
    compress: bool = False,
    level: Level = "fast",
    sparse_size: int | None = None,
    existing: bool = False,
    target_is_zero: bool = False,
    copy_offload: bool = False,
    out_of_order: bool = False,
    salvage: Callable[[int, Error], object] | None = None,
    references: References = qemu_like,
    source_cache: CacheMode = "writeback",
    cache: CacheMode = "writeback",
    force_share: bool = False,
    secret: Secrets | None = None,
    target_secret: Secrets | None = None,
    progress: Callable[[int, int], object] | None = None,
    cancel: Callable[[], bool] | None = None,
    rate: int | None = None,
    workers: int | None = None,
    memory: int = DEFAULT_MEMORY,
    **options: object,
) -> None:
    """Copy *source*, or several one behind the other, into *target*.

    Sources and target are names, storages or open images; images stay open.
    The module's text explains the arguments, *options* are
    :class:`~qcowlib.jobs.creation.NewOptions` of a new target, the last five
    arguments those of :class:`~qcowlib.jobs.pipeline.Control`.

    Raises: UsageError before anything is changed; Cancelled; any error of
    opening; StorageError and CorruptImage that tell the target offset.
    """
    control = Control(progress=progress, cancel=cancel, rate=rate, workers=workers, memory=memory)
    base = None if backing is None else os.fspath(backing)
    _check_usage(format, compress, sparse_size, existing, target_is_zero, copy_offload, salvage is not None, options)
    many = list(source) if isinstance(source, list | tuple) else [cast("SourceOrImage", source)]
    _check_sources(len(many), base, backing_format, snapshot, existing or isinstance(target, Image))
    sparse = DEFAULT_SPARSE if sparse_size is None else sparse_size
    with ExitStack() as stack:
        sources: list[Source] = []
        for one in many:
            image = one if isinstance(one, Image) else open_image(
                one, format=source_format, snapshot=snapshot, references=references, cache=source_cache,
                force_share=force_share, secret=secret,
            )  # fmt: skip
            if image is not one:
                stack.callback(image.close)
            sources.append(Source(image, sources[-1].end if sources else 0))
        job = Job(sources, sparse, compress, level, base is not None, 0, copy_offload, salvage, control)
        if not existing and not isinstance(target, Image):
            into_new(job, target, format, base, backing_format, cache, references, options, target_secret)
            return
        if not isinstance(target, Image):
            target = open_image(target, "r+", format=format, references=references, cache=cache, secret=target_secret)
            stack.callback(target.close)
        _into_image(job, target, target_is_zero)


def _check_sources(
    count: int, backing: str | None, backing_format: str | None, snapshot: str | None, existing: bool
) -> None:
    if backing is not None and backing_format is None and not existing:
        raise UsageError("Use of backing file requires explicit backing format")
    if not count:
        raise UsageError("Must specify image file name")
    if count > 1 and backing is not None:
        raise UsageError("Having a backing file for the target makes no sense when concatenating multiple input images")
    if count > 1 and snapshot is not None:
        raise UsageError("No support for concatenating multiple snapshot")


def _check_usage(
    format: str,
    compress: bool,
    sparse_size: int | None,
    existing: bool,
    target_is_zero: bool,
    offload: bool,
    salvage: bool,
    options: dict[str, object],
) -> None:
    sparse = sparse_size or 0
    rules = (
        (format not in ("qcow2", "raw"), f"Unknown file format '{printable(format)}'"),
        (
            sparse < 0 or sparse % 512 or sparse > _MAX_SPARSE,
            "Invalid buffer size for sparse output specified. Valid sizes are multiples of 512 up to "
            f"{_MAX_SPARSE}. Select 0 to disable sparse detection (fully allocates output).",
        ),
        (offload and compress, "Cannot enable copy offloading when -c is used"),
        (offload and sparse_size is not None, "Cannot enable copy offloading when -S is used"),
        (offload and salvage, "Cannot use copy offloading in salvaging mode"),
        (target_is_zero and not existing, "--target-is-zero requires use of -n flag"),
        (compress and format == "raw", "Compression not supported for this file format"),
        (
            compress and options.get("encrypt") is not None,
            "Compression and encryption not supported at the same time",
        ),
        (
            compress and options.get("preallocation", "off") != "off",
            "Compression and preallocation not supported at the same time",
        ),
    )
    for broken, message in rules:
        if broken:
            raise UsageError(message)


# -- targets -------------------------------------------------------------------


def _into_image(job: Job, image: Image, is_zero: bool) -> None:
    if image.size < job.size:
        raise UsageError("output file is smaller than input file", path=image.path)
    if is_zero and len(image.layers) > 1:
        raise UsageError("Cannot use --target-is-zero when the destination image has a backing file", path=image.path)
    if job.compress and image.format != "qcow2":
        raise UsageError("Compression not supported for this file format", path=image.path)
    top = image.layers[0]
    target: Sink = RawTarget(top.data) if isinstance(top, RawImage) and top.plain else ImageTarget(image)
    header = top.header if isinstance(top, Qcow2Image) else None
    _copy(job, target, header, zeroed=is_zero)


def into_new(
    job: Job,
    target: str | bytes | os.PathLike[str] | Storage,
    format: str,
    backing: str | None,
    backing_format: str | None,
    cache: CacheMode,
    references: References,
    options: dict[str, object],
    secret: Secrets | None = None,
) -> None:
    """Create *target* and carry out *job*; arguments as :func:`convert`."""
    name = os.fsdecode(target) if isinstance(target, str | bytes | os.PathLike) else target.name
    if format == "raw" and backing is not None:
        raise UsageError("Backing file not supported for file format 'raw'", path=name)
    described = file_options(options, job.size, backing=backing, backing_format=backing_format)
    if format == "raw":
        with new_storage(target, cache) as storage:
            create_raw(storage, job.size, preallocation=described.preallocation)
            zeroed = not getattr(storage, "is_block", False)
            _copy(job, RawTarget(storage), None, zeroed=zeroed)
        return
    new_header(described)
    if backing is not None:
        job = job._replace(backing_end=open_backing(backing, backing_format, name, references))
    data_name = None if described.data_file is None else os.fsdecode(described.data_file)
    with new_storage(target, cache) as storage, new_data_file(data_name, cache) as data:
        # Over a backing file the builder knows whole clusters only.
        plain = backing is None or job.compress or (described.version > 2 and not described.extended_l2)
        if plain and described.preallocation == "off" and described.encrypt is None:
            _build(job, storage, described, data)
        else:
            _fill(job, storage, described, data, references, secret)


def _build(job: Job, storage: Storage, described: CreateOptions, data: Storage | None) -> None:
    header = new_header(described)
    zeroed = not getattr(data if data is not None else storage, "is_block", False)
    if data is not None:
        data.resize(job.size)
    target = BuildTarget(storage, header, data=data, zeroed=zeroed)
    _copy(job, target, header, zeroed=described.backing_file is None)


def _fill(
    job: Job,
    storage: Storage,
    described: CreateOptions,
    data: Storage | None,
    references: References,
    secret: Secrets | None,
) -> None:
    """Create the image, its magic held back, and write into it as a guest would; *secret* unlocks it."""
    held = HeldMagic(storage)
    header = create_qcow2(held, described, data=data)
    image = open_image(held, "r+", format="qcow2", references=references, data_file=data, lock=False, secret=secret)
    try:
        _copy(job, ImageTarget(image), header, zeroed=described.backing_file is None)
    finally:
        image.close()
    # Invariant: I11
    held.release()


def _copy(job: Job, target: Sink, header: Header | None, *, zeroed: bool) -> None:
    """Carry out the job; *header* is that of a QCOW2 target."""
    built = isinstance(target, BuildTarget)
    compress = job.compress and header is not None
    cluster = header.cluster_size if header is not None and (compress or (built and job.top_only)) else 0
    codec: Codec | None = None
    packs: int | None = None
    if compress and built and header is not None:
        from qcowlib.codec import Codec

        packs = header.compression_type
        codec = Codec(packs, cluster)
    # Source: qemu takes -S 0 as: nothing reads as zeros by itself.
    keep_zeros = not zeroed or not job.sparse
    plan = Plan(
        job.sources,
        unit=job.sparse,
        cluster=cluster,
        single=compress,
        keep_zeros=keep_zeros,
        codec=packs,
        top_only=job.top_only,
        backing_end=job.backing_end,
        salvage=job.salvage,
    )
    copier = Copier(
        target,
        unit=job.sparse,
        keep_zeros=keep_zeros,
        cluster=cluster,
        compress=compress,
        codec=codec,
        level=job.level,
        salvage=job.salvage,
        offload=target.data if job.offload and isinstance(target, BuildTarget | RawTarget) else None,
    )
    control = job.control
    control.begin(plan.amount() if control.wanted else plan.total)
    run(plan.units(), copier.work, control, buffer_size=plan.buffer, amount=control.total, ordered=target.ordered)
    target.finish()
    control.end()
