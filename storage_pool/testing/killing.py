# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""A domain whose user dies at the n-th change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from storage_pool.domain import Domain

__all__ = ["Killed", "KillingDomain"]

_CHANGES = frozenset(
    {
        "abandon",
        "allocate",
        "change",
        "extend",
        "mark_removed",
        "publish",
        "purge",
        "reduce",
        "set_note",
        "set_parent_hint",
        "set_writable",
        "share",
        "sweep",
        "write_record",
    }
)


class Killed(BaseException):
    """The process is gone; nothing more of it reaches the domain."""


class KillingDomain:
    """Passes everything to *inner* until change number *at* (from 0), which is not done, nor is any later.

    ``changes`` counts; bytes written through opened volumes before the death stay.
    """

    def __init__(self, inner: Domain, at: int | None = None) -> None:
        self._inner = inner
        self._at = at
        self.changes = 0

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._inner, name)
        return self._counted(value) if name in _CHANGES else self._opening(value) if name == "open_volume" else value

    def _counted(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def change(*arguments: Any, **options: Any) -> Any:
            number, self.changes = self.changes, self.changes + 1
            if self._at is not None and number >= self._at:
                raise Killed
            return call(*arguments, **options)

        return change

    def _opening(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def open_volume(volume: str, *, writable: bool = False) -> Any:
            # Opening for writing is a step too: what follows writes bytes.
            return self._counted(call)(volume, writable=True) if writable else call(volume)

        return open_volume
