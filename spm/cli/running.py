# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""The threads of a host: its own loop, a watch on each domain, the socket; the main one waits for signals.

Invariant: everything about the role happens in the host's loop, one thing
after the other; what others see is the last report, never a half-made one.
"""

from __future__ import annotations

import contextlib
import io
import os
import queue
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

from qcowlib.errors import Error, UsageError
from spm.cli.endpoint import Answer, Endpoint
from spm.extend import ExtensionClient
from spm.host import HostReport, PoolHost
from spm.mailbox import ExtendRequest, Reply
from storage_pool.monitor import DomainMonitor, DomainStatus

__all__ = ["HostLoop", "Monitors", "notify", "run_host"]

#: How long a client waits for what it told a host to do.
_ANSWER_S: Final = 3600.0
_LEAVE_S: Final = 20.0
#: Between two looks at this host's mail while it waits, and how long it waits for an answer.
_MAIL_S: Final = 0.1
_EXTEND_S: Final = 120.0


class _Order(NamedTuple):
    what: str
    body: dict[str, Any]
    answer: queue.Queue[Answer]


def _clock() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def notify(text: str) -> None:
    """Tell systemd, where it started this process; nothing is lost where that fails."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path:
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
        out.connect("\0" + path[1:] if path[0] == "@" else path)
        out.send(text.encode())


class Monitors:
    """One thread a domain, so that one that hangs holds up no other."""

    def __init__(self, make: Callable[[str], DomainMonitor], members: Callable[[], Sequence[str]], every_s: float):
        self._make = make
        self._members = members
        self._every_s = every_s
        self._stop = threading.Event()
        self._watched: dict[str, DomainMonitor] = {}

    def start(self) -> None:
        """Begin to watch the members, and who becomes one."""
        threading.Thread(target=self._follow, name="members", daemon=True).start()

    def _follow(self) -> None:
        while not self._stop.is_set():
            wait_s = 1.0
            with contextlib.suppress(Error, OSError):
                for uuid in self._members():
                    if uuid not in self._watched:
                        self._watched[uuid] = self._make(uuid)
                        threading.Thread(target=self._watch, args=(uuid,), name=f"monitor-{uuid}", daemon=True).start()
                wait_s = 3 * self._every_s
            self._stop.wait(wait_s)

    def _watch(self, uuid: str) -> None:
        while not self._stop.is_set():
            self._watched[uuid].check()
            self._stop.wait(self._every_s)

    def statuses(self) -> dict[str, DomainStatus]:
        """Return the last status of each domain."""
        return {uuid: monitor.status for uuid, monitor in list(self._watched.items())}

    def stop(self) -> None:
        """End; a check that hangs is left to the end of the process."""
        self._stop.set()


class Mailbox:
    """This host's box: asks the manager to extend volumes; *open_client* gives its machine, with what hears answers.

    Invariant: S1 for the box.  It is written only while the host id is this
    host's, as was seen not longer ago than *fresh_s*; after that it may be
    another's.
    """

    def __init__(self, open_client: Callable[[Callable[[Reply], None]], ExtensionClient], fresh_s: float) -> None:
        self._open = open_client
        self._fresh_s = fresh_s
        self._client: ExtensionClient | None = None
        self._lock = threading.Condition()
        self._answers: dict[tuple[str, str], int] = {}
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        #: When the host id was last seen to be ours, ``None`` while it is not, and how often it was not.
        self._seen_s: float | None = None
        self._lost = 0

    def seen(self, *, joined: bool) -> None:
        """Take what was just seen of the lockspace; never waits, though the storage of the box may hang."""
        self._seen_s = _clock() if joined else None
        self._lost += not joined

    def _ours(self) -> bool:
        seen_s = self._seen_s
        return seen_s is not None and _clock() - seen_s <= self._fresh_s

    def extend(self, request: ExtendRequest, limit_s: float) -> int:
        """Ask, wait for the answer, and return it: a size in MiB, 0 for failure.

        Raises: StorageError; UsageError outside the lockspace, also when it is lost meanwhile.
        """
        with self._lock:
            if self._stop.is_set():
                raise UsageError("this host leaves the pool")
            if not self._ours():
                raise UsageError("this host is not in the lockspace")
            if self._client is None:
                client = self._open(self._answered)
                try:
                    client.start()
                except BaseException:
                    client.close()
                    raise
                self._client = client
                self._thread = threading.Thread(
                    target=self._exchange, args=(client, self._lost), name="mailbox", daemon=True
                )
                self._thread.start()
            client = self._client
            key = request.domain, request.volume
            self._answers.pop(key, None)
            client.post(request)
            self._lock.wait_for(
                lambda: key in self._answers or self._stop.is_set() or self._client is not client, limit_s
            )
            if key not in self._answers and self._client is not client and not self._stop.is_set():
                raise UsageError("this host lost the lockspace, its requests with it")
            return self._answers.pop(key, 0)

    def stop(self, limit_s: float) -> bool:
        """Leave an empty box and end the thread, before the host id is given back; returns whether it did in time."""
        self._stop.set()
        # The lock is held during I/O, which may hang.
        if not self._lock.acquire(timeout=limit_s):
            return False
        self._lock.notify_all()
        thread = self._thread
        self._lock.release()
        if thread is None:
            return True
        thread.join(limit_s)
        return not thread.is_alive()

    def _answered(self, reply: Reply) -> None:
        self._answers[reply.request.domain, reply.request.volume] = reply.size_mib
        self._lock.notify_all()

    def _exchange(self, client: ExtensionClient, lost: int) -> None:
        # The next life of the host id begins a new life of the box.
        while not self._stop.is_set() and self._lost == lost:
            with self._lock:
                if self._ours():
                    client.step(time.monotonic())
            self._stop.wait(_MAIL_S)
        with self._lock:
            with contextlib.suppress(Error, OSError):
                if self._ours():
                    client.stop()
            client.close()
            self._client = None
            self._lock.notify_all()


