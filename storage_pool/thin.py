# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""When a thin volume must grow, and to what size.

Invariant: S3; pure arithmetic, the answer is an absolute size, so asking
twice equals asking once.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from qcowlib.units import MiB, round_up

from .sizes import CHUNK, with_overhead

__all__ = ["ThinPolicy", "thin_max_size"]

#: The share of a chunk that may be used before the next one is asked for.
UTILIZATION_PERCENT: Final = 20


def thin_max_size(capacity: int) -> int:
    """Return the size, whole MiB, at which a thin volume of *capacity* stops growing."""
    return round_up(with_overhead(capacity), MiB)


class ThinPolicy(NamedTuple):
    """Growth in chunks: *chunk* bytes when less than ``limit`` bytes are left.

    While a disk is replicated to another domain both double, for writes then
    arrive faster than they are watched.
    """

    chunk: int = CHUNK
    percent: int = UTILIZATION_PERCENT

    def replicating(self) -> ThinPolicy:
        """Return the policy for a disk under replication."""
        return ThinPolicy(self.chunk * 2, self.percent)

    @property
    def limit(self) -> int:
        """Free bytes below which the volume must grow."""
        return (100 - self.percent) * self.chunk // 100

    def threshold(self, size: int) -> int:
        """Return the offset whose being written asks for growth, at least 1."""
        return max(1, size - self.limit)

    def next_size(self, size: int, capacity: int) -> int:
        """Return the size to ask for; LVM then rounds it up to extents."""
        return min(round_up(size + self.chunk, MiB), thin_max_size(capacity))

    def needs_growth(self, size: int, allocation: int, capacity: int) -> bool:
        """Whether a volume of *size*, written up to *allocation*, must grow now."""
        return size < thin_max_size(capacity) and size - allocation < self.limit

    def is_faulty(self, size: int, allocation: int, capacity: int) -> bool:
        """Whether the reported allocation cannot be true, so that nothing must grow by it."""
        return allocation > self.next_size(size, capacity)
