"""A raw file or block device as a disk: vectored synchronous I/O, holes, and the lock that fences it.

Each process opens and locks the image itself (whole-file OFD lock, exclusive for writers): the kernel gives the
lock back only when the last request of a dead holder has ended, so who has it may replay. A read-only disk shares
the lock, which tells nothing: its I/O is synchronous and ends with the process. Knows nothing of guests or rings.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import stat
import struct
import time
from collections.abc import Callable, Sequence

from cellvisor.core import log
from cellvisor.core._native import _native
from cellvisor.core.errors import CellvisorError, Conflict, UsageError

SECTOR = 512
CHUNK = 1 << 20
FENCE_SECONDS = 10.0  # a killed process leaves I/O behind for up to 55 ms as measured; storage may be sick
TELL_SECONDS = 0.5
_IOV_MAX = os.sysconf("SC_IOV_MAX")
_FLOCK = struct.Struct("@hhqqi4x")  # struct flock of 64-bit Linux: type, whence, start, len, pid
_UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV, errno.EINVAL)

NOBODY = "a process that cannot be seen from here"

Views = Sequence[memoryview]


class Disk:
    """An open, locked image. Offsets and sizes are bytes; every failure of I/O is an OSError.

    `size` changes by resize() only; `logical` is the block size that direct I/O needs, `physical` the
    one that is fast. Raises UsageError or Conflict naming the path if it cannot be opened or locked; the
    lock is waited for up to `patience` seconds. `trial`: it is not taken, only asked for.
    """

    def __init__(self, path: str, *, readonly: bool = False, direct: bool = False, patience: float = 0.0,
                 trial: bool = False) -> None:
        self.path, self.readonly = path, readonly
        self._direct = direct
        flags = (os.O_RDONLY if readonly else os.O_RDWR) | os.O_CLOEXEC | os.O_NONBLOCK
        try:
            self.fd = os.open(path, flags | (os.O_DIRECT if direct else 0))
        except OSError as error:
            hint = ""
            if error.errno in (errno.EACCES, errno.EROFS) and not readonly:
                hint = "readonly=on opens it for reading only"
            if direct and error.errno == errno.EINVAL:
                hint = "its file system has no direct I/O: direct=off"
            raise UsageError(f"path={path}: {error.strerror}", hint=hint) from None
        try:
            self._measure()
            lock(self.fd, path, exclusive=not readonly, patience=patience, trial=trial)
        except BaseException:
            os.close(self.fd)
            raise

    def _measure(self) -> None:
        status = os.fstat(self.fd)
        self._block = stat.S_ISBLK(status.st_mode)
        self.logical, self.physical = SECTOR, SECTOR
        if self._block:
            shape = [_native.ffi.new(kind) for kind in ("uint64_t *", "uint32_t *", "uint32_t *")]
            result = _native.lib.cv_block_shape(self.fd, *shape)
            if result < 0:
                raise UsageError(f"path={self.path}: {os.strerror(-result)}")
            self.size, self.logical, self.physical = (int(word[0]) for word in shape)
        elif stat.S_ISREG(status.st_mode):
            self.size = status.st_size
            self.physical = 4096
            if self._direct:
                self.logical = self._direct_alignment()
        else:
            raise UsageError(f"path={self.path} is neither a file nor a block device")
        if self.size == 0 or self.size % self.logical:
            raise UsageError(f"path={self.path}: size {self.size} is not a multiple of {self.logical} bytes",
                             hint=f"truncate -s %{self.logical} makes it one" if self.size else "it is empty")

    def _direct_alignment(self) -> int:
        with mmap.mmap(-1, mmap.PAGESIZE) as page, memoryview(page) as view, view[:SECTOR] as sector:
            try:
                os.preadv(self.fd, [sector], 0)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise UsageError(f"path={self.path}: {error.strerror}") from None
                return 4096
        return SECTOR

    def is_at(self, path: str) -> bool:
        """Tell whether `path` is this very image."""
        try:
            there, here = os.stat(path), os.fstat(self.fd)
        except (OSError, ValueError):
            return False
        if self._block:
            return stat.S_ISBLK(there.st_mode) and there.st_rdev == here.st_rdev
        return os.path.samestat(there, here)

    def read(self, views: Views, offset: int) -> None:
        """Fill `views` from `offset` on."""
        self._move(os.preadv, views, offset, fill=True)

    def write(self, views: Views, offset: int) -> None:
        """Write `views` from `offset` on."""
        self._move(os.pwritev, views, offset, fill=False)

    def _move(self, call: Callable[..., int], views: Views, offset: int, fill: bool) -> None:
        rest = list(views)
        while rest:
            try:
                done = call(self.fd, rest[:_IOV_MAX], offset)
            except OSError as error:
                if not self._direct or error.errno != errno.EINVAL:
                    raise
                self._bounce(rest, offset, fill)
                return
            if done == 0:
                raise OSError(errno.EIO, "end of file inside the disk")
            offset += done
            rest = drop(rest, done)

    def _bounce(self, views: Views, offset: int, fill: bool) -> None:
        """Move through page-aligned memory: O_DIRECT takes no buffer at an odd address."""
        rest = list(views)
        with mmap.mmap(-1, CHUNK) as area, memoryview(area) as buffer:
            while rest:
                size = min(CHUNK, sum(map(len, rest)))
                with buffer[:size] as part:
                    if not fill:
                        _gather(part, rest)
                    done = (os.preadv if fill else os.pwritev)(self.fd, [part], offset)
                    if done == 0:
                        raise OSError(errno.EIO, "end of file inside the disk")
                    if fill:
                        _scatter(part[:done], rest)
                offset += done
                rest = drop(rest, done)

    def flush(self) -> None:
        """Make what was written durable."""
        os.fdatasync(self.fd)

    def discard(self, offset: int, size: int) -> None:
        """Give the space back if the image can; the bytes are undefined afterwards."""
        call = _native.lib.cv_block_discard if self._block else _native.lib.cv_file_punch
        result = call(self.fd, offset, size)
        if result < 0 and -result not in _UNSUPPORTED:
            raise OSError(-result, os.strerror(-result))

    def zero(self, offset: int, size: int, *, unmap: bool) -> None:
        """Make the bytes read as zero, giving the space back if `unmap` and the image can."""
        if self._block:
            calls = [_native.lib.cv_block_zero]
        else:
            calls = [_native.lib.cv_file_punch] if unmap else []
            calls.append(_native.lib.cv_file_zero)
        for call in calls:
            result = call(self.fd, offset, size)
            if result == 0:
                return
            if -result not in _UNSUPPORTED:
                raise OSError(-result, os.strerror(-result))
        with mmap.mmap(-1, CHUNK) as area, memoryview(area) as zeros:
            while size:
                with zeros[: min(size, CHUNK)] as part:
                    self.write([part], offset)
                    offset, size = offset + len(part), size - len(part)

    def resize(self, size: int, *, sparse: bool = True) -> None:
        """Cut the image or let it grow with zeros, whose space is taken at once if not `sparse`.

        The file's own size is the only record, and it changes in one step: whoever opens it next sees the old
        or the new one. Raises UsageError or Conflict with the reason; nothing has changed then.
        """
        more = self.check_resize(size, sparse=sparse)
        if not more:
            return
        try:
            if more > 0 and not sparse:
                self._reserve(more)
            os.truncate(self.fd, size)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.truncate(self.fd, self.size)  # what was reserved beyond the end goes back
            raise self._no_size(size, error) from None
        self.size = size

    def check_resize(self, size: int, *, sparse: bool = True) -> int:
        """Refuse what resize() would before it begins; returns how many bytes more it would make of the image."""
        key = f"desired_size={size}"
        if self._block:
            raise UsageError(f"{key}: {self.path} is a block device, whose size is the host's to change")
        if self.readonly:
            raise UsageError(f"{key}: {self.path} was opened with readonly=on, its size stays")
        if size <= 0:
            raise UsageError(f"{key}: a disk cannot be empty")
        if size % self.logical:
            raise UsageError(f"{key} is not a multiple of {self.logical}", hint="a disk consists of whole sectors")
        more = size - self.size
        try:
            room = os.fstatvfs(self.fd)
            if not sparse and more > room.f_bavail * room.f_frsize:  # a try would fill it first
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.lseek(self.fd, size, os.SEEK_SET)  # which fails where no file can be as large; nobody reads from there
        except OverflowError:
            raise UsageError(f"{key} is more than a file can have") from None
        except OSError as error:
            raise self._no_size(size, error) from None
        return more

    def _no_size(self, size: int, error: OSError) -> CellvisorError:
        key = f"desired_size={size}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return Conflict(f"{key}: the file system of {self.path} is full: {size - self.size} bytes more are wanted",
                            hint="make room, or use sparse=on", code="no-space")
        if error.errno in (errno.EFBIG, errno.EINVAL):
            return UsageError(f"{key} is more than the file system of {self.path} allows for one file")
        return UsageError(f"{key}: {self.path}: {error.strerror}")

    def _reserve(self, more: int) -> None:
        result = _native.lib.cv_file_reserve(self.fd, self.size, more)
        if result < 0 and -result not in _UNSUPPORTED:
            raise OSError(-result, os.strerror(-result))

    def close(self) -> None:
        """Close the image, which releases the lock."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def drop(views: Views, size: int) -> list[memoryview]:
    """Return `views` without their first `size` bytes."""
    for index, view in enumerate(views):
        if size < len(view):
            return [view[size:], *views[index + 1:]] if size else list(views[index:])
        size -= len(view)
    return []


