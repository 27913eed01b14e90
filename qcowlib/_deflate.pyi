# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
from _typeshed import ReadableBuffer, WriteableBuffer

class Deflater:
    def compress(self, source: ReadableBuffer, target: WriteableBuffer) -> int: ...
