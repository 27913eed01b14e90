# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Chains as trees: which image stands on which, how large each is, how many share it.

Invariant: headers are read and nothing else, once for each file; what an image
names is opened by the policy alone; a loop, a missing or a refused base is a
line of the answer and never ends the look at the others.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import closing
from typing import TYPE_CHECKING, Final, NamedTuple

from qcowlib.chain import MAX_DEPTH
from qcowlib.errors import Error, UsageError, printable
from qcowlib.gate import References, parse_name, qemu_like, resolve_name
from qcowlib.info import allocated_bytes
from qcowlib.ondisk.header import is_qcow2
from qcowlib.qcow2.directories import read_header
from qcowlib.storage.base import Storage
from qcowlib.storage.file import FileStorage
from qcowlib.units import human_size

if TYPE_CHECKING:
    from qcowlib.info import Json

__all__ = ["ChainNode", "ChainTree", "chain_tree"]

_MAX_NODES: Final = 1 << 20
_MAGIC: Final = 512


class ChainNode(NamedTuple):
    """One image; sizes in bytes, ``None`` where they are not known.

    ``backing`` is the key of the image it stands on; *problem* says what is
    wrong with it or with its place in a chain.
    """

    name: str
    format: str | None
    virtual_size: int | None
    disk_size: int | None
    backing: str | None
    snapshots: int = 0
    problem: str | None = None


class ChainTree(NamedTuple):
    """All images found, by key (the real path); *overlays* stand on a key, *roots* on nothing."""

    nodes: dict[str, ChainNode]
    overlays: dict[str, tuple[str, ...]]
    roots: tuple[str, ...]

    def walk(self) -> Iterator[tuple[str, int, bool]]:
        """Yield each key in the order of the drawing, its depth, and whether it is the last of its siblings."""
        stack = [(key, 0, True) for key in reversed(self.roots)]
        while stack:
            key, depth, last = stack.pop()
            yield key, depth, last
            below = self.overlays.get(key, ())
            stack += [(child, depth + 1, child == below[-1]) for child in reversed(below)]

    def lines(self) -> Iterator[str]:
        """Yield the drawing, a line an image."""
        rails: list[str] = []
        for key, depth, last in self.walk():
            del rails[depth:]
            branch = "" if depth == 0 else "└── " if last else "├── "
            yield f"{''.join(rails[1:])[-4 * MAX_DEPTH :]}{branch}{self._text(key)}"
            rails.append("    " if last else "│   ")

    def _text(self, key: str) -> str:
        node = self.nodes[key]
        words = []
        if node.format is not None:
            words.append(node.format)
        if node.virtual_size is not None:
            words.append(f"{human_size(node.virtual_size)} virtual")
        if node.disk_size is not None:
            words.append(f"{human_size(node.disk_size)} on disk")
        if node.snapshots:
            words.append(f"{node.snapshots} snapshot{'s' * (node.snapshots > 1)}")
        shared = len(self.overlays.get(key, ()))
        if shared > 1:
            words.append(f"shared by {shared}")
        if node.problem is not None:
            words.append(printable(node.problem))
        return f"{printable(node.name)}  {', '.join(words)}"

    def to_dict(self) -> list[dict[str, Json]]:
        """Return the images as JSON takes them, in the order of the drawing."""
        return [
            {
                "filename": self.nodes[key].name,
                "depth": depth,
                "format": self.nodes[key].format,
                "virtual-size": self.nodes[key].virtual_size,
                "actual-size": self.nodes[key].disk_size,
                "backing": None if (base := self.nodes[key].backing) is None else self.nodes[base].name,
                "overlays": [self.nodes[child].name for child in self.overlays.get(key, ())],
                "snapshots": self.nodes[key].snapshots,
                "problem": self.nodes[key].problem,
            }
            for key, depth, _ in self.walk()
        ]


def chain_tree(paths: Iterable[str | os.PathLike[str]], *, references: References = qemu_like) -> ChainTree:
    """Return the chains of *paths*, images or folders, of which every qcow2 image is looked at.

    Raises: StorageError for a path that cannot be opened; UsageError over 2^20 images.
    """
    look = _Look(references)
    for path in [os.fspath(path) for path in paths]:
        if os.path.isdir(path):  # noqa: PTH112
            look.folder(path)
        else:
            look.image(path)
    return look.tree()