def take(views: Views, size: int) -> list[memoryview]:
    """Return the first `size` bytes of `views`, or all if there are fewer."""
    taken: list[memoryview] = []
    for view in views:
        if size <= 0:
            break
        taken.append(view[:size])
        size -= len(view)
    return taken


def _gather(target: memoryview, views: Views) -> None:
    at = 0
    for view in take(views, len(target)):
        target[at : at + len(view)] = view
        at += len(view)


def _scatter(source: memoryview, views: Views) -> None:
    at = 0
    for view in take(views, len(source)):
        view[:] = source[at : at + len(view)]
        at += len(view)


def lock(fd: int, path: str, *, exclusive: bool, patience: float = 0.0, trial: bool = False) -> None:
    """Take the whole-file OFD lock, waiting for it up to `patience` seconds. Raises Conflict naming its holder.

    `trial`: raise as if, but do not take it.
    """
    wanted = _FLOCK.pack(fcntl.F_WRLCK if exclusive else fcntl.F_RDLCK, os.SEEK_SET, 0, 0, 0)

    def try_it() -> bool:
        try:
            if trial:
                return _is_free(fd, wanted)
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, wanted)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise UsageError(f"path={path} cannot be locked: {error.strerror}") from None
            return False
        return True

    if not _wait_for(try_it, lambda: f"path={path}: its lock is held by {holder(fd)}: waiting", patience):
        raise Conflict(f"path={path} is in use by {holder(fd)}", code="locked",
                       hint="several may read it (readonly=on), one alone may write")


