"""Where a VM's files are: `$XDG_RUNTIME_DIR/cellvisor/<name>/` with mode 0700, else `/run/cellvisor/<name>/`.

Clients, the controlplane and core agree on these names; nothing here creates or changes a file.
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Mapping

from cellvisor.core.errors import UsageError

MAX_SOCKET_PATH = 107  # sizeof(sockaddr_un.sun_path) - 1
LONGEST = "nursery-99.sock"
MAX_NAME = 64

LOCK = "lock"
LOG = "log"  # of all processes, unless --log-file names another one
PILOT = "pilot"  # locked by the controlplane of the day alone; holds what a successor needs to be let in
API = "api.sock"
EVENTS = "events.sock"
TCP = "tcp.sock"  # the same two, for those who come by TCP
TCP_EVENTS = "tcp-events.sock"
CORE = "core.sock"
FDS = "fds.sock"
CONTROL = "control.sock"
NURSERY = "nursery.sock"
MAX_NURSERIES = 100
PROCESS = "process:"  # how the name of a stored pidfd begins that shows a process as one of the VM's


def nursery(number: int) -> str:
    """Return the socket name of the `number`th nursery of a VM."""
    return f"nursery-{number}.sock" if number else NURSERY


def base_dir(environ: Mapping[str, str] | None = None) -> str:
    """Return the directory that holds the run directories of this user's VMs."""
    runtime = (os.environ if environ is None else environ).get("XDG_RUNTIME_DIR", "")
    return os.path.join(runtime if runtime.startswith("/") else "/run", "cellvisor")


def is_word(text: str) -> bool:
    """Tell whether a text can name something: ASCII letters, digits, '.', '_' and '-', at least one."""
    return bool(text) and text.isascii() and all(char.isalnum() or char in "._-" for char in text)


def check_name(name: str) -> str:
    """Return `name` if it can name a VM. Raises UsageError saying what is allowed."""
    if not (is_word(name) and name[0].isalnum()) or len(name) > MAX_NAME:
        raise UsageError(f"--name {name[:80]!r} cannot name a VM",
                         hint=f"a letter or digit, then letters, digits, '.', '_' or '-', at most {MAX_NAME}")
    return name


def vm_dir(name: str, base: str | None = None) -> str:
    """Return the run directory of VM `name`. Raises UsageError if its socket paths would be too long."""
    path = os.path.join(base_dir() if base is None else base, check_name(name))
    longest = len(os.fsencode(os.path.join(path, LONGEST)))
    if longest > MAX_SOCKET_PATH:
        raise UsageError(f"--name {name}: socket paths in {path} have up to {longest} bytes, "
                         f"at most {MAX_SOCKET_PATH} work", hint="choose a shorter name or XDG_RUNTIME_DIR")
    return path


_FLOCK = struct.Struct("@hhqqi4x")  # struct flock of 64-bit Linux: type, whence, start, len, pid


def lock(fd: int) -> bool:
    """Take the lock of the open file `fd` (OFD: who inherits it holds it too); False if it is held."""
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
    except (BlockingIOError, PermissionError):
        return False
    return True


def is_locked(fd: int) -> bool:
    """Tell whether another open file holds the lock, without taking it."""
    query = _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, 0, 0, 0)
    kind: int = _FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_OFD_GETLK, query))[0]
    return kind != fcntl.F_UNLCK


def holder(path: str) -> dict[str, int] | None:
    """Return {"pid": ..., "core": ...} of the VM that holds run directory `path`, None if nobody does."""
    try:
        fd = os.open(os.path.join(path, LOCK), os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return read_holder(fd) if is_locked(fd) else None
    finally:
        os.close(fd)


def read_holder(fd: int) -> dict[str, int]:
    """Return what the lock file says: lines of `word number`."""
    words = [line.split() for line in os.pread(fd, 4096, 0).decode(errors="replace").splitlines()]
    return {pair[0]: int(pair[1]) for pair in words if len(pair) == 2 and pair[1].isdecimal()}


def running(base: str | None = None) -> dict[str, dict[str, int]]:
    """Return the VMs of this user that are alive: name to process ids, sorted by name."""
    base = base_dir() if base is None else base
    try:
        names = sorted(os.listdir(base))
    except OSError:
        return {}
    found = {name: holder(os.path.join(base, name)) for name in names}
    return {name: pids for name, pids in found.items() if pids is not None}
