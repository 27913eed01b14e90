# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""TLS as the guide gives it: nbdkit in front, with a shared key and with certificates; who has neither stays out."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import qcowlib
from tests.qcowlib.qemu import run

pytestmark = [pytest.mark.bare, pytest.mark.real("qemu-img", "nbdkit", "nbdinfo", "nbdcopy", "openssl")]

SIZE = 2 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    qcowlib.create(path, SIZE)
    (tmp_path / "data.raw").write_bytes(random.Random(1).randbytes(SIZE))
    return path


def authority(folder: Path) -> None:
    """In *folder* an authority, and signed by it a server called localhost and a client, under the names of nbdkit."""
    folder.mkdir()

    def sign(name: str, subject: str, extensions: str, *words: str) -> None:
        (folder / "extensions").write_text(extensions)
        curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", f"{name}-key.pem"]
        run("openssl", "req", "-new", *curve, "-subj", f"/CN={subject}", "-out", "request.pem", cwd=folder)
        named = ["-days", "9", "-in", "request.pem", "-extfile", "extensions", "-out", f"{name}-cert.pem"]
        run("openssl", "x509", "-req", *named, *words, cwd=folder)

    sign(
        "ca",
        "authority",
        "basicConstraints=critical,CA:true\nkeyUsage=critical,keyCertSign\n",
        "-signkey",
        "ca-key.pem",
    )
    by_it = ("-CA", "ca-cert.pem", "-CAkey", "ca-key.pem", "-CAcreateserial")
    sign("server", "localhost", "subjectAltName=DNS:localhost\nextendedKeyUsage=serverAuth\n", *by_it)
    sign("client", "client", "extendedKeyUsage=clientAuth\n", *by_it)


@contextmanager
def front(server: qcowlib.NbdServer, folder: Path, *words: str | Path) -> Iterator[Path]:
    """nbdkit before *server*; its socket."""
    where, pid = folder / "front.sock", folder / "front.pid"
    run("nbdkit", "-U", where, "-P", pid, "--tls=require", *words, "nbd", f"socket={server.socket}")
    try:
        yield where
    finally:
        run("kill", pid.read_text().strip())


def test_shared_key_lets_in_who_has_it_and_nobody_else(disk: Path, tmp_path: Path) -> None:
    for name, digit in (("keys.psk", "0"), ("wrong.psk", "1")):
        (tmp_path / name).write_text(f"alice:{digit * 64}\n")
    with qcowlib.serve(disk, writable=True) as server, front(server, tmp_path, f"--tls-psk={tmp_path}/keys.psk") as at:

        def address(keys: str) -> str:
            return f"nbds+unix://alice@/?socket={at}&tls-psk-file={tmp_path}/{keys}"

        run("nbdcopy", "--flush", tmp_path / "data.raw", address("keys.psk"))
        assert "structured" in run("nbdinfo", address("keys.psk"))
        for wrong in (address("wrong.psk"), f"nbd+unix:///?socket={at}"):
            assert not run("nbdinfo", "--size", wrong, ok=False).strip().isdigit()
    with qcowlib.open(disk) as image:
        assert image.pread(SIZE, 0) == (tmp_path / "data.raw").read_bytes()


def test_certificates_let_in_whom_the_authority_signed_and_nobody_else(disk: Path, tmp_path: Path) -> None:
    authority(tmp_path / "pki")
    authority(tmp_path / "other")
    words = (f"--tls-certificates={tmp_path}/pki", "--tls-verify-peer")
    with qcowlib.serve(disk, writable=True) as server, front(server, tmp_path, *words) as at:

        def address(folder: str) -> str:
            return f"nbds+unix:///?socket={at}&tls-certificates={tmp_path}/{folder}"

        run("nbdcopy", "--flush", tmp_path / "data.raw", address("pki"))
        assert run("nbdinfo", "--size", address("pki")).strip() == str(SIZE)
        for wrong in (address("other"), f"nbd+unix:///?socket={at}"):
            assert not run("nbdinfo", "--size", wrong, ok=False).strip().isdigit()
        creds = f"tls-creds-x509,id=t,endpoint=client,dir={tmp_path}/pki"
        remote = f"driver=raw,file.driver=nbd,file.server.type=unix,file.server.path={at},file.tls-creds=t"
        theirs = ["--object", creds, "--image-opts", f"{remote},file.tls-hostname=localhost"]
        run("qemu-img", "compare", *theirs, f"driver=raw,file.filename={tmp_path}/data.raw")
    with qcowlib.open(disk) as image:
        assert image.pread(SIZE, 0) == (tmp_path / "data.raw").read_bytes()
