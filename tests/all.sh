#!/bin/sh
# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
#
# Everything that must pass.  Each part runs whatever became of the others; pytest comes last.
set -u
python=$1
here=$(dirname "$0")
failed=""
# Disks of tests go to a folder of this run alone, gone with it; its short name leaves room for socket paths.
scratch=$(mktemp -d "${TMPDIR:-/tmp}/q.XXXXXX")
trap 'rm -rf --one-file-system "$scratch"' EXIT
trap 'exit 130' INT TERM HUP

part() {
    name=$1
    shift
    started=$(date +%s)
    printf '== %s\n' "$name"
    "$@" || failed="$failed $name"
    printf '== %s: %d s\n' "$name" $(($(date +%s) - started))
}

part lint sh "$here/lint.sh" "$python"
part checked env PYTEST_ADDOPTS="--basetemp=$scratch/t" sh "$here/checked.sh" "$python"
part wheel sh "$here/wheel.sh" "$python"
part bench "$python" -m pytest bench --benchmark-disable -n 0 --basetemp="$scratch/t"
part tests "$python" -m pytest -n 2 --dist loadgroup --durations 20 --basetemp="$scratch/t"

if [ -n "$failed" ]; then
    printf 'FAILED:%s\n' "$failed"
    exit 1
fi
