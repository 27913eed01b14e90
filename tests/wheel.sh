#!/bin/sh
# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
#
# Builds a wheel, judges its content, and uses it in an environment that has nothing else of ours.
set -eu
python=$1
root=$(cd "$(dirname "$0")/.." && pwd)
build=$root/build/wheel
cd "$root"

rm -rf "$build"
mkdir -p "$build"
"$python" -m pip -q --disable-pip-version-check wheel --no-deps --no-build-isolation -w "$build" . \
    >"$build/build.log" 2>&1 || {
    tail -n 20 "$build/build.log" >&2
    exit 1
}
"$python" tests/wheel_content.py "$build"/*.whl
"$python" -m venv --without-pip "$build/venv"
"$python" -m pip -q --disable-pip-version-check --python "$build/venv/bin/python" install "$build"/*.whl
cd "$build"
venv/bin/qcow create -q -f qcow2 disk.qcow2 1G
venv/bin/qcow info disk.qcow2 >info.txt
grep -q 'virtual size: 1 GiB' info.txt
echo "wheel: installed and used"
