# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""The safety rules, each of which can be taken away.

A simulation that finds nothing proves nothing unless it finds something when
a rule is missing.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["CAUGHT_BY", "RULES", "History", "Rules"]


class Rules(NamedTuple):
    """All rules hold by default."""

    #: A token ends before the lease can be another's, whatever the daemon says.
    deadline: bool = True
    #: The clock goes on while the host is paused.
    boot_clock: bool = True
    #: The holder asks storage at all.
    recheck: bool = True
    #: A holder whose daemon went away has lost.
    connection: bool = True
    #: A lease that is free too early is not used before old writes have landed.
    settle: bool = True
    #: A term is max(stored, own) + 1, not the version of the lease.
    own_epoch: bool = True
    #: The lease decides; a host that does not answer is not dead.
    arbitration: bool = True
    #: A dead host's lease is taken after death, not after the renewal limit.
    wait_for_death: bool = True
    #: Helper programs end before the deadline and with their parent.
    bound_children: bool = True
    #: The lease is given back after the last change, not before.
    release_last: bool = True
    #: A new term reads the metadata again.
    read_again: bool = True
    #: A task is recorded before its first change.
    record_first: bool = True
    #: A new manager ends the tasks of the old one before it serves.
    recover_tasks: bool = True
    #: A request to extend names the size to reach.
    absolute_size: bool = True
    #: A host whose start fails lets others try.
    set_aside: bool = True

    def without(self, rule: str) -> Rules:
        """Return the rules but one."""
        return self._replace(**{rule: False})


RULES = Rules._fields


class History(NamedTuple):
    """A seed and the size of its pool."""

    seed: int
    hosts: int = 3
    hours: float = 0.25
    fault_s: float = 30.0


#: For each rule the history that misses it; ``./run simulate --mutations`` prints what happens in each.
CAUGHT_BY: dict[str, History] = {
    "deadline": History(2),
    "boot_clock": History(2),
    "recheck": History(2),
    "connection": History(5),
    "settle": History(44),
    "own_epoch": History(1),
    "arbitration": History(13),
    "wait_for_death": History(564),
    "bound_children": History(2),
    "release_last": History(0),
    "read_again": History(0),
    "record_first": History(0),
    "recover_tasks": History(23),
    "absolute_size": History(0),
    "set_aside": History(42, hosts=5, hours=2.0),
}
