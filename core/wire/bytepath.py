"""The files and sockets at whose paths a guest's bytes go: opened, or only asked whether they could be."""

from __future__ import annotations

import errno
import os
import socket
import stat

from cellvisor.core.errors import Conflict, UsageError

MAX_PATH = 107  # bytes of a Unix socket's
_UNSUPPORTED = (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL)  # a file system without files that have no name


def open_file(path: str, *, append: bool) -> int:
    """Return a descriptor of a file to write to, made if it is not there. Raises UsageError."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | (0 if append else os.O_TRUNC)
    try:
        return os.open(path, flags | os.O_NONBLOCK, 0o644)
    except OSError as error:
        raise UsageError(f"file={path}: {error.strerror}") from None


def check_file(path: str) -> None:
    """Refuse what open_file() would, without making, emptying or opening what somebody could notice."""
    try:
        try:
            if stat.S_ISFIFO(os.stat(path).st_mode):
                if not os.access(path, os.W_OK):
                    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
                return
            os.close(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | os.O_NONBLOCK))
        except FileNotFoundError:
            _check_room(path)
    except OSError as error:
        raise UsageError(f"file={path}: {error.strerror}") from None


def listen(path: str) -> socket.socket:
    """Return a socket that listens at `path`, where nobody did. Raises UsageError, Conflict."""
    _check_length(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if _is_stale(path):
            os.unlink(path)
        sock.bind(path)
        sock.listen(1)
    except OSError as error:
        sock.close()
        raise UsageError(f"socket={path}: {error.strerror}") from None
    except Conflict:
        sock.close()
        raise
    return sock


def check_socket(path: str) -> None:
    """Refuse what listen() would, leaving what is there."""
    _check_length(path)
    try:
        _is_stale(path)
        _check_room(path)
    except OSError as error:
        raise UsageError(f"socket={path}: {error.strerror}") from None


def _check_length(path: str) -> None:
    if len(os.fsencode(path)) > MAX_PATH:
        raise UsageError(f"socket={path}: {len(os.fsencode(path))} bytes", hint=f"at most {MAX_PATH}")


def _check_room(path: str) -> None:
    """Raise the OSError that making a file at `path` would."""
    folder = os.path.dirname(os.path.realpath(path))
    try:
        os.close(os.open(folder, os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o600))
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise


def _is_stale(path: str) -> bool:
    """Say whether there is a socket that nobody listens on. Raises Conflict for anything else there."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise Conflict(f"socket={path} exists and is no socket", hint="name another path")
    except FileNotFoundError:
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return True
    raise Conflict(f"socket={path}: somebody listens there already", hint="name another path")
