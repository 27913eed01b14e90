# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
from qcowlib._extent import RunList

def data_clusters(runs: RunList, cluster: int, end: int) -> tuple[int, int]: ...
