# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""``chain``: which image stands on which, as a tree.

Invariant: headers are read and nothing is locked, so images in use are shown too.
"""

from __future__ import annotations

from qcowlib.cli import options
from qcowlib.cli.console import Console, usage_failure
from qcowlib.cli.jsonout import pretty
from qcowlib.cli.opening import references
from qcowlib.cli.parser import Args, Command

__all__ = ["COMMAND", "run"]

COMMAND = Command(
    "chain",
    "Draw chains of images, or all of a folder, as a tree.",
    "FILE|DIR...",
    (options.HELP, options.OUTPUT),
    "chain base.qcow2 disk.qcow2",
)


def run(args: Args, console: Console) -> int:
    """Run ``chain``; 1 if something is wrong with one of the chains."""
    from qcowlib.picture.tree import chain_tree

    if not args.operands:
        raise usage_failure("Expecting at least one image file name or folder")
    tree = chain_tree(args.operands, references=references())
    if options.wants_json(args):
        console.out(pretty(tree.to_dict()))
    else:
        console.out("".join(f"{line}\n" for line in tree.lines()))
    return int(any(node.problem is not None for node in tree.nodes.values()))
