# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
# shellcheck shell=sh
#
# Set-up for ./run, sourced by it: Debian packages, .venv, the compiled core.
# Each step keeps a stamp of what it was made from and is left out while that is unchanged.

# What the tests and the demo compare with; the library itself needs none of it.
DEBIAN_PACKAGES="qemu-utils qemu-system-x86 lvm2 sanlock nbdkit libnbd-bin python3-libnbd fio openssl e2fsprogs procps bindfs chromium strace"

stamp_of() { cat "$@" | cksum; }

missing_packages() {
    for package in $DEBIAN_PACKAGES; do
        dpkg-query -W -f '${Status}\n' "$package" 2>/dev/null | grep -q ' installed$' || printf '%s ' "$package"
    done
    command -v cc >/dev/null 2>&1 || command -v gcc >/dev/null 2>&1 || printf 'gcc libc6-dev '
    if ! has_header && [ "$(python3 -c 'import sys; print(sys.prefix)')" = /usr ]; then
        printf 'python3-dev '
    fi
    python3 -c 'import ensurepip, venv' 2>/dev/null || printf 'python3-venv '
}

include_dir() { python3 -c 'import sysconfig; print(sysconfig.get_paths()["include"])'; }

has_header() { [ -f "$(include_dir)/Python.h" ]; }

install_packages() {
    [ -z "${QCOWLIB_NO_APT:-}" ] || return 0
    command -v apt-get >/dev/null 2>&1 || return 0
    missing=$(missing_packages)
    [ -n "$missing" ] || return 0
    if [ "$(id -u)" != 0 ]; then
        say "not installed (needs root), what compares with it is left out: $missing"
        return 0
    fi
    say "apt-get install $missing"
    mkdir -p "$root/build"
    # shellcheck disable=SC2086
    if ! {
        apt-get update -q &&
            DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends $missing
    } >"$root/build/apt.log" 2>&1 </dev/null; then
        tail -n 5 "$root/build/apt.log" >&2
        [ "${CI:-}" != true ] || die "apt-get failed (build/apt.log)"
        say "apt-get failed (build/apt.log); going on without these packages"
    fi
}

# Without root, Python.h comes out of Debian's package, unpacked beside the environment.
unpack_headers() {
    has_header && return 0
    headers=$venv/headers
    version=$(python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    if [ ! -d "$headers/usr/include" ]; then
        command -v apt-get >/dev/null 2>&1 || die "Python.h is missing: install the headers of Python $version"
        say "unpacking Python.h into the environment"
        mkdir -p "$headers"
        (cd "$headers" && apt-get download -q "libpython$version-dev" && dpkg -x ./*.deb .) >"$venv/headers.log" 2>&1 ||
            die "Python.h is missing and could not be fetched: as root, apt-get install python3-dev"
    fi
    CPATH="$headers/usr/include/python$version:$headers/usr/include${CPATH:+:$CPATH}"
    export CPATH
}

pip_install() {
    mkdir -p build
    "$python" -m pip install --disable-pip-version-check "$@" >build/pip.log 2>&1 || {
        tail -n 20 build/pip.log >&2
        die "pip install failed (build/pip.log)"
    }
}

make_environment() {
    stamp=$(stamp_of pyproject.toml tests/setup.sh)
    [ "$(cat "$venv/.stamp" 2>/dev/null)" != "$stamp" ] || return 0
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || die "Python 3.11 or newer is needed"
    say "making $venv"
    [ -x "$python" ] || python3 -m venv "$venv"
    pip_install "setuptools>=77" "cython>=3.1,<4" wheel
    "$python" - >"$venv/requirements.txt" <<'PY'
import tomllib

with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
print("\n".join(project["dependencies"] + project["optional-dependencies"]["dev"]))
PY
    pip_install -r "$venv/requirements.txt"
    printf '%s\n' "$stamp" >"$venv/.stamp"
}

build_core() {
    stamp=$(stamp_of setup.py qcowlib/_*.pyx qcowlib/_*.pxd)$("$python" -VV)
    if [ "$(cat build/core.stamp 2>/dev/null)" = "$stamp" ] && ls qcowlib/_*.so >/dev/null 2>&1; then
        return 0
    fi
    say "building the compiled core"
    mkdir -p build
    "$python" setup.py -q build_ext --inplace -j "$(nproc)" >build/core.log 2>&1 || {
        tail -n 20 build/core.log >&2
        die "the compiled core does not build (build/core.log)"
    }
    printf '%s\n' "$stamp" >build/core.stamp
}

# A development install: modules and compiled core stay in the tree.  The compat mode is a plain
# .pth line; the default one costs each start of the interpreter 15 ms.
install_project() {
    stamp=$(stamp_of pyproject.toml setup.py)
    [ "$(cat "$venv/.installed" 2>/dev/null)" != "$stamp" ] || return 0
    pip_install --no-deps --no-build-isolation --config-settings editable_mode=compat -e .
    printf '%s\n' "$stamp" >"$venv/.installed"
}

# Kernel and busybox of the virtual host, unpacked below build/: 28 MB, once.
fetch_virtual_host() {
    [ "$(id -u)" = 0 ] && [ -z "${QCOWLIB_NO_APT:-}" ] && [ ! -f build/virtual-host/ready ] || return 0
    command -v apt-get >/dev/null 2>&1 || return 0
    say "fetching the kernel of the virtual host"
    python3 tests/virtual/virtual_host.py >build/virtual-host.log 2>&1 ||
        say "not fetched (build/virtual-host.log), tests in a virtual host are left out"
}

setup() {
    install_packages
    make_environment
    unpack_headers
    build_core
    install_project
    fetch_virtual_host
}
