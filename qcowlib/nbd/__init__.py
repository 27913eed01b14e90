# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Images served over NBD: :func:`qcowlib.serve` and ``qcow serve``."""
