"""Talk to a running VM: `Client("web").call("pause")`, `for event in Client("web").events(): ...`."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from cellvisor.core.errors import NotFound, UsageError
from cellvisor.core.wire import keys, places

if TYPE_CHECKING:
    from cellvisor.ctl.curvelink import CurveLink
    from cellvisor.ctl.remotes import Remote

TIMEOUT = 90.0  # a pause waits for I/O in execution
ENVIRONMENT = "CELLVISOR_API_SOCKET"  # stands for --api-socket


def find(where: str | None = None) -> str:
    """Return the run directory of a VM given by name, by path, or by being the only one that runs.

    Raises NotFound (code "no-vm") or UsageError, naming the VMs that could be meant.
    """
    if where is not None and "/" in where:
        path = os.path.abspath(where)
        if not os.path.lexists(path):
            raise NotFound(f"no VM is running in {path}", hint="see cellvisor ls", code="no-vm")
        return path if os.path.isdir(path) else os.path.dirname(path)
    alive = places.running()
    if where is None:
        if len(alive) == 1:
            return places.vm_dir(next(iter(alive)))
        if alive:
            raise UsageError("several VMs are running: which one?", hint=f"name one of: {', '.join(alive)}")
        raise NotFound("no VM is running", hint="start one with cellvisor run", code="no-vm")
    if where not in alive:
        places.check_name(where)
        names = f"running: {', '.join(alive)}" if alive else "none is running; start one with cellvisor run"
        raise NotFound(f"no VM {where!r} is running", hint=names, code="no-vm")
    return places.vm_dir(where)


def named_socket() -> str | None:
    """Return the socket or directory that the environment or --api-socket names, if any."""
    return os.environ.get(ENVIRONMENT) or None


def _http_socket(where: str | None) -> str | None:
    """Return the path of the HTTP socket that is meant, if one is: any socket but those in a run directory."""
    if where is None:
        named = os.environ.get(ENVIRONMENT) or None
        return None if named is None or _is_in_run_dir(named) else named  # even if it is not there
    try:
        is_socket = "/" in where and stat.S_ISSOCK(os.stat(where).st_mode)
    except (OSError, ValueError):
        return None
    return where if is_socket and not _is_in_run_dir(where) else None


def _remote(where: str | None) -> Remote | None:
    """Return the VM on another machine that is meant, if one is. Raises UsageError if the name is one here, too."""
    if where is None or "/" in where or not os.path.exists(os.path.join(keys.config_dir(), keys.REMOTES)):
        return None
    from cellvisor.ctl import remotes

    found = remotes.find(where)
    if found is not None and where in places.running():
        raise UsageError(f"{where}: runs here, and is a name in {remotes.path()}",
                         hint=f"give the remote one another name, or write {places.vm_dir(where)} for this one")
    return found


def _is_in_run_dir(path: str) -> bool:
    folder = path if os.path.isdir(path) else os.path.dirname(os.path.abspath(path))
    return os.path.exists(os.path.join(folder, places.LOCK))


class Link(Protocol):
    """A way to reach a VM."""

    def call(self, verb: str, args: dict[str, Any], fds: Sequence[int] = ()) -> Any:
        """Ask and return the answer; descriptors go along."""

    def events(self, since: int, follow: bool) -> Iterator[dict[str, Any]]:
        """Yield kept events, then new ones."""

    def is_alive(self) -> bool:
        """Tell whether there is a process to ask."""

    def close(self) -> None:
        """Disconnect."""


class Client:
    """A connection to one VM's API. Synchronous; not to be shared between threads. `name` is for people."""

    def __init__(self, where: str | None = None, timeout: float = TIMEOUT) -> None:
        """Connect to the VM that `where` means: a name or run directory (see find()), or the path of its HTTP socket.

        A name that no VM here has may be one of remotes.toml (see ctl/remotes.py).
        Without `where` the environment may name a socket. `timeout` in seconds is for each answer.
        """
        http = _http_socket(where)
        self._remote = remote = _remote(where) if http is None else None
        self._link: Link
        self.far: CurveLink | None = None  # the link to a VM on another machine, for who asks without waiting
        if http is not None:
            from cellvisor.ctl.httplink import HttpLink

            self.path = self.name = http
            self._link = HttpLink(http, timeout)
        elif remote is not None:
            from cellvisor.ctl.curvelink import CurveLink

            self.path = self.name = remote.name
            self._link = self.far = CurveLink(remote, timeout)
        else:
            from cellvisor.ctl.zmqlink import ZmqLink

            self.path = find(where or os.environ.get(ENVIRONMENT) or None)
            self.name = self.path.rpartition("/")[2]
            self._link = ZmqLink(self.path, timeout)

    @property
    def is_remote(self) -> bool:
        """Whether the VM is on another machine."""
        return self.far is not None

    def is_alive(self) -> bool:
        """Tell whether there is a process to ask; from another machine, whether the connection stands."""
        return self._link.is_alive()

    def connect_again(self, idle: Callable[[], None] = lambda: None) -> None:
        """Connect again to a VM on another machine: it may have a successor. Raises TryAgain if nobody answers.

        `idle` is called between attempts.
        """
        from cellvisor.ctl.curvelink import again

        assert self.far is not None
        assert self._remote is not None
        self._link = self.far = again(self.far, self._remote, idle)

    def call(self, verb: str, /, *fds: int, **args: Any) -> Any:
        """Ask for `verb` and return the answer; `fds` go along, over HTTP. Raises the CellvisorError that is answered.

        Raises TryAgain (code "no-answer") after the time-out: the VM may still do what was asked.
        """
        return self._link.call(verb, args, fds)

    def events(self, since: int = 0, follow: bool = True) -> Iterator[dict[str, Any]]:
        """Yield kept events with a number above `since`, then new ones until the VM ends."""
        return self._link.events(since, follow)

    def wait_gone(self, timeout: float) -> bool:
        """Wait until the process has ended and its place is free; False after `timeout` seconds."""
        until = time.monotonic() + timeout
        while self._link.is_alive():
            if time.monotonic() > until:
                return False
            time.sleep(0.02)
        return True

    def close(self) -> None:
        """Disconnect."""
        self._link.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *args: object) -> None:
        self.close()
