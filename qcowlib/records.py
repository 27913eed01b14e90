# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Named tuples for modules on the start-up path of the command line.

``import typing`` costs as much as all of Python's own start.  A module there
writes::

    TYPE_CHECKING = False
    if TYPE_CHECKING:
        from typing import NamedTuple
    else:
        from qcowlib.records import NamedTuple

and type checkers see the real one.  Invariant: what a class gets here is a
:func:`collections.namedtuple` with the same fields, defaults and methods.
"""

from __future__ import annotations

from collections import namedtuple

__all__ = ["NamedTuple"]

_OWN = frozenset(("__annotations__", "__module__", "__qualname__"))


class _Record(type):
    def __new__(mcs, name: str, bases: tuple[type, ...], body: dict[str, object]) -> type:
        annotations = body.get("__annotations__", {})
        fields = tuple(annotations) if isinstance(annotations, dict) else ()
        defaults = [body.pop(field) for field in fields if field in body]
        made = namedtuple(name, fields, defaults=defaults, module=str(body["__module__"]))  # type: ignore[misc]
        for key, value in body.items():
            if key not in _OWN:
                setattr(made, key, value)
        return made


#: Base of a record class; use it as ``typing.NamedTuple``.
NamedTuple = type.__new__(_Record, "NamedTuple", (), {})