def wait_released(path: str, patience: float = FENCE_SECONDS) -> None:
    """Return when no I/O of a dead process can be under way on `path`, without taking the lock.

    So it is when nobody holds the lock, or a process that lives: it got it from the dead one. A path that
    is gone has no I/O that matters. Raises Conflict if a holder that nobody can see stays `patience` seconds.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return

    def released() -> bool:
        return _is_free(fd, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)) or holder(fd) != NOBODY

    try:
        if not _wait_for(released, lambda: f"path={path}: I/O of a dead process is under way: waiting", patience):
            raise Conflict(f"path={path}: I/O of a dead process has been under way for {patience:g} s",
                           hint="the storage below it does not answer")
    finally:
        os.close(fd)


def _is_free(fd: int, wanted: bytes) -> bool:
    return bool(_FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_OFD_GETLK, wanted))[0] == fcntl.F_UNLCK)


def _wait_for(condition: Callable[[], bool], what: Callable[[], str], patience: float) -> bool:
    began, pause, told = time.monotonic(), 0.0005, False
    while not condition():
        waited = time.monotonic() - began
        if waited >= patience:
            return False
        if waited >= TELL_SECONDS and not told:
            told = True
            log.get("disk").warning("%s", what())
        time.sleep(pause)
        pause = min(2 * pause, 0.01)
    return True


def holder(fd: int) -> str:
    """Name a process that holds a lock on the file open as `fd`: F_OFD_GETLK tells no pid, fdinfo does."""
    status = os.fstat(fd)
    name = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino} "
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            for entry in os.listdir(f"/proc/{pid}/fdinfo"):
                with contextlib.suppress(OSError), open(f"/proc/{pid}/fdinfo/{entry}") as info:
                    if any(line.startswith("lock:") and name in line for line in info):
                        with open(f"/proc/{pid}/comm") as comm:
                            return f"{comm.read().strip()} (pid {pid})"
    return NOBODY
