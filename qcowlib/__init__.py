# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""A storage engine for QCOW2 images and RHV/oVirt storage domains."""
