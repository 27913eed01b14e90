# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Storage domains, volumes, templates and snapshots of RHV/oVirt."""
