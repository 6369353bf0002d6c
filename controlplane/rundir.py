"""Claim, keep and remove a VM's run directory.

`<dir>/lock` is OFD-locked, and core inherits the lock: while one of the two lives, the name is taken. `<dir>/pilot`
is locked by the controlplane alone: who gets that lock while the name is taken may adopt the VM.
A directory whose lock is free belongs to a dead VM and is emptied. A lock is only valid if the locked file is
still the one at the path: the previous owner may have removed it between our open and our lock.
"""

from __future__ import annotations

import contextlib
import os
import stat

from cellvisor.core.errors import Conflict, NotFound, UsageError
from cellvisor.core.wire import places

_AUTOMATIC = 1000


class RunDir:
    """A claimed run directory. Use claim() or adopt(); `lock_fd` is to be inherited by core.

    `token` lets the controlplane in at core, `generation` counts the controlplanes of this VM from 1.
    """

    def __init__(self, name: str, path: str, lock_fd: int, pilot_fd: int, token: str, generation: int) -> None:
        self.name = name
        self.path = path
        self.lock_fd = lock_fd
        self.token, self.generation = token, generation
        self._pilot_fd = pilot_fd
        self._pids: dict[str, int] = {}
        _rewrite(pilot_fd, f"pid {os.getpid()}\ngeneration {generation}\ntoken {token}\n")

    def file(self, name: str) -> str:
        """Return the path of `name` in the directory."""
        return os.path.join(self.path, name)

    def note(self, **pids: int) -> None:
        """Write process ids into the lock file, for people and for `ls`."""
        self._pids.update(pids)
        _rewrite(self.lock_fd, "".join(f"{word} {pid}\n" for word, pid in self._pids.items()))

    def inherit(self, lock_fd: int) -> None:
        """Hold the name too: `lock_fd`, ours from now on, is what core kept of the predecessor."""
        self.lock_fd = lock_fd
        self._pids = places.read_holder(lock_fd)
        self.note(pid=os.getpid())

    def let_go(self) -> None:
        """Steer no more; the VM, if there is one, may be adopted."""
        if self._pilot_fd >= 0:
            os.close(self._pilot_fd)
            self._pilot_fd = -1

    def remove(self) -> None:
        """Remove the directory and let the name go, if it is ours. Safe to call twice."""
        if self.lock_fd < 0:
            self.let_go()
            return
        _empty(self.path)
        with contextlib.suppress(OSError):
            os.unlink(self.file(places.LOCK))
        with contextlib.suppress(OSError):
            os.rmdir(self.path)
        self.let_go()
        os.close(self.lock_fd)
        self.lock_fd = -1


def adopt(name: str, base: str | None = None) -> RunDir:
    """Take over the pilot's lock of a VM whose controlplane died. Raises NotFound, or Conflict if one is alive."""
    path = places.vm_dir(name, base)
    if places.holder(path) is None:
        raise NotFound(f"no VM {name!r} is running", hint="see cellvisor ls", code="no-vm")
    try:
        fd = os.open(os.path.join(path, places.PILOT), os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        raise Conflict(f"{name}: it is only just starting", hint="see cellvisor ls", code="in-charge") from None
    words = dict(line.partition(" ")[::2] for line in os.pread(fd, 4096, 0).decode(errors="replace").splitlines())
    if not places.lock(fd):
        os.close(fd)
        raise Conflict(f"{name}: its controlplane is alive (process {words.get('pid', 'unknown')})",
                       hint="nothing to adopt", code="in-charge")
    if not words.get("token") or not words.get("generation", "").isdecimal():
        os.close(fd)
        raise Conflict(f"{name}: {places.PILOT} in {path} is not complete", hint="the VM ends by itself")
    return RunDir(name, path, -1, fd, words["token"], int(words["generation"]) + 1)


def claim(name: str | None = None, base: str | None = None) -> RunDir:
    """Claim `name`, or the first free of vm0, vm1, ... Raises Conflict naming the holder, or UsageError."""
    base = places.base_dir() if base is None else base
    if name is not None:
        return _claim(name, base)
    for number in range(_AUTOMATIC):
        with contextlib.suppress(Conflict):
            return _claim(f"vm{number}", base)
    raise Conflict(f"all names from vm0 to vm{_AUTOMATIC - 1} are taken", hint="give --name")


def _claim(name: str, base: str) -> RunDir:
    path = places.vm_dir(name, base)
    _own_directory(base)
    for _ in range(100):
        _own_directory(path)
        try:
            fd = os.open(os.path.join(path, places.LOCK), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        except FileNotFoundError:
            continue
        if not places.lock(fd):
            pids = places.read_holder(fd)
            os.close(fd)
            who = f"process {pids['pid']}" if "pid" in pids else "another process"
            raise Conflict(f"--name {name}: a VM of this name is running ({who})",
                           hint=f"choose another --name, or end it: cellvisor shutdown {name}")
        if _is_at(fd, os.path.join(path, places.LOCK)):
            _empty(path)
            pilot = os.open(os.path.join(path, places.PILOT), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            places.lock(pilot)
            rundir = RunDir(name, path, fd, pilot, os.urandom(16).hex(), 1)
            rundir.note(pid=os.getpid())
            return rundir
        os.close(fd)
    raise Conflict(f"--name {name}: {path} keeps changing hands", hint="try again")


def _rewrite(fd: int, text: str) -> None:
    data = text.encode()
    os.pwrite(fd, data, 0)
    os.ftruncate(fd, len(data))


def _is_at(fd: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


def _own_directory(path: str) -> None:
    """Make `path` a directory of ours with mode 0700, or refuse."""
    try:
        os.makedirs(path, 0o700, exist_ok=True)
        status = os.stat(path, follow_symlinks=False)
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
            raise UsageError(f"{path} is not a directory of user {os.geteuid()}",
                             hint="set XDG_RUNTIME_DIR to a directory of yours")
        if stat.S_IMODE(status.st_mode) != 0o700:
            os.chmod(path, 0o700)
    except (FileExistsError, NotADirectoryError):
        raise UsageError(f"{path} is not a directory", hint="remove it or set XDG_RUNTIME_DIR") from None
    except OSError as error:
        given = os.environ.get("XDG_RUNTIME_DIR", "")
        raise UsageError(f"XDG_RUNTIME_DIR={given}: cannot make run directory {path}: {error.strerror}",
                         hint="set it to a directory of yours") from None


def _empty(path: str) -> None:
    """Remove everything but the lock file."""
    with contextlib.suppress(OSError), os.scandir(path) as entries:
        for entry in entries:
            if entry.name == places.LOCK:
                continue
            if entry.is_dir(follow_symlinks=False):
                import shutil  # 10 ms that a start can spare

                shutil.rmtree(entry.path, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    os.unlink(entry.path)