class HostLoop:
    """Drives *host*, and does what it is told between two steps; *run* carries out a command with the role's right."""

    def __init__(
        self, host: PoolHost, monitors: Monitors, run: Callable[[list[str]], int], mailbox: Mailbox | None = None
    ) -> None:
        self._host = host
        self._mailbox = mailbox
        self._monitors = monitors
        self._run = run
        self._orders: queue.Queue[_Order | None] = queue.Queue()
        self._working: threading.Thread | None = None
        self.failed: BaseException | None = None
        self.ended = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="host", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def _loop(self) -> None:
        try:
            while True:
                wait_s = self._host.step()
                if self._mailbox is not None:
                    self._mailbox.seen(joined=self._host.report.lockspace == "joined")
                notify("WATCHDOG=1")
                with contextlib.suppress(queue.Empty):
                    order = self._orders.get(timeout=max(wait_s, 0.001))
                    if order is None:
                        break
                    self._carry_out(order)
            self._host.leave()
        except BaseException as error:
            self.failed = error
        finally:
            self.ended.set()

    def leave(self) -> bool:
        """Have the host leave, its box first: it belongs to the host id; returns whether both ended in time."""
        emptied = self._mailbox is None or self._mailbox.stop(_LEAVE_S / 4)
        self._orders.put(None)
        return self.ended.wait(_LEAVE_S) and emptied

    # -- what others ask -----------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """Return the state as ``/status`` tells it."""
        report = self._host.report
        domains = {
            uuid: {"valid": status.valid, "delay": status.delay_s, "version": status.version, "error": status.error}
            for uuid, status in sorted(self._monitors.statuses().items())
        }
        return {"time": round(time.time(), 3), **report._asdict(), "domains": domains}

    def tell(self, what: str, body: dict[str, Any]) -> Answer:
        """Have the loop do *what*, and wait for its answer."""
        if what == "/extend":
            return self._extend(body)
        order = _Order(what, body, queue.Queue())
        self._orders.put(order)
        try:
            return order.answer.get(timeout=_ANSWER_S)
        except queue.Empty:
            return 504, {"error": "the host does not answer"}

    def _extend(self, body: dict[str, Any]) -> Answer:
        """Ask the manager, in the caller's thread: the loop goes on, which may be the manager's."""
        if self._mailbox is None:
            return 409, {"error": "this host has no mailbox"}
        try:
            size = int(body.get("size_mib", 0))
            request = ExtendRequest(str(body.get("domain")), str(body.get("volume")), size)
            request.pack()
            answer = self._mailbox.extend(request, _EXTEND_S)
        except (Error, OSError, ValueError) as error:
            return 409, {"error": str(error)}
        return (200, {"size_mib": answer}) if answer else (409, {"error": "the manager did not extend the volume"})

    def _carry_out(self, order: _Order) -> None:
        host = self._host
        try:
            if order.what == "/run":
                self._begin(order)
                return
            if order.what == "/spm/start":
                done = host.report.lockspace == "joined" and host.start()
            elif order.what == "/spm/stop":
                host.stop_spm()
                done = True
            else:
                host.service.fence(int(order.body.get("host_id", -1)), str(order.body.get("confirmation", "")))
                done = True
        except (Error, OSError, ValueError) as error:
            order.answer.put((409, {"error": str(error)}))
            return
        answer = host.report._asdict()
        order.answer.put((200, answer) if done else (409, {"error": answer["reason"] or "not now", **answer}))

    def _begin(self, order: _Order) -> None:
        """Run a command beside the loop, which goes on to look at the lease; one at a time."""
        argv = order.body.get("argv")
        if not isinstance(argv, list) or not all(isinstance(word, str) for word in argv):
            raise UsageError("argv must be a list of words")
        if self._host.report.role != "SPM":
            raise UsageError("this host does not manage the pool")
        if self._working is not None and self._working.is_alive():
            raise UsageError("another command is under way here")
        self._working = threading.Thread(target=self._work, args=(order, argv), name="command", daemon=True)
        self._working.start()

    def _work(self, order: _Order, argv: list[str]) -> None:
        out, err = io.StringIO(), io.StringIO()
        status = 1
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                status = self._run(argv)
        except SystemExit as ending:
            status = ending.code if isinstance(ending.code, int) else 2
        except Exception as error:
            err.write(f"qpool: {error}\n")
        order.answer.put((200, {"status": status, "stdout": out.getvalue(), "stderr": err.getvalue()}))


def run_host(loop: HostLoop, monitors: Monitors, socket_path: str | None) -> int:
    """Run until SIGTERM or SIGINT; returns the exit status: 0 after leaving, 1 if that took too long or failed."""
    asked = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: asked.set())
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with contextlib.ExitStack() as stack:
        if socket_path is not None:
            stack.callback(Endpoint(socket_path, loop.status, loop.tell).close)
        monitors.start()
        stack.callback(monitors.stop)
        loop.start()
        while not asked.wait(0.2) and not loop.ended.is_set():
            pass
        notify("STOPPING=1")
        # While a join waits for a host id there is nothing to give back.
        left = loop.status()["lockspace"] == "joining" or loop.leave()
    if loop.failed is not None:
        raise loop.failed
    return 0 if left and asked.is_set() else 1


def report_line(report: HostReport) -> dict[str, Any]:
    """Return *report* as one line of JSON tells it, with the wall clock and the one that goes on while asleep."""
    return {"time": round(time.time(), 6), "clock": round(_clock(), 6), **report._asdict()}
