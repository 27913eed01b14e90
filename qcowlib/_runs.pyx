# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Sums over run lists, without a Python object per run.

Invariant: reads only; arithmetic cannot overflow for runs inside 2^63 bytes.
"""
from libc.stdint cimport uint64_t

from qcowlib._extent cimport Run, RunList
from qcowlib._ondisk cimport RUN_COMPRESSED, RUN_DATA


def data_clusters(RunList runs not None, uint64_t cluster, uint64_t end):
    """Count the bytes of whole clusters (of size *cluster*) that hold data of *runs*.

    *end* is where the last cluster counted before ended.  Returns the bytes
    counted now, and the new end.  Raises ValueError for a cluster of 0.
    """
    cdef uint64_t total = 0
    cdef uint64_t start, stop
    cdef size_t i
    cdef Run *run
    if cluster == 0:
        raise ValueError("a cluster must not be empty")
    with nogil:
        for i in range(runs.v.count):
            run = &runs.v.runs[i]
            stop = run.guest + run.length
            if (run.kind != RUN_DATA and run.kind != RUN_COMPRESSED) or stop <= end:
                continue
            start = run.guest // cluster * cluster
            if start < end:
                start = end
            end = (stop + cluster - 1) // cluster * cluster
            total += end - start
    return total, end
