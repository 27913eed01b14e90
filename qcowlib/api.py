# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""The synchronous facade: everything that ``import qcowlib`` gives.

Invariant: names only.  What they do is in the module each comes from; the
module of a job is imported when the job is first asked for.
"""

from __future__ import annotations

from qcowlib.gate import deny_all, directories, qemu_like, same_directory
from qcowlib.image import Image, open

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qcowlib.driver import Bitmap, Extent, Snapshot
    from qcowlib.info import ImageInfo
    from qcowlib.inspection import Inspection, inspect
    from qcowlib.jobs.backup import RestorePlan, backup, measure_backup, plan_restore, restore
    from qcowlib.jobs.backup_set import DiskBackup, DiskRestore, backup_set, finish_set, restore_set
    from qcowlib.jobs.commit import commit
    from qcowlib.jobs.compact import CompactPlan, compact, plan_compact
    from qcowlib.jobs.compare import Comparison, compare
    from qcowlib.jobs.convert import convert
    from qcowlib.jobs.creation import create
    from qcowlib.jobs.dd import dd
    from qcowlib.jobs.diff import Change, diff, diff_overlay
    from qcowlib.jobs.diff_stream import Applied, apply, read_diff, write_diff
    from qcowlib.jobs.many import Outcome, OverlaysPlan, create_overlays, images_in, many, plan_overlays
    from qcowlib.jobs.measure import Measurement, measure
    from qcowlib.jobs.merge import merge, plan_merge
    from qcowlib.jobs.merge_plan import MergePlan, MergeSource
    from qcowlib.jobs.rebase import flatten, rebase
    from qcowlib.jobs.salvage import Lost, Salvaged, salvage
    from qcowlib.jobs.seal import Damage, Sealed, Verified, diff_seals, heal, plan_seal, plan_verify, seal, verify
    from qcowlib.luks import KeyChange
    from qcowlib.nbd.export import Export
    from qcowlib.nbd.server import NbdServer, serve
    from qcowlib.picture.panels import Panel, Picture
    from qcowlib.picture.survey import survey
    from qcowlib.picture.tree import ChainTree, chain_tree
    from qcowlib.qcow2.amend import AmendOptions
    from qcowlib.qcow2.check import Report

__all__ = [
    "AmendOptions",
    "Applied",
    "Bitmap",
    "ChainTree",
    "Change",
    "CompactPlan",
    "Comparison",
    "Damage",
    "DiskBackup",
    "DiskRestore",
    "Export",
    "Extent",
    "Image",
    "ImageInfo",
    "Inspection",
    "KeyChange",
    "Lost",
    "Measurement",
    "MergePlan",
    "MergeSource",
    "NbdServer",
    "Outcome",
    "OverlaysPlan",
    "Panel",
    "Picture",
    "Report",
    "RestorePlan",
    "Salvaged",
    "Sealed",
    "Snapshot",
    "Verified",
    "apply",
    "backup",
    "backup_set",
    "chain_tree",
    "commit",
    "compact",
    "compare",
    "convert",
    "create",
    "create_overlays",
    "dd",
    "deny_all",
    "diff",
    "diff_overlay",
    "diff_seals",
    "directories",
    "finish_set",
    "flatten",
    "heal",
    "images_in",
    "inspect",
    "many",
    "measure",
    "measure_backup",
    "merge",
    "open",
    "plan_compact",
    "plan_merge",
    "plan_overlays",
    "plan_restore",
    "plan_seal",
    "plan_verify",
    "qemu_like",
    "read_diff",
    "rebase",
    "restore",
    "restore_set",
    "salvage",
    "same_directory",
    "seal",
    "serve",
    "survey",
    "verify",
    "write_diff",
]

_LATER = {
    "AmendOptions": "qcow2.amend",
    "Applied": "jobs.diff_stream",
    "Bitmap": "driver",
    "ChainTree": "picture.tree",
    "Change": "jobs.diff",
    "CompactPlan": "jobs.compact",
    "Comparison": "jobs.compare",
    "Damage": "jobs.seal",
    "DiskBackup": "jobs.backup_set",
    "DiskRestore": "jobs.backup_set",
    "Export": "nbd.export",
    "Extent": "driver",
    "ImageInfo": "info",
    "Inspection": "inspection",
    "KeyChange": "luks",
    "Lost": "jobs.salvage",
    "Measurement": "jobs.measure",
    "MergePlan": "jobs.merge_plan",
    "MergeSource": "jobs.merge_plan",
    "NbdServer": "nbd.server",
    "Outcome": "jobs.many",
    "OverlaysPlan": "jobs.many",
    "Panel": "picture.panels",
    "Picture": "picture.panels",
    "Report": "qcow2.check",
    "RestorePlan": "jobs.backup",
    "Salvaged": "jobs.salvage",
    "Sealed": "jobs.seal",
    "Snapshot": "driver",
    "Verified": "jobs.seal",
    "apply": "jobs.diff_stream",
    "backup": "jobs.backup",
    "backup_set": "jobs.backup_set",
    "chain_tree": "picture.tree",
    "commit": "jobs.commit",
    "compact": "jobs.compact",
    "compare": "jobs.compare",
    "convert": "jobs.convert",
    "create": "jobs.creation",
    "create_overlays": "jobs.many",
    "dd": "jobs.dd",
    "diff": "jobs.diff",
    "diff_overlay": "jobs.diff",
    "diff_seals": "jobs.seal",
    "finish_set": "jobs.backup_set",
    "flatten": "jobs.rebase",
    "heal": "jobs.seal",
    "images_in": "jobs.many",
    "inspect": "inspection",
    "many": "jobs.many",
    "measure": "jobs.measure",
    "measure_backup": "jobs.backup",
    "merge": "jobs.merge",
    "plan_compact": "jobs.compact",
    "plan_merge": "jobs.merge",
    "plan_overlays": "jobs.many",
    "plan_restore": "jobs.backup",
    "plan_seal": "jobs.seal",
    "plan_verify": "jobs.seal",
    "read_diff": "jobs.diff_stream",
    "rebase": "jobs.rebase",
    "restore": "jobs.backup",
    "restore_set": "jobs.backup_set",
    "salvage": "jobs.salvage",
    "seal": "jobs.seal",
    "serve": "nbd.server",
    "survey": "picture.survey",
    "verify": "jobs.seal",
    "write_diff": "jobs.diff_stream",
}


def __getattr__(name: str) -> object:
    module = _LATER.get(name)
    if module is None:
        raise AttributeError(f"module 'qcowlib.api' has no attribute {name!r}")
    from importlib import import_module

    value: object = getattr(import_module(f"qcowlib.{module}"), name)
    globals()[name] = value
    return value
