# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Judges the content of a wheel: each compiled module with its stub, no sources, the licence.

Usage: ``wheel_content.py WHEEL``; prints what is wrong and exits with 1.
"""

import sys
import zipfile
from pathlib import Path


def problems(wheel: str) -> list[str]:
    """Return what is wrong with the wheel file *wheel*, as lines for people."""
    names = zipfile.ZipFile(wheel).namelist()
    found = [f"{name} must not be in the wheel" for name in names if name.endswith((".pyx", ".c"))]
    found += [f"{name} must not be in the wheel" for name in names if name.startswith(("tests/", "bench/"))]
    for source in sorted(Path("qcowlib").glob("_*.pyx")):
        for suffix in (".pyi", ".cpython-"):
            if not any(name.startswith(f"qcowlib/{source.stem}{suffix}") for name in names):
                found.append(f"qcowlib/{source.stem}{suffix}* is missing")
    for package in ("qcowlib", "storage_pool", "spm"):
        if not any(name == f"{package}/py.typed" for name in names):
            found.append(f"{package}/py.typed is missing")
        for module in Path(package).rglob("*.py"):
            if module.as_posix() not in names:
                found.append(f"{module} is missing")
    if not any(name.endswith("licenses/LICENSE") for name in names):
        found.append("LICENSE is missing")
    return found


if __name__ == "__main__":
    lines = problems(sys.argv[1])
    print("\n".join(lines) or f"{Path(sys.argv[1]).name}: content is right")
    sys.exit(bool(lines))
