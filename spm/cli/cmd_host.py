# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""``qpool host``: run a host of a pool, and ask or tell a running one through its socket.

Invariant: one line for each change of state, written at once; the role is
given back before the process ends, unless it is killed.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

from storage_pool.cli.hosting import plain

if TYPE_CHECKING:
    from spm.host import HostReport
    from storage_pool.cli.output import Output

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

__all__ = ["add_parsers"]

_PANIC = 70
_LOCKS = "/run/lock/qpool"

_RUN_TEXT = """\
Keeps this host in a pool: joins the lockspace of the master domain, watches the pool's domains, and, with --contend
or when told through its socket, becomes the pool's manager (SPM): finishes or takes back what the manager before left,
serves the mailbox, and carries out commands. Each change of state is one line; with --output=json an object with
time (seconds since 1970), clock (seconds since boot), host_id, role (Free, Contend, SPM), lver (number of its own term,
-1 without the role), lockspace (out, joining, joined, lost), spm_id and spm_lver (as seen on storage), and reason.
SIGTERM and SIGINT leave: the role first, then the lockspace. Exit status: 0 after that, 1 on failure, 70 if the process
had to end itself at once.
"""
_RUN_EXAMPLE = "example: qpool host run /srv/data/UUID --host-id 1 --contend --socket /run/qpool/1.sock --output=json"


