# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Pictures of images and of chains: :func:`.survey.survey` looks, :mod:`.svg`, :mod:`.page` and :mod:`.heat` draw.

Invariant: drawing is pure text from values, without a library at run time.
"""
