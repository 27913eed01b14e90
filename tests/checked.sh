#!/bin/sh
# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
#
# The tests of the engine on the checked build: bounds checks, address and undefined-behaviour
# sanitizers.  The objects of Python come from malloc, or an overrun inside one of its arenas stays unseen.
set -eu
python=$(command -v "$(cd "$(dirname "$1")" && pwd)/$(basename "$1")")
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

# Foreign programs run without the sanitizers: qemu's coroutines hang under them.
mkdir -p "$build/bin"
PATH=$PATH:/usr/sbin:/sbin
for program in qemu-img qemu-io qemu-nbd nbdkit mke2fs lvm sanlock losetup chromium; do
    real=$(command -v "$program") || continue
    printf '#!/bin/sh\nunset LD_PRELOAD\nexec %s "$@"\n' "$real" >"$build/bin/$program"
    chmod +x "$build/bin/$program"
done
PATH=$build/bin:$PATH
export PATH

cd "$build"
[ $# -gt 0 ] || set -- "$root/tests/qcowlib" --ignore "$root/tests/qcowlib/cli" --durations 10
LD_PRELOAD=$(gcc -print-file-name=libasan.so) \
    ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:handle_segv=1 \
    UBSAN_OPTIONS=print_stacktrace=1 \
    PYTHONMALLOC=malloc PYTHONSAFEPATH=1 PYTHONPATH="$build/lib:$root" QCOWLIB_CHECKED=1 QCOWLIB_PROFILE=checked \
    exec "$python" -m pytest -c "$root/pyproject.toml" --rootdir "$root" -p no:cacheprovider \
    --timeout 120 -m "not fuzz and not crash and not bare" -n 2 --dist loadgroup "$@"
