"""THE CONTRACT: what a device type is. One file with one class that has these names is a new device.

    absent --HELLO--> known --READY--> idle --ACTIVATE--> active --RESET--> idle
                                        ^                   |  ^
                                        |                   v  | RESUME
                                        +----- RESET ---- paused

The worker's main loop (devices/worker.py) owns rings, descriptors and messages; a device sees chains.
It is found by its file in devices/virtio/ or through the entry-point group `cellvisor.devices`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Protocol

from cellvisor.core.ring.queue import Chain as Chain
from cellvisor.core.ring.queue import Queue as Queue
from cellvisor.core.wire.options import DeviceOptions as DeviceOptions
from cellvisor.core.wire.options import option as option
from cellvisor.core.wire.spec import Spec as Spec
from cellvisor.core.wire.spec import Window as Window


class Host(Protocol):
    """What the worker offers to its device."""

    device_id: str
    generation: int
    activation: int  # of the driver: each has another number
    trial: bool  # whether __init__ can work is all that is asked (devices/trial.py): leave no mark outside of here

    def watch(self, fd: int, callback: Callable[[int], None], events: int = ...) -> None:
        """Call `callback(events)` while `fd` is ready (epoll, level-triggered)."""

    def unwatch(self, fd: int) -> None:
        """Stop watching `fd`."""

    def after(self, seconds: float, callback: Callable[[], None]) -> int:
        """Call `callback` once; returns an id for cancel()."""

    def cancel(self, timer: int) -> None:
        """Drop a timer."""

    def deposit(self, name: str, fd: int) -> None:
        """Keep `fd` in core's store under `name`: the next incarnation gets it from take().

        A pidfd as `process:<role>` shows a process that the device started as one of the VM's.
        """

    def take(self, name: str) -> int | None:
        """Return a duplicate of a stored descriptor (a predecessor's deposit, or the user's), or None."""

    def set_config(self, data: bytes) -> None:
        """Publish new device config bytes (same length as in the Spec) and raise the config interrupt."""

    def queue(self, index: int) -> Queue | None:
        """Return the active queue `index`, or None while the driver has not set it up."""

    def kick(self, index: int) -> None:
        """Have on_queue(index) called again soon (after a back end became ready)."""

    def enter_syscall(self) -> None:
        """Say that a call begins which may block for long (disk I/O): its limit is io_timeout, not hang_timeout."""

    def leave_syscall(self) -> None:
        """Say that it has ended."""

    def save(self, data: bytes, version: int = 1) -> None:
        """Keep `data` for the next incarnation, all or nothing (room: Spec.private_size). Not before on_activate."""

    def load(self) -> tuple[int, bytes]:
        """Return (version, data) as last saved, by whichever incarnation; (0, b"") if nothing was."""

    def backend(self, change: str, text: str) -> None:
        """Report that the back end was "lost" or "found" again, while the device serves."""

    def log(self, text: str) -> None:
        """Write a warning to the VM's log, named after the device."""


class Device(Protocol):
    """A device type. `Options` is a frozen dataclass derived from DeviceOptions with Cloud Hypervisor's
    key names, its fields declared by option(); `verb` ("disk") makes `--disk` and `add-disk` aliases of
    `--device-type NAME` and `add-virtio`.
    """

    Options: ClassVar[type[Any]]
    verb: ClassVar[str]
    help: ClassVar[str]

    def __init__(self, options: Any, host: Host) -> None:
        """Open the back end. Raise CellvisorError to refuse, naming key and value.

        In a trial the same is refused, but nothing is made, locked or taken that others could see.
        """

    @property
    def spec(self) -> Spec:
        """Say what the guest sees. Read once, after __init__."""

    def on_queue(self, index: int, queue: Queue) -> None:
        """Serve queue `index`: harvest chains, begin() and complete() each. Runs after a kick; must not block long.

        begin() is for requests, not for input buffers: one that kills its process again and again is told by it.
        """


class DeviceBase:
    """Defaults for the optional part of the contract; inherit or write your own."""

    verb: ClassVar[str] = ""
    help: ClassVar[str] = ""
    reads: ClassVar[tuple[int, ...]] = (1,)  # versions of what save() kept that this code understands: live upgrade

    def __init__(self, options: Any, host: Host) -> None:
        self.options = options
        self.host = host

    def on_activate(self, features: int) -> None:
        """The driver said DRIVER_OK; `features` is what it accepted."""

    def on_reset(self) -> None:
        """The driver reset the device: drop every chain you still hold; do not complete them."""

    def on_pause(self) -> None:
        """Finish or stop what is executing; on_queue is not called until on_resume."""

    def on_resume(self) -> None:
        """Go on."""

    def on_config(self, offset: int, data: bytes) -> None:
        """The driver wrote to device config space."""

    def call(self, verb: str, args: dict[str, Any]) -> Any:
        """Serve a verb of the API (resize, ...). Raise CellvisorError to refuse. `check` with the `verb` that is meant
        and its arguments: refuse what that would, and change nothing."""
        from cellvisor.core.errors import UsageError

        raise UsageError(f"{type(self).__name__.lower()} has no verb {verb!r}")

    @staticmethod
    def drain(index: int, chain: Chain) -> int | None:
        """Answer a request of queue `index` as failed, without a device: return how many bytes were written, or
        None to keep it (an input buffer, which must not come back empty)."""
        return 0

    @staticmethod
    def fence(options: Any) -> None:
        """Return when no I/O of an incarnation that died can be under way any more, without doing any."""

    def counters(self) -> dict[str, int]:
        """Return the device's counters since this incarnation began."""
        return {}

    def close(self) -> None:
        """Release the back end; the process ends after this."""
