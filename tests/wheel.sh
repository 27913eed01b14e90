#!/bin/sh
# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
#
# Builds an sdist, from it a wheel as an installer does, judges both, and uses the wheel in an environment of its own.
set -eu
python=$1
root=$(cd "$(dirname "$0")/.." && pwd)
build=$root/build/wheel
cd "$root"

quiet() {
    "$@" >"$build/build.log" 2>&1 || {
        tail -n 20 "$build/build.log" >&2
        exit 1
    }
}

rm -rf "$build"
mkdir -p "$build"
quiet "$python" -m build --sdist --no-isolation -o "$build" .
mkdir "$build/source"
tar -xzf "$build"/*.tar.gz -C "$build/source" --strip-components 1
git ls-files >"$build/tracked" 2>/dev/null && while read -r name; do
    [ -e "$build/source/$name" ] || case $name in
    .ci/* | .git*) ;;
    *)
        echo "sdist: $name is missing" >&2
        exit 1
        ;;
    esac
done <"$build/tracked"
quiet "$python" -m pip --disable-pip-version-check wheel --no-deps --no-build-isolation -w "$build" "$build"/*.tar.gz
"$python" tests/wheel_content.py "$build"/*.whl
"$python" -m venv --without-pip "$build/venv"
quiet "$python" -m pip --disable-pip-version-check --python "$build/venv/bin/python" install "$build"/*.whl
PATH=$build/venv/bin:$PATH sh tests/installed.sh
"$python" -m cibuildwheel --print-build-identifiers --platform linux >"$build/identifiers"
grep -q '^cp311-manylinux_x86_64' "$build/identifiers"
echo "wheel: built from the sdist, installed and used"
