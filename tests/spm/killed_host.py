# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""``qpool`` whose host dies (SIGKILL) before the change number ``KILL_AT`` of the command that it carries out."""

import os
import sys
import threading

from spm.cli.main import entry
from storage_pool.testing.killing import die_at_record

if __name__ == "__main__":
    die_at_record(int(os.environ["KILL_AT"]), lambda: threading.current_thread().name == "command")
    sys.exit(entry())
