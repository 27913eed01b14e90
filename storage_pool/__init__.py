# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Storage domains, volumes, templates and snapshots of RHV/oVirt.

:func:`connect` gives one object for all of it; the modules below it may be
used alone.  Everything is imported when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from storage_pool.engine import Engine, EnginePool, connect
    from storage_pool.handles import Disk, EngineDomain

__all__ = ["Disk", "Engine", "EngineDomain", "EnginePool", "connect"]

_MODULES = {
    "Disk": "handles",
    "Engine": "engine",
    "EngineDomain": "handles",
    "EnginePool": "engine",
    "connect": "engine",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module 'storage_pool' has no attribute {name!r}")
    from importlib import import_module

    value: object = getattr(import_module(f"storage_pool.{_MODULES[name]}"), name)
    globals()[name] = value
    return value
