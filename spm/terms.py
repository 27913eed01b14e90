# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""The pool's record of its manager, in the keys of the master domain.

``POOL_SPM_LVER`` holds the epoch (as hosts of oVirt do, one more for each
term), ``POOL_SPM_ID`` the host; ``SPM_LEASE_VERSION`` is our own key, which
others keep without reading it.

Invariant: S2.  Read anew each time; a record with a smaller epoch is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from .errors import LeaseLost
from .service import PoolRecord

if TYPE_CHECKING:
    from storage_pool.domain import Domain
    from storage_pool.token import SpmToken

__all__ = ["MasterTerms"]

_LEASE_VERSION: Final = "SPM_LEASE_VERSION"


class MasterTerms:
    """A :class:`~spm.service.Terms` on the master domain that *open_master* opens, for each call anew."""

    def __init__(self, open_master: Callable[[], Domain]) -> None:
        self._open = open_master

    @staticmethod
    def _record(master: Domain) -> PoolRecord:
        view = master.metadata
        version = view.raw.get(_LEASE_VERSION, "")
        return PoolRecord(view.spm_lver, view.spm_id, int(version) if version.isdecimal() and version.isascii() else 0)

    def read(self) -> PoolRecord:
        """See :class:`~spm.service.Terms`."""
        master = self._open()
        try:
            return self._record(master)
        finally:
            master.close()

    def write(self, token: SpmToken, record: PoolRecord) -> None:
        """See :class:`~spm.service.Terms`.  Raises: LeaseLost when a later term is stored."""
        master = self._open()
        try:
            stored = self._record(master)
            if stored.epoch > record.epoch:
                raise LeaseLost(f"the pool is at epoch {stored.epoch}, this term is {record.epoch}")
            master.change(
                token,
                {
                    "POOL_SPM_LVER": str(record.epoch),
                    "POOL_SPM_ID": str(record.host_id),
                    _LEASE_VERSION: str(record.lease_version),
                },
            )
        finally:
            master.close()

    def master_version(self) -> int:
        """See :class:`~spm.service.Terms`."""
        master = self._open()
        try:
            return master.metadata.version
        finally:
            master.close()
