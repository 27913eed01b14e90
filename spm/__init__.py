# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""The storage pool manager: leases, election, mailbox, live growth."""
