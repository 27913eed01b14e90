# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""``qpool host run`` as processes: alone on local locks, and three with real lease daemons on one pool."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from spm.cli.endpoint import ask, metrics
from storage_pool.embedded import FileToken
from storage_pool.file_domain import FileDomain
from storage_pool.ids import make_id
from storage_pool.lease_records import lockspace_area
from storage_pool.pool import StoragePool

from .conftest import IO_TIMEOUT_S, sanlock_daemon

pytestmark = pytest.mark.bare

ROOT = Path(__file__).parents[2]
QPOOL = [sys.executable, "-m", "spm.cli.main"]


def make_pool(folder, storage_type="LOCALFS"):
    """Make a domain that is a pool; returns its directory."""
    uuid = make_id()
    with FileToken(str(folder / "lock")) as token:
        domain = FileDomain.create(
            token, str(folder), uuid, version=5, storage_type=storage_type, remote_path="server:/x", ctime=1
        )
        StoragePool.create(token, make_id(), "pool", domain)
        domain.close()
    path = folder / uuid
    if storage_type != "LOCALFS":
        (path / "dom_md/ids").write_bytes(lockspace_area(uuid, io_timeout_s=IO_TIMEOUT_S))
    return path


def qpool(*words, cwd, **options):
    return subprocess.run(
        [*QPOOL, *map(str, words)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        **options,
    )


class Host:
    """A running host; its lines, its socket."""

    def __init__(self, stack, folder, master, number, *words, environment=None):
        self.number = number
        self.socket = f"{folder}/{number}.sock"
        self.output = folder / f"host{number}.out"
        command = [*QPOOL, "host", "run", master, "--host-id", number, "--socket", self.socket, "--output=json"]
        with open(self.output, "wb") as out:
            self.process = subprocess.Popen(
                [*map(str, command), *map(str, words)],
                cwd=folder,
                env={**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})},
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        stack.callback(self.process.wait)
        stack.callback(self.process.kill)

    def lines(self):
        return [json.loads(line) for line in self.output.read_text().splitlines() if line.startswith("{")]

    def role(self):
        lines = self.lines()
        return lines[-1]["role"] if lines else "Free"


def wait_for(what, limit_s=60, hosts=()):
    end = time.monotonic() + limit_s
    while not (found := what()):
        if time.monotonic() > end:
            said = "\n".join(f"{host.number}: {host.output.read_text()}" for host in hosts)
            raise TimeoutError(f"not within {limit_s} s\n{said}")
        time.sleep(0.05)
    return found


def manager(hosts):
    return next((host for host in hosts if host.process.poll() is None and host.role() == "SPM"), None)


# -- alone -----------------------------------------------------------------------


@pytest.fixture
def alone(tmp_path):
    master = make_pool(tmp_path)
    with contextlib.ExitStack() as stack:
        yield Host(stack, tmp_path, master, 1, "--lock-folder", tmp_path / "locks", "--contend"), master, tmp_path


def test_host_alone_tells_each_change_and_leaves_in_order(alone):
    host, _, _ = alone
    wait_for(lambda: host.role() == "SPM")
    host.process.send_signal(signal.SIGHUP)
    host.process.terminate()
    assert host.process.wait(30) == 0
    lines = host.lines()
    assert [(line["role"], line["lockspace"]) for line in lines] == [
        ("Free", "joining"),
        ("Free", "joined"),
        ("Contend", "joined"),
        ("SPM", "joined"),
        ("Free", "joined"),
        ("Free", "out"),
    ]
    assert [line["lver"] for line in lines] == [-1, -1, -1, 1, -1, -1]
    assert all(line["host_id"] == 1 and line["time"] > 1e9 for line in lines)
    assert sorted(line["clock"] for line in lines) == [line["clock"] for line in lines]
    assert not Path(host.socket).exists()


