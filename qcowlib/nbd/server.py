# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""The server: one thread that accepts, one blocking thread a connection.

Invariants: at most *shared* connections at once, further ones wait in the
kernel; a connection that does not finish its negotiation in time is dropped,
and one that for some time takes no answer or leaves a request half sent;
no error of a connection reaches another one or the caller; when
:meth:`NbdServer.stop` returns no thread is left and all that clients wrote is
durable.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket as net
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from struct import Struct
from typing import TYPE_CHECKING, Final

from qcowlib.errors import Error, UsageError, printable
from qcowlib.gate import References, qemu_like
from qcowlib.image import Image
from qcowlib.image import open as open_image
from qcowlib.nbd.address import Listener
from qcowlib.nbd.export import Export
from qcowlib.nbd.negotiation import Agreed, Negotiation
from qcowlib.nbd.transmission import Ended, Transmission, send_all

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Literal

    from qcowlib.image import CacheMode
    from qcowlib.opening import Secrets, Source

    Event = dict[str, int | str | None]

__all__ = ["NbdServer", "serve"]

MAX_SHARED: Final = 1024
_HANDSHAKE_SECONDS: Final = 10.0
_STALL_SECONDS: Final = 60.0
_MAX_STALL: Final = 1_000_000
_GRACE_SECONDS: Final = 5.0
_RETRY_SECONDS: Final = 0.05
_RECEIVE: Final = 4096
#: What accept may say without meaning that it is over.
_PASSING: Final = frozenset(
    (
        errno.EAGAIN,
        errno.ECONNABORTED,
        errno.EPROTO,
        errno.EPERM,
        errno.EMFILE,
        errno.ENFILE,
        errno.ENOBUFS,
        errno.ENOMEM,
    )
)