class _Look:
    def __init__(self, references: References) -> None:
        self._references = references
        self._nodes: dict[str, ChainNode] = {}

    def folder(self, path: str) -> None:
        with os.scandir(path) as entries:
            names = sorted(entry.name for entry in entries if entry.is_file())
        if path != ".":
            names = [os.path.join(path, name) for name in names]
        for name in names:
            try:
                with closing(FileStorage.open(name)) as storage:
                    head = bytearray(min(_MAGIC, storage.size))
                    storage.read_into(0, [head])
                    found = is_qcow2(bytes(head))
            except Error:
                continue
            if found:
                self.image(name)

    def image(self, path: str) -> None:
        """Look at the image in *path* and at what it stands on."""
        key = os.path.realpath(path)
        if key not in self._nodes:
            self._follow(key, path, FileStorage.open(path), None)

    def _follow(self, key: str, name: str, storage: Storage, fmt: str | None) -> None:
        """Add the image in *storage*, then its base, and so on."""
        while True:
            if len(self._nodes) >= _MAX_NODES:
                storage.close()
                raise UsageError(f"more than {_MAX_NODES} images", path=name)
            with closing(storage):
                node, base = self._node(name, storage, fmt)
            self._nodes[key] = node
            if base is None:
                return
            base_path, fmt = base
            base_key = os.path.realpath(base_path)
            self._nodes[key] = node._replace(backing=base_key)
            if base_key in self._nodes:
                return
            try:
                storage = self._references.open("backing", base_path, ".", writable=False, cache="writeback")
            except Error as error:
                self._nodes[base_key] = ChainNode(base_path, None, None, None, None, problem=error.message)
                return
            key, name = base_key, base_path

    @staticmethod
    def _node(name: str, storage: Storage, fmt: str | None) -> tuple[ChainNode, tuple[str, str | None] | None]:
        """Return what *storage* holds, and path and format of the base it names."""
        disk = allocated_bytes(storage)
        head = bytearray(min(_MAGIC, storage.size))
        storage.read_into(0, [head])
        if fmt == "raw" or (fmt is None and not is_qcow2(bytes(head))):
            return ChainNode(name, "raw", storage.size, disk, None), None
        try:
            header = read_header(storage)
            node = ChainNode(name, "qcow2", header.size, disk, None, header.nb_snapshots)
            if header.backing_file is None:
                return node, None
            stored = parse_name(header.backing_file.decode("utf-8", "surrogateescape"), owner=name)
        except Error as error:
            return ChainNode(name, "qcow2", None, disk, None, problem=error.message), None
        said = header.backing_format
        return node, (resolve_name("backing", stored.path, name), stored.format or (said.decode() if said else None))

    def tree(self) -> ChainTree:
        overlays: dict[str, list[str]] = {}
        for key, node in self._nodes.items():
            if node.backing is not None:
                overlays.setdefault(node.backing, []).append(key)
        result = ChainTree(
            self._nodes,
            {key: tuple(sorted(children, key=self._order)) for key, children in overlays.items()},
            tuple(sorted((key for key, node in self._nodes.items() if node.backing is None), key=self._order)),
        )
        seen = {key for key, *_ in result.walk()}
        # What no root leads to stands on a loop: cut each at its first image.
        loops = []
        for key in self._nodes:
            if key not in seen:
                loops.append(self._cut(key, result.overlays))
                seen.update(k for k, *_ in ChainTree(self._nodes, result.overlays, (loops[-1],)).walk())
        return result._replace(roots=result.roots + tuple(loops))

    def _cut(self, key: str, overlays: dict[str, tuple[str, ...]]) -> str:
        """Take the loop below *key* apart; returns the image that stands on nothing from now on."""
        visited: set[str] = set()
        while key not in visited:
            visited.add(key)
            key = self._nodes[key].backing or key
        base = self._nodes[key].backing or key
        overlays[base] = tuple(child for child in overlays[base] if child != key)
        self._nodes[key] = self._nodes[key]._replace(
            backing=None, problem=f"stands on {self._nodes[base].name}, which stands on it: a loop"
        )
        return key

    def _order(self, key: str) -> str:
        return self._nodes[key].name