def test_state_and_metrics_are_served_on_the_socket(alone):
    host, master, folder = alone
    wait_for(lambda: host.role() == "SPM")
    wait_for(lambda: json.loads(ask(host.socket, "/status")[1])["domains"].get(master.name, {}).get("valid"))
    assert Path(host.socket).stat().st_mode & 0o777 == 0o600
    code, text = ask(host.socket, "/metrics")
    assert code == 200 and 'qpool_role{role="SPM"} 1\n' in text
    assert f'qpool_domain_valid{{domain="{master.name}"}} 1\n' in text
    for line in text.splitlines():
        assert line.startswith("#") or (len(line.rsplit(" ", 1)) == 2 and float(line.rsplit(" ", 1)[1]) > -2)
    shown = qpool("host", "status", "--socket", host.socket, "--output=json", cwd=folder)
    assert json.loads(shown.stdout)["role"] == "SPM"
    # The time of the last read may be of another read by now.
    printed = qpool("host", "metrics", "--socket", host.socket, cwd=folder).stdout.splitlines()
    assert [line.rpartition(" ")[0] for line in printed] == [line.rpartition(" ")[0] for line in text.splitlines()]
    assert ask(host.socket, "/nothing")[0] == 404
    assert ask(host.socket, "/nothing", {})[0] == 400


def test_host_is_told_to_start_and_to_stop(alone):
    host, _, folder = alone
    wait_for(lambda: host.role() == "SPM")
    stopped = qpool("host", "stop-spm", "--socket", host.socket, "--output=json", cwd=folder)
    assert json.loads(stopped.stdout)["role"] == "Free"
    started = qpool("host", "start-spm", "--socket", host.socket, "--output=json", cwd=folder)
    assert json.loads(started.stdout)["role"] == "SPM" and json.loads(started.stdout)["lver"] == 2


def test_commands_are_carried_out_with_the_managers_right(alone):
    host, master, folder = alone
    wait_for(lambda: host.role() == "SPM")
    made = qpool("host", "do", "--socket", host.socket, "--", "volume", "create", master, "1G", cwd=folder)
    assert made.returncode == 0, made.stderr
    listed = qpool("volume", "list", master, "--output=json", cwd=folder)
    assert len(json.loads(listed.stdout)) == 1
    wrong = qpool("host", "do", "--socket", host.socket, "--", "volume", "create", cwd=folder)
    assert wrong.returncode == 2 and "usage" in wrong.stderr
    qpool("host", "stop-spm", "--socket", host.socket, cwd=folder)
    refused = qpool("host", "do", "--socket", host.socket, "--", "volume", "create", master, "1G", cwd=folder)
    assert refused.returncode == 1 and "does not manage the pool" in refused.stderr


def test_fencing_wants_the_confirmation(alone):
    host, _, folder = alone
    wait_for(lambda: host.role() == "SPM")
    words = ("host", "fence", "--socket", host.socket, "7")
    assert "confirmation" in qpool(*words, cwd=folder).stderr
    assert qpool(*words, "--confirm", "the host is off", cwd=folder).returncode == 0


def test_second_host_on_local_locks_waits_for_the_first(alone, tmp_path):
    host, master, folder = alone
    wait_for(lambda: host.role() == "SPM")
    with contextlib.ExitStack() as stack:
        other = Host(stack, tmp_path, master, 2, "--lock-folder", folder / "locks", "--contend")
        wait_for(lambda: any(line["spm_id"] > 0 for line in other.lines()))
        assert other.role() == "Free"
        host.process.kill()
        wait_for(lambda: other.role() == "SPM")


def test_systemd_is_told(tmp_path):
    master = make_pool(tmp_path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener, contextlib.ExitStack() as stack:
        listener.bind(str(tmp_path / "notify"))
        listener.settimeout(30)
        environment = {"NOTIFY_SOCKET": str(tmp_path / "notify")}
        host = Host(stack, tmp_path, master, 1, "--lock-folder", tmp_path / "locks", environment=environment)
        told = set()
        while "READY=1" not in told or "WATCHDOG=1" not in told:
            told.add(listener.recv(4096).decode())
        host.process.terminate()
        while "STOPPING=1" not in told:
            told.add(listener.recv(4096).decode())


@pytest.mark.parametrize(
    "words", [("--host-id", "0"), ("--host-id", "1", "--io-timeout", "0"), ("--host-id", "1", "--leases", "sanlock")]
)
def test_wrong_lines_are_one_clear_line(tmp_path, words):
    master = make_pool(tmp_path)
    done = qpool("host", "run", master, *words, cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and done.stderr.startswith("qpool: ")


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("--sanlock-run-dir", "gone"), "gone/sanlock.sock: no sanlock daemon listens here"),
        (("--leases", "sanlock", "--sanlock-run-dir", "gone"), "no sanlock daemon listens here"),
        (("--priority", "11"), "a priority is a number up to 10"),
        (("--place", "nowhere"), "nowhere: no such directory"),
        (("--sanlock-run-dir", "x" * 200), "no sanlock daemon listens here"),
    ],
)
def test_what_cannot_work_is_told_at_the_start(tmp_path, words, text):
    master = make_pool(tmp_path, "NFS")
    done = qpool("host", "run", master, "--host-id", "1", *words, cwd=tmp_path)
    assert done.returncode == 1 and text in done.stderr, done.stderr
    assert done.stdout == "" and "Errno" not in done.stderr


