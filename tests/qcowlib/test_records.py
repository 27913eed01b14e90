# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Records behave as typing's named tuples."""

from __future__ import annotations

import typing

import pytest

from qcowlib import records


def make(base: type) -> type:
    class Point(base):  # type: ignore[valid-type,misc]
        """A point."""

        x: int
        y: int = 2

        @property
        def total(self) -> int:
            return self.x + self.y

        @classmethod
        def origin(cls) -> object:
            return cls(0, 0)

    return Point


def test_a_record_is_what_typing_makes() -> None:
    # mypy sees one class, the runtime two.
    for base in (records.NamedTuple, typing.NamedTuple):
        point = make(base)(3)  # type: ignore[arg-type]
        assert point == (3, 2)
        assert repr(point) == "Point(x=3, y=2)"
        assert (point.x, point.total, point._fields, point._replace(y=5)) == (3, 5, ("x", "y"), (3, 5))
        assert (type(point).__doc__, type(point).__module__) == ("A point.", __name__)
        assert type(point).origin() == (0, 0)
        with pytest.raises(TypeError):
            type(point)()
