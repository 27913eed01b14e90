#!/bin/sh
# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
#
# Static checks: style, types, stubs against the compiled modules, the import contract.
set -u
python=$1
PATH=$(dirname "$python"):$PATH
status=0

check() {
    "$@" || {
        printf 'lint: failed: %s\n' "$*" >&2
        status=1
    }
}

modules=$(ls qcowlib/_*.pyx | sed 's,/,.,; s,\.pyx$,,')

check ruff check -q .
check ruff format -q --check .
# shellcheck disable=SC2046
check cython-lint --max-line-length 120 $(ls qcowlib/_*.pyx qcowlib/_*.pxd)
check "$python" -m mypy --no-error-summary
# shellcheck disable=SC2086
check "$python" -m mypy.stubtest --concise --ignore-positional-only --ignore-disjoint-bases \
    --allowlist tests/stubtest.txt --ignore-unused-allowlist $modules
check lint-imports
check reuse lint -q
exit $status