def test_nobody_at_the_socket_is_told(tmp_path):
    done = qpool("host", "status", "--socket", "gone", cwd=tmp_path)
    assert done.returncode == 1 and "no host answers" in done.stderr


def test_metrics_of_a_host_without_domains():
    status = {"host_id": 1, "spm_lver": -1, "spm_id": -1, "lver": -1, "role": "Free", "lockspace": "out"}
    text = metrics(status)
    assert text.endswith("\n") and 'qpool_lockspace{state="out"} 1\n' in text


# -- three with daemons ------------------------------------------------------------


@pytest.mark.real("sanlock")
def test_three_hosts_one_manager_killed_another_ends_its_work(tmp_path, run_dirs):
    master = make_pool(tmp_path, "NFS")
    with contextlib.ExitStack() as stack:
        hosts = []
        for number in (1, 2, 3):
            run_dir = run_dirs()
            stack.enter_context(sanlock_daemon(run_dir, f"host{number}"))
            words = ("--contend", "--sanlock-run-dir", run_dir, "--io-timeout", IO_TIMEOUT_S)
            hosts.append(Host(stack, tmp_path, master, number, *words))
        first = wait_for(lambda: manager(hosts), 60, hosts)
        wait_for(lambda: all(any(line["spm_id"] > 0 for line in host.lines()) for host in hosts))

        def do(host, *argv):
            done = qpool("host", "do", "--socket", host.socket, "--", *argv, cwd=tmp_path)
            assert done.returncode == 0, done.stderr
            return done.stdout

        made = json.loads(do(first, "volume", "create", master, "256M", "--format", "COW", "--output", "json"))
        image = made["image"]
        taken = json.loads(do(first, "snapshot", "create", master, image, "--output", "json"))["leaf"]
        # Half of a merge: the manager is killed in the middle of it.
        began = subprocess.Popen(
            [*QPOOL, "host", "do", "--socket", first.socket, "--", "snapshot", "delete", master, image, taken],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        stack.callback(began.wait)
        first.process.kill()
        rest = [host for host in hosts if host is not first]
        second = wait_for(lambda: manager(rest), 120, hosts)
        assert max(line["lver"] for line in second.lines()) == 2
        checked = qpool("domain", "check", master, "--output=json", cwd=tmp_path)
        assert checked.returncode == 0, checked.stdout
        do(second, "snapshot", "create", master, image)
        terms = sorted(
            (line["clock"], line["lver"]) for host in hosts for line in host.lines() if line["role"] == "SPM"
        )
        assert [lver for _, lver in terms] == [1, 2]
        second.process.terminate()
        assert second.process.wait(60) == 0


def test_mb09_threads_of_a_host_end_when_it_is_stopped(tmp_path):
    master = make_pool(tmp_path)
    with contextlib.ExitStack() as stack:
        host = Host(stack, tmp_path, master, 1, "--lock-folder", tmp_path / "locks", "--contend")
        wait_for(lambda: host.role() == "SPM")
        body = {"domain": master.name, "volume": make_id(), "size_mib": 64}
        code, text = ask(host.socket, "/extend", body)
        assert code == 409 and "did not extend" in text
        tasks = Path(f"/proc/{host.process.pid}/task")
        names = {(task / "comm").read_text().strip() for task in tasks.iterdir()}
        assert len(list(tasks.iterdir())) > 3, names
        host.process.terminate()
        assert host.process.wait(30) == 0