class NbdServer:
    """Serves *exports* over NBD from its construction until :meth:`stop`; a context manager.

    Clients ask for exports by name; the first is also the one they get without
    a name.  One of *socket* (path of a Unix socket, made with mode 0600), *port*
    (of 127.0.0.1; 0 takes any) and *fd* (a listening descriptor, which stays the
    caller's) says where; without one it is a new Unix socket in a private folder.
    *shared* is how many connections there may be at once (1 to 1024).
    With *once* the server ends when the last client has gone.  A client that
    takes no answer, or leaves a request half sent, for *timeout* seconds is
    dropped (``None``: never); one that asks nothing is not.  *on_event* is
    called with a dict that has an ``event``: ``connected``, ``negotiated``,
    ``disconnected`` (with ``requests`` and ``problem``), from several threads.

    Raises: UsageError, Busy, StorageError.
    """

    def __init__(
        self,
        exports: Iterable[Export],
        *,
        socket: str | os.PathLike[str] | None = None,
        port: int | None = None,
        fd: int | None = None,
        shared: int = 16,
        once: bool = False,
        timeout: float | None = _STALL_SECONDS,
        handshake_timeout: float = _HANDSHAKE_SECONDS,
        on_event: Callable[[Event], object] | None = None,
    ) -> None:
        given = list(exports)
        self.exports = {export.name: export for export in given}
        if not given or len(self.exports) != len(given):
            raise UsageError("exports need different names" if given else "nothing to export")
        if not 1 <= shared <= MAX_SHARED:
            raise UsageError(f"the number of clients must be from 1 to {MAX_SHARED}")
        if timeout is not None and not 0 < timeout <= _MAX_STALL:
            raise UsageError(f"the time for an answer must be above 0 and at most {_MAX_STALL} seconds")
        self._infos = {name: export.info for name, export in self.exports.items()}
        self._once = once
        self._stall = _timeval(timeout)
        self._timeout = handshake_timeout
        self._on_event = on_event or (lambda event: None)
        self._owned: list[Image] = []
        self._room = threading.BoundedSemaphore(shared)
        self._lock = threading.Lock()
        self._connections: dict[int, tuple[threading.Thread, net.socket]] = {}
        self._count = 0
        self._ending = False
        self._stopped = False
        self._listener = Listener(path=None if socket is None else os.fspath(socket), port=port, fd=fd)
        self._listener.socket.setblocking(False)
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._acceptor = threading.Thread(target=self._accept, name="nbd-accept", daemon=True)
        self._acceptor.start()

    @property
    def socket(self) -> str | None:
        """Path of the Unix socket, if it is one."""
        return self._listener.path

    @property
    def port(self) -> int | None:
        """The TCP port, if it is one."""
        return self._listener.port

    @property
    def uri(self) -> str:
        """The address of the first export."""
        return self.uri_of(next(iter(self.exports)))

    def uri_of(self, name: str) -> str:
        """Return the address of export *name*."""
        return self._listener.uri(name)

    @property
    def connections(self) -> int:
        """How many clients are connected."""
        with self._lock:
            return len(self._connections)

    # -- accepting -------------------------------------------------------------------

    def _accept(self) -> None:
        poll = select.poll()
        poll.register(self._listener.socket, select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        while not self._ending:
            self._room.acquire()
            poll.poll()
            try:
                if self._ending:
                    break
                channel, _ = self._listener.socket.accept()
            except OSError as error:
                self._room.release()
                if error.errno not in _PASSING:
                    break
                # Out of descriptors, or a client that went at once: the next one may do.
                self.wait(_RETRY_SECONDS)
                continue
            self._start(channel)
        self.request_stop()

    def _start(self, channel: net.socket) -> None:
        channel.settimeout(None)
        with self._lock:
            self._count += 1
            number = self._count
            thread = threading.Thread(target=self._serve, args=(number, channel), name=f"nbd-{number}", daemon=True)
            try:
                # Under the lock: who sees the thread may join it.
                thread.start()
            except RuntimeError:
                started = False
            else:
                started = True
                self._connections[number] = thread, channel
        if not started:
            # No more threads on this machine.
            self._gone(number, channel)

    def _gone(self, number: int, channel: net.socket) -> None:
        channel.close()
        with self._lock:
            self._connections.pop(number, None)
            last = not self._connections
        self._room.release()
        if self._once and last:
            self.request_stop()

    # -- one connection --------------------------------------------------------------

    def _serve(self, number: int, channel: net.socket) -> None:
        problem: str | None = None
        worker: Transmission | None = None
        try:
            self._tell(event="connected", client=number)
            prepared = self._negotiate(channel)
            if prepared is not None:
                agreed, rest = prepared
                export = self.exports[agreed.export.name]
                self._tell(event="negotiated", client=number, export=export.name)
                worker = Transmission(channel, export, agreed, rest)
                worker.run()
        except TimeoutError:
            problem = "the client did not finish its negotiation in time"
        except BlockingIOError:
            problem = "the client took no answer, or did not finish a request, in time"
        except (Ended, Error) as error:
            problem = str(error)
        except OSError as error:
            problem = error.strerror or str(error)
        except Exception as error:
            problem = f"internal error: {type(error).__name__}: {printable(str(error))}"
        finally:
            requests = worker.requests if worker is not None else 0
            self._tell(event="disconnected", client=number, requests=requests, problem=problem)
            self._gone(number, channel)

    def _tell(self, **event: int | str | None) -> None:
        # A listener that fails has nobody to fail to here.
        with contextlib.suppress(Exception):
            self._on_event(event)

    def _negotiate(self, channel: net.socket) -> tuple[Agreed, bytes] | None:
        """Negotiate within the time for it; ``None`` when the client does not want to go on."""
        end = time.monotonic() + self._timeout
        if channel.family != net.AF_UNIX:
            channel.setsockopt(net.IPPROTO_TCP, net.TCP_NODELAY, 1)
            channel.setsockopt(net.SOL_SOCKET, net.SO_KEEPALIVE, 1)
        talk = Negotiation(self._infos)
        answer = talk.greeting()
        while True:
            channel.settimeout(max(end - time.monotonic(), 0.001))
            if talk.closed:
                # A client that said goodbye need not wait for the answer.
                with contextlib.suppress(OSError):
                    send_all(channel, [answer])
                return None
            if answer:
                send_all(channel, [answer])
            if talk.agreed is not None:
                # By the kernel: a call that waits for nothing costs nothing.
                channel.settimeout(None)
                channel.setsockopt(net.SOL_SOCKET, net.SO_SNDTIMEO, self._stall)
                channel.setsockopt(net.SOL_SOCKET, net.SO_RCVTIMEO, self._stall)
                return talk.agreed, bytes(talk.rest)
            if time.monotonic() > end:
                raise TimeoutError
            if answer:
                answer = talk.feed(b"")
                continue
            data = channel.recv(_RECEIVE)
            if not data:
                return None
            answer = talk.feed(data)

    # -- ending ----------------------------------------------------------------------

    def request_stop(self) -> None:
        """Let :meth:`wait` return; may be called from a signal handler."""
        # No lock is taken: a signal may come while one is held.
        self._ending = True
        if self._wake >= 0:
            with contextlib.suppress(OSError):
                os.eventfd_write(self._wake, 1)

    def wait(self, timeout: float | None = None) -> bool:
        """Return when the server is to end (true), or after *timeout* seconds."""
        if not self._ending:
            poll = select.poll()
            poll.register(self._wake, select.POLLIN)
            poll.poll(None if timeout is None else timeout * 1000)
        return self._ending

    def stop(self) -> None:
        """End: requests at hand are answered, all is made durable, and what :func:`serve` opened is closed.

        A second call does nothing.  Raises: StorageError when it could not be made durable.
        """
        if self._stopped:
            return
        self._stopped = True
        self.request_stop()
        self._end_connections(net.SHUT_RD, time.monotonic() + _GRACE_SECONDS)
        self._end_connections(net.SHUT_RDWR, None)
        self._acceptor.join()
        # One that was accepted meanwhile.
        self._end_connections(net.SHUT_RDWR, None)
        self._listener.close()
        wake, self._wake = self._wake, -1
        os.close(wake)
        self._finish()

    def _end_connections(self, how: int, until: float | None) -> None:
        with self._lock:
            connections = list(self._connections.values())
        for _, channel in connections:
            with contextlib.suppress(OSError):
                channel.shutdown(how)
        for thread, _ in connections:
            thread.join(None if until is None else max(until - time.monotonic(), 0.0))

    def _finish(self) -> None:
        first: Error | None = None
        for export in self.exports.values():
            try:
                if not export.read_only and not export.image.closed:
                    export.image.flush()
            except Error as error:
                first = first or error
        for image in self._owned:
            try:
                image.close()
            except Error as error:
                first = first or error
        if first is not None:
            raise first

    def __enter__(self) -> NbdServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def _timeval(seconds: float | None) -> bytes:
    """The option value of a time limit of a socket; none is zero there."""
    whole, parts = divmod(int((seconds or 0) * 1_000_000), 1_000_000)
    return Struct("@ll").pack(whole, parts if seconds is None or whole else max(parts, 1))


def serve(
    images: Source | Image | Mapping[str, Source | Image],
    *,
    name: str = "",
    writable: bool = False,
    snapshot: str | None = None,
    bitmaps: Iterable[str] = (),
    format: str | None = None,
    references: References = qemu_like,
    cache: CacheMode = "writeback",
    force_share: bool = False,
    secret: Secrets | None = None,
    discard: Literal["unmap", "ignore"] = "unmap",
    socket: str | os.PathLike[str] | None = None,
    port: int | None = None,
    fd: int | None = None,
    shared: int = 16,
    once: bool = False,
    timeout: float | None = _STALL_SECONDS,
    on_event: Callable[[Event], object] | None = None,
) -> NbdServer:
    """Serve one image under *name*, or several as a mapping from names, over NBD; see :class:`NbdServer`.

    What is not an open :class:`Image` is opened as by :func:`qcowlib.open`, for reading unless *writable*,
    and closed by :meth:`NbdServer.stop`; an open one stays the caller's.  *bitmaps* are names of
    persistent bitmaps that clients may ask for as ``qemu:dirty-bitmap:NAME``.

    Raises: as :func:`qcowlib.open` and :class:`NbdServer`.
    """
    chosen = tuple(bitmaps)
    opened: list[Image] = []
    exports = []
    try:
        for key, source in (images if isinstance(images, Mapping) else {name: images}).items():
            image = source
            if not isinstance(image, Image):
                image = open_image(
                    image,
                    "r+" if writable else "r",
                    format=format,
                    snapshot=snapshot,
                    references=references,
                    cache=cache,
                    force_share=force_share,
                    secret=secret,
                    discard=discard,
                )
                opened.append(image)
            exports.append(Export(image, key, read_only=not writable, bitmaps=chosen))
        server = NbdServer(
            exports, socket=socket, port=port, fd=fd, shared=shared, once=once, timeout=timeout, on_event=on_event
        )
    except BaseException:
        for image in opened:
            image.close()
        raise
    server._owned += opened
    return server
