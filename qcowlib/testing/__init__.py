# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Test support that is product: conformance suites, recorder, faults, crash explorer, models."""
