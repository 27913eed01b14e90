# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""A host's state on a Unix socket: JSON, Prometheus text, and what it can be told; HTTP without a network.

``GET /status`` and ``GET /metrics`` answer at once, from the last report;
``POST /spm/start``, ``/spm/stop``, ``/fence`` and ``/run`` are done by the host's own loop
and answered when they are done; ``/extend`` asks the manager through the mailbox.

Invariant: only who may open the socket (mode 0600) can ask; requests are
bounded, and a client that hangs holds up nobody else.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import socketserver
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler
from typing import Any, Final

from qcowlib.errors import StorageError, UsageError

__all__ = ["COMMANDS", "Endpoint", "answers", "ask", "metrics"]

#: What a host can be told.
COMMANDS: Final = ("/spm/start", "/spm/stop", "/fence", "/run", "/extend")
_MAX_BODY: Final = 1 << 20
_IDLE_S: Final = 10.0

Answer = tuple[int, dict[str, Any]]

_METRICS: Final = (
    ("qpool_host_id", "number of this host in its pool", "host_id"),
    ("qpool_spm_lver", "number of the term that is stored, -1 if unknown", "spm_lver"),
    ("qpool_spm_id", "host that manages the pool, -1 for nobody", "spm_id"),
    ("qpool_term", "number of this host's own term, -1 without the role", "lver"),
)


def _labelled(name: str, text: str, label: str, values: Mapping[str, float]) -> list[str]:
    lines = [f"# HELP {name} {text}", f"# TYPE {name} gauge"]
    return lines + [f'{name}{{{label}="{key}"}} {value:g}' for key, value in values.items()]


def metrics(status: Mapping[str, Any]) -> str:
    """Return *status* (the JSON of ``/status``) in the text form of Prometheus."""
    lines: list[str] = []
    for name, text, key in _METRICS:
        lines += [f"# HELP {name} {text}", f"# TYPE {name} gauge", f"{name} {status[key]}"]
    roles = {role: float(status["role"] == role) for role in ("Free", "Contend", "SPM")}
    lines += _labelled("qpool_role", "role of this host", "role", roles)
    states = {state: float(status["lockspace"] == state) for state in ("out", "joining", "joined", "lost")}
    lines += _labelled("qpool_lockspace", "state of this host in the lockspace", "state", states)
    domains: Mapping[str, Mapping[str, Any]] = status.get("domains", {})
    valid = {uuid: float(bool(domain["valid"])) for uuid, domain in domains.items()}
    lines += _labelled("qpool_domain_valid", "whether this host reads the domain", "domain", valid)
    delays = {uuid: domain["delay"] for uuid, domain in domains.items() if domain["delay"] is not None}
    lines += _labelled("qpool_domain_delay_seconds", "time of the last read", "domain", delays)
    return "\n".join(lines) + "\n"


class _Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True
    status: Callable[[], dict[str, Any]]
    tell: Callable[[str, dict[str, Any]], Answer]


class _Handler(BaseHTTPRequestHandler):
    timeout = _IDLE_S
    server: _Server

    def address_string(self) -> str:
        return "socket"

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the host's own lines are the log."""

    def _answer(self, code: int, body: str, kind: str = "application/json") -> None:
        data = body.encode()
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        status = self.server.status()
        if path in ("/", "/status"):
            self._answer(200, json.dumps(status) + "\n")
        elif path == "/metrics":
            self._answer(200, metrics(status), "text/plain; version=0.0.4")
        else:
            self._answer(404, '{"error": "there are /status and /metrics"}\n')

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "0")
        if not length.isdecimal() or int(length) > _MAX_BODY:
            self._answer(400, '{"error": "the body is too long"}\n')
            return
        # Read whatever the answer will be: who is still sending would not get it.
        raw = self.rfile.read(int(length))
        if self.path not in COMMANDS:
            self._answer(400, json.dumps({"error": f"a host is told one of {', '.join(COMMANDS)}"}) + "\n")
            return
        try:
            body = json.loads(raw or b"{}")
        except (ValueError, RecursionError):
            body = None
        if not isinstance(body, dict):
            self._answer(400, '{"error": "the body is no JSON object"}\n')
            return
        code, answer = self.server.tell(self.path, body)
        self._answer(code, json.dumps(answer) + "\n")


class Endpoint:
    """Serves *status* and passes commands to *tell*, in threads, until :meth:`close`."""

    def __init__(
        self, path: str, status: Callable[[], dict[str, Any]], tell: Callable[[str, dict[str, Any]], Answer]
    ) -> None:
        """Raises: UsageError for a path that is too long or in use."""
        self.path = path
        if os.path.lexists(path):
            if answers(path):
                raise UsageError("another host serves this socket", path=path)
            os.unlink(path)  # noqa: PTH108 - left by a host that was killed
        before = os.umask(0o177)
        try:
            self._server = _Server(path, _Handler)
        except OSError as error:
            raise UsageError(f"no socket can be made: {error.strerror or error}", path=path) from error
        finally:
            os.umask(before)
        self._server.status = status
        self._server.tell = tell
        threading.Thread(target=self._server.serve_forever, args=(0.1,), name="endpoint", daemon=True).start()

    def close(self) -> None:
        """End, and remove the socket."""
        self._server.shutdown()
        self._server.server_close()
        os.unlink(self.path)  # noqa: PTH108


def answers(path: str) -> bool:
    """Whether somebody listens on the socket *path*."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            return probe.connect_ex(path) == 0
        except OSError:
            # Longer than a socket's path may be.
            return False


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost")
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(self._path)


def ask(path: str, what: str, body: Mapping[str, Any] | None = None) -> tuple[int, str]:
    """Ask the host that serves the socket *path*; returns the HTTP status and the text of the answer.

    Raises: StorageError where nobody serves it.
    """
    connection = _Connection(path)
    try:
        connection.request("GET" if body is None else "POST", what, None if body is None else json.dumps(body))
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    except (OSError, http.client.HTTPException) as error:
        code = error.errno if isinstance(error, OSError) and error.errno else 5
        raise StorageError(code, path=path, operation="ask", message=f"no host answers: {os.strerror(code)}") from error
    finally:
        connection.close()
