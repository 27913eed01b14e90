# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Builds the compiled core; everything else about the package is in pyproject.toml.

``QCOWLIB_CHECKED=1`` makes the checked build: bounds and overflow checks,
address and undefined-behaviour sanitizers.  Run it under ``PYTHONMALLOC=malloc``
with libasan preloaded (``tests/checked.sh``).
"""

import os
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup

CHECKED = os.environ.get("QCOWLIB_CHECKED") == "1"

if CHECKED:
    flags = ["-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    link = ["-fsanitize=address,undefined"]
else:
    flags = ["-O3", "-g0", "-fvisibility=hidden"]
    link = ["-Wl,-O1"]

extensions = [
    Extension(f"qcowlib.{path.stem}", [f"qcowlib/{path.name}"], extra_compile_args=flags, extra_link_args=link)
    for path in sorted(Path(__file__).resolve().parent.glob("qcowlib/_*.pyx"))
]

setup(
    ext_modules=cythonize(
        extensions,
        build_dir="build/cython-checked" if CHECKED else "build/cython",
        nthreads=os.cpu_count() or 1,
        compiler_directives={
            "language_level": 3,
            "boundscheck": CHECKED,
            "wraparound": False,
            "initializedcheck": CHECKED,
            "cdivision": True,
            "embedsignature": True,
            "freethreading_compatible": False,
        },
    )
)
