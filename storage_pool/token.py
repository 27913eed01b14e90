# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""The right to change a domain, as an argument.

Invariant: S1, S2.  Every function that changes shared structures of a domain
takes a token and calls :meth:`SpmToken.check` before each write; who has no
token cannot call it, and who lost the lease is refused before the write.
Reading never needs one.  Implementations: the pool manager's (package
``spm``) and :mod:`.embedded` for one host.
"""

from __future__ import annotations

from typing import Protocol

__all__ = ["SpmToken"]


class SpmToken(Protocol):
    """Proof that its holder may change the domains of one pool, for now."""

    @property
    def epoch(self) -> int:
        """Number of the term; grows with each new holder."""

    def check(self) -> None:
        """Raise :class:`~storage_pool.errors.NotAuthorized` unless the right still holds."""
