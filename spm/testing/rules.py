# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""The safety rules, each of which can be taken away.

A simulation that finds nothing proves nothing unless it finds something when
a rule is missing.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Rules"]


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
