# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""A storage engine for QCOW2 images and RHV/oVirt storage domains.

The public names are those of :mod:`qcowlib.api` and :mod:`qcowlib.errors`;
:mod:`qcowlib.aio` has the same for asyncio, :mod:`qcowlib.testing` is test
support for users.  Everything is imported when it is first used, so that
importing the package costs nothing.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qcowlib.api import *  # noqa: F403
    from qcowlib.errors import *  # noqa: F403

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    if not name.startswith("_"):
        from importlib import import_module

        for module in ("qcowlib.errors", "qcowlib.api"):
            source = import_module(module)
            if name in source.__all__:
                value: object = getattr(source, name)
                globals()[name] = value
                return value
    raise AttributeError(f"module 'qcowlib' has no attribute {name!r}")


def __dir__() -> list[str]:
    from qcowlib import api, errors

    return sorted([*globals(), *api.__all__, *errors.__all__])
