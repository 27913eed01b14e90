#!/bin/sh
# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
#
# Uses an installed qcowlib, the one that the first `qcow` on the path belongs to, outside the source tree.
set -eu
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
cd "$scratch"

qcow create -q -f qcow2 base.qcow2 1G
qcow create -q -f qcow2 -b base.qcow2 -F qcow2 disk.qcow2
head -c 1000000 /dev/urandom >data.raw
qcow convert -c -O qcow2 data.raw small.qcow2
qcow compare -q data.raw small.qcow2
qcow check -q disk.qcow2
qcow info disk.qcow2 >info.txt
grep -q 'virtual size: 1 GiB' info.txt
qpool domain create --help >/dev/null
echo "installed: used"
