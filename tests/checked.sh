#!/bin/sh
# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
#
# The tests of the engine on the checked build: bounds checks, address and undefined-behaviour
# sanitizers.  The objects of Python come from malloc, or an overrun inside one of its arenas stays unseen.
set -eu
python=$1
shift
root=$(cd "$(dirname "$0")/.." && pwd)
build=$root/build/checked
cd "$root"

mkdir -p "$build"
QCOWLIB_CHECKED=1 "$python" setup.py -q build --build-base "$build" --build-lib "$build/lib" -j "$(nproc)" \
    >"$build/build.log" 2>&1 || {
    tail -n 20 "$build/build.log" >&2
    echo "checked: the build failed (build/checked/build.log)" >&2
    exit 1
}

cd "$build"
[ $# -gt 0 ] || set -- "$root/tests/qcowlib"
LD_PRELOAD=$(gcc -print-file-name=libasan.so) \
    ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:handle_segv=1 \
    UBSAN_OPTIONS=print_stacktrace=1 \
    PYTHONMALLOC=malloc PYTHONSAFEPATH=1 PYTHONPATH="$build/lib:$root" QCOWLIB_CHECKED=1 \
    exec "$python" -m pytest -c "$root/pyproject.toml" --rootdir "$root" -p no:cacheprovider \
    --hypothesis-profile=checked -m "not fuzz and not crash and not bare" -n 2 --dist loadgroup "$@"
