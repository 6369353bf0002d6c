"""ZeroMQ with CURVE to a VM on another machine: either side knows the other's key, or nothing is said."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import zmq
from zmq.utils.monitor import recv_monitor_message

from cellvisor.core.errors import CellvisorError, NotFound, TryAgain
from cellvisor.ctl.remotes import Remote
from cellvisor.ctl.zmqlink import ZmqLink, prepare

CONNECT = 10.0  # seconds until both sides have proved their keys
IDLE_MS = 15000
AGAIN = 15.0     # seconds for a successor to answer, or a network to come back
ATTEMPT = 1.0
LOST = zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
WATCHED = LOST | zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_CONNECTED \
    | zmq.EVENT_CONNECT_RETRIED | zmq.EVENT_CLOSED


class CurveLink(ZmqLink):
    """A connection to `remote`. Raises at once if we are refused, or within `patience` seconds (10) if nobody is there.

    `timeout` in seconds is for each answer.
    """

    def __init__(self, remote: Remote, timeout: float, patience: float | None = None) -> None:
        self._remote, self._pair = remote, remote.pair()
        self._address = f"tcp://{remote.host}:{remote.port}"
        self._is_lost = False
        self._context = zmq.Context()
        self._socket: zmq.Socket[bytes] = self._context.socket(zmq.DEALER)
        self._monitor = self._socket.get_monitor_socket(WATCHED)
        try:
            self._secure(self._socket, remote.port)
            self._meet(time.monotonic() + min(CONNECT if patience is None else patience, timeout))
        except BaseException:
            self.close()
            raise
        super()._set_up(f"{remote.name} at {self._address}", timeout)

    def _secure(self, sock: zmq.Socket[bytes], port: int) -> None:
        prepare(sock)
        for option, value in (
                (zmq.CURVE_SERVERKEY, self._remote.server.encode()), (zmq.CURVE_PUBLICKEY, self._pair.public.encode()),
                (zmq.CURVE_SECRETKEY, self._pair.secret.encode()), (zmq.HEARTBEAT_IVL, IDLE_MS), (zmq.IPV6, 1),
                (zmq.HEARTBEAT_TIMEOUT, IDLE_MS), (zmq.RECONNECT_IVL, 250)):
            sock.setsockopt(option, value)
        try:
            sock.connect(f"tcp://{self._remote.host}:{port}")
        except zmq.ZMQError as error:
            raise NotFound(f"{self._remote.name}: {self._remote.host}: {error.strerror}", code="no-vm") from None

    def _subscribe(self) -> zmq.Socket[bytes]:
        sock = self._context.socket(zmq.SUB)
        self._secure(sock, self._remote.events)
        return sock

    def _meet(self, until: float) -> None:
        """Wait until the keys are proved. Raises what stands in the way."""
        was_connected = False
        while (left := until - time.monotonic()) > 0:
            if not self._monitor.poll(int(left * 1000) + 1):
                break
            event = recv_monitor_message(self._monitor)
            kind = event["event"]
            if kind == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                return
            if kind == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                raise self._refused(f"it does not know the public key {self._pair.public}",
                                    "its clients.toml, or what --api allow= says, must have it")
            if kind == zmq.EVENT_CONNECTED:
                was_connected = True
            elif kind & LOST and was_connected:
                raise self._refused(f"it is not the server with key {self._remote.server}, or has too many clients",
                                    "compare with cellvisor keys show server over there")
        raise NotFound(f"{self._remote.name}: nobody answers at {self._address}", code="no-vm",
                       hint="is the VM running with --api, and the port open?")

    def _refused(self, why: str, hint: str) -> CellvisorError:
        return CellvisorError(f"{self._remote.name} at {self._address} refused: {why}", hint=hint, code="refused")

    def is_alive(self) -> bool:
        """Tell whether the connection stands. One that broke may be a VM that ended, or only its network."""
        while not self._is_lost and self._monitor.poll(0):
            self._is_lost = bool(recv_monitor_message(self._monitor)["event"] & LOST)
        return not self._is_lost

    def wait(self, fds: Sequence[int], seconds: float) -> set[int]:
        """Wait until receive() would return (-1 is among what is returned), one of `fds` is readable, or time is up."""
        poller = zmq.Poller()
        for source in (self._socket, *fds):
            poller.register(source, zmq.POLLIN)
        return {-1 if source is self._socket else source for source, _ in poller.poll(int(seconds * 1000))}

    def lost(self, why: str = "") -> TryAgain:
        """Return the error for a connection that broke and does not come back."""
        return TryAgain(f"the connection to {self._where} is lost{why and ': '}{why}", code="no-answer",
                        hint="the VM ended, or its machine is out of reach")

    def _pilot(self) -> str:
        return ""  # not to be seen from here

    def _no_answer(self, verb: str, pilot: str) -> CellvisorError:
        if self._is_lost:
            return TryAgain(f"{verb}: the connection to {self._where} is lost", code="no-answer",
                            hint="the VM ended, or its machine is out of reach; what was asked for may be done")
        return super()._no_answer(verb, pilot)

    def close(self) -> None:
        """Disconnect."""
        if self._socket.closed:
            return
        self._socket.disable_monitor()
        self._monitor.close()
        super().close()

    def call(self, verb: str, args: dict[str, Any], fds: Sequence[int] = ()) -> Any:
        """Ask for `verb`. Raises the CellvisorError that is answered, or TryAgain."""
        if not self.is_alive():
            raise self._no_answer(verb, "")
        return super().call(verb, args, fds)


def again(link: CurveLink, remote: Remote, idle: Callable[[], None]) -> CurveLink:
    """Close `link`, whose connection broke, and return another. Raises TryAgain after AGAIN seconds.

    `idle` is called between attempts.
    """
    link.close()
    until = time.monotonic() + AGAIN
    while True:
        idle()
        began = time.monotonic()
        try:
            return CurveLink(remote, link.timeout, ATTEMPT)
        except CellvisorError as error:
            if time.monotonic() > until:
                raise link.lost(error.message) from None
        time.sleep(max(0.0, began + ATTEMPT - time.monotonic()))