def add_parsers(subjects: Subparsers, common: argparse.ArgumentParser) -> None:
    """Add the subcommands of this subject."""
    verbs = subjects.add_parser("host", help="hosts of a pool, and which of them manages it").add_subparsers(
        dest="verb", required=True, metavar="VERB"
    )
    run = verbs.add_parser(
        "run",
        parents=[common],
        help="be a host of a pool until SIGTERM",
        description=_RUN_TEXT,
        epilog=_RUN_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    run.set_defaults(run=plain(_run))
    run.add_argument("master", metavar="MASTER-DIRECTORY|UUID", help="the pool's master domain")
    run.add_argument("--host-id", type=int, required=True, metavar="N", help="1 to 2000, another for each host")
    run.add_argument("--contend", action="store_true", help="become the manager when there is none")
    run.add_argument("--priority", type=int, default=5, metavar="N", help="1 to 10, 10 comes first; below 1 never")
    run.add_argument("--place", metavar="DIR", help="folder of the pool's domains (default: that of the master)")
    run.add_argument(
        "--leases", choices=("auto", "sanlock", "embedded"), default="auto", help="auto: sanlock where its daemon is"
    )
    run.add_argument("--sanlock-run-dir", metavar="DIR", help="of the daemon to use")
    run.add_argument("--io-timeout", type=float, default=10.0, metavar="S", help="of the leases, in seconds")
    run.add_argument("--lock-folder", default=_LOCKS, metavar="DIR", help="local locks, where there is no sanlock")
    run.add_argument("--socket", metavar="PATH", help="serve state, metrics and commands there")

    def add(verb: str, act: Callable[[argparse.Namespace, Output], int], text: str) -> argparse.ArgumentParser:
        parser = verbs.add_parser(verb, parents=[common], help=text, description=text)
        parser.set_defaults(run=plain(act))
        parser.add_argument("--socket", required=True, metavar="PATH", help="of the running host")
        return parser

    add("status", _status, "show the state of a running host")
    add("metrics", _metrics, "show it as Prometheus reads it")
    add("start-spm", _start, "have a running host become the manager")
    add("stop-spm", _stop, "have a running host give the role back")
    fence = add("fence", _fence, "declare that a host, which is off, manages the pool no more")
    fence.add_argument("host_id", type=int, metavar="HOST-ID")
    fence.add_argument("--confirm", default="", metavar="TEXT", help="what a person says: the host is off")
    do = add("do", _do, "run a qpool command with the right of a running manager")
    do.add_argument("argv", nargs=argparse.REMAINDER, metavar="-- COMMAND...")


# -- a running host ------------------------------------------------------------


def _ask(arguments: argparse.Namespace, what: str, body: dict[str, object] | None = None) -> dict[str, object]:
    from qcowlib.errors import UsageError
    from spm.cli.endpoint import ask

    code, text = ask(arguments.socket, what, body)
    answer: dict[str, object] = json.loads(text)
    if code != 200:
        raise UsageError(str(answer.get("error", "refused")), path=arguments.socket)
    return answer


def _show(answer: dict[str, object], output: Output) -> int:
    if output.as_json:
        output.document(answer)
        return 0
    domains = answer.pop("domains", {})
    output.fields(list(answer.items()))
    if isinstance(domains, dict) and domains:
        rows = [(uuid, status["valid"], status["delay"], status["error"]) for uuid, status in domains.items()]
        output.table(("DOMAIN", "VALID", "DELAY", "ERROR"), rows)
    return 0


def _status(arguments: argparse.Namespace, output: Output) -> int:
    return _show(_ask(arguments, "/status"), output)


def _metrics(arguments: argparse.Namespace, output: Output) -> int:
    from spm.cli.endpoint import ask

    _, text = ask(arguments.socket, "/metrics")
    for line in text.splitlines():
        output.line(line)
    return 0


def _start(arguments: argparse.Namespace, output: Output) -> int:
    return _show(_ask(arguments, "/spm/start", {}), output)


def _stop(arguments: argparse.Namespace, output: Output) -> int:
    return _show(_ask(arguments, "/spm/stop", {}), output)


def _fence(arguments: argparse.Namespace, output: Output) -> int:
    body: dict[str, object] = {"host_id": arguments.host_id, "confirmation": arguments.confirm}
    return _show(_ask(arguments, "/fence", body), output)


def _do(arguments: argparse.Namespace, output: Output) -> int:
    import sys

    argv = arguments.argv[1:] if arguments.argv[:1] == ["--"] else arguments.argv
    answer = _ask(arguments, "/run", {"argv": argv})
    sys.stdout.write(str(answer["stdout"]))
    sys.stderr.write(str(answer["stderr"]))
    return int(str(answer["status"]))


# -- being one -----------------------------------------------------------------


def _panic(reason: str) -> NoReturn:
    os.write(2, f"qpool: this host ends at once: {reason}\n".encode())
    os._exit(_PANIC)


def _tell(output: Output) -> Callable[[HostReport], None]:
    from spm.cli.running import notify, report_line

    def tell(report: HostReport) -> None:
        # Straight to the descriptor: standard output may be taken by a command that runs meanwhile.
        if output.as_json:
            line = json.dumps(report_line(report))
        else:
            seen = "" if report.spm_id < 0 else f", manager {report.spm_id}"
            term = "" if report.lver < 0 else f", term {report.lver}"
            line = f"host {report.host_id}: {report.role}{term}, lockspace {report.lockspace}{seen}: {report.reason}"
        os.write(1, line.encode("utf-8", "backslashreplace") + b"\n")
        notify(f"STATUS={report.role}, lockspace {report.lockspace}")
        if report.lockspace == "joined":
            notify("READY=1")

    return tell


def _run(arguments: argparse.Namespace, output: Output) -> int:
    from pathlib import Path

    from qcowlib.errors import UsageError
    from spm.timing import LeaseTiming
    from storage_pool.errors import NotFound
    from storage_pool.ids import is_id

    if not 1 <= arguments.host_id <= 2000:
        raise UsageError("a host id is a number from 1 to 2000")
    if not 1 <= arguments.io_timeout <= 600:
        raise UsageError("the I/O timeout is a number of seconds from 1 to 600")
    if arguments.priority > 10:
        raise UsageError("a priority is a number up to 10")
    if arguments.place is not None and not Path(arguments.place).is_dir():
        raise NotFound("no such directory", path=arguments.place)
    block = is_id(arguments.master) and not Path(arguments.master).exists()
    if block and arguments.place is None:
        raise UsageError("--place is needed: the folder of the pool's other domains, which may be empty")
    return _supervise(arguments, output, LeaseTiming(io_timeout_s=arguments.io_timeout))


def _supervise(arguments: argparse.Namespace, output: Output, timing: object) -> int:
    import time
    from contextlib import closing
    from pathlib import Path

    from spm.children import HelperPrograms
    from spm.cli.place import Place, clock, guarded, lease_manager, pool_lease
    from spm.cli.running import HostLoop, Mailbox, Monitors, run_host
    from spm.duties import PoolDuties, open_mailbox
    from spm.election import Election
    from spm.extend import ExtensionClient
    from spm.host import PoolHost, election_timing
    from spm.lease_watch import LeaseToken
    from spm.mailbox import Reply
    from spm.service import SpmHost, SpmService
    from spm.terms import MasterTerms
    from spm.timing import LeaseTiming
    from storage_pool.cli.main import main
    from storage_pool.engine import Engine
    from storage_pool.lvm import has_device_mapper

    if not isinstance(timing, LeaseTiming):
        raise TypeError("a timing is needed")
    folder = arguments.place or str(Path(os.path.abspath(arguments.master)).parent)  # noqa: PTH100
    devices = None if arguments.device is None else tuple(arguments.device)
    activation = not arguments.no_activation and has_device_mapper()
    place = Place(arguments.master, folder, devices, activation)
    with closing(place.open_master()) as master:
        area, lease = pool_lease(master)
        leases, inherit = lease_manager(
            arguments.leases, timing, arguments.sanlock_run_dir, arguments.lock_folder, master
        )
    own = SpmHost(arguments.host_id, leases, timing, clock, time.sleep, _panic)
    terms = MasterTerms(place.open_master)

    def connect(token: LeaseToken) -> Engine:
        return place.engine(token, helpers.of(token))

    def say(text: str) -> None:
        os.write(2, f"qpool: {text}\n".encode("utf-8", "backslashreplace"))

    duties = PoolDuties(place.open_master, connect, say)
    service = SpmService(own, lease, terms, duties.steps())
    helpers = HelperPrograms(lambda token: guarded(token, inherit), service.killers)
    election = Election(arguments.host_id, election_timing(timing), willing=arguments.contend)
    host = PoolHost(
        own, area, lease, terms, service, election, _tell(output), duties=duties, priority=arguments.priority
    )

    def carry_out(argv: list[str]) -> int:
        token = service.token
        if token is None:
            return 1
        return main(argv, token=token, runner=helpers.of(token))

    monitors = Monitors(place.monitor, place.members, max(1.0, timing.io_timeout_s))

    def open_client(answered: Callable[[Reply], None]) -> ExtensionClient:
        # The volumes stay open when the domain is closed.
        with closing(place.open_master()) as master:
            inbox, outbox = open_mailbox(master, serving=False)
        return ExtensionClient(arguments.host_id, inbox, outbox, answered)

    loop = HostLoop(host, monitors, carry_out, Mailbox(open_client, timing.gap_s))
    return run_host(loop, monitors, arguments.socket)
