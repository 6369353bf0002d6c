"""A file that the user named: opened once, read by offset, every complaint naming the flag and the path."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from types import TracebackType

from cellvisor.core.errors import UsageError


class Source:
    """A regular file of `size` bytes behind `fd`, which this object owns."""

    def __init__(self, fd: int, flag: str, path: str) -> None:
        """Take over `fd`. Raises UsageError if it is no regular file, or empty."""
        self._fd = fd
        self._label = f"{flag} {_shown(path)}"
        status = os.fstat(fd)
        self.size = status.st_size
        problem = ""
        if stat.S_ISDIR(status.st_mode):
            problem = "is a directory"
        elif not stat.S_ISREG(status.st_mode):
            problem = "is not a regular file"
        elif self.size == 0:
            problem = "is empty"
        if problem:
            self.close()
            raise self.error(problem)

    @classmethod
    def open(cls, flag: str, path: Path | str) -> Source:
        """Open `path` for reading; `flag` is what the user wrote, such as "--kernel"."""
        try:
            # O_NONBLOCK: a FIFO must be refused, not waited for.
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise UsageError(f"{flag} {_shown(str(path))}: {why.lower()}") from None
        return cls(fd, flag, str(path))

    def error(self, problem: str, hint: str = "") -> UsageError:
        """Return the error that says `problem` of this file."""
        return UsageError(f"{self._label}: {problem}", hint=hint)

    def read(self, offset: int, size: int) -> bytes:
        """Return exactly `size` bytes at `offset`. Raises UsageError if they are not there."""
        data = bytearray(size)
        self.read_into(offset, memoryview(data))
        return bytes(data)

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill `view` from `offset`. Raises UsageError if the file ends before."""
        done = 0
        while done < len(view):
            try:
                count = os.preadv(self._fd, [view[done:]], offset + done)
            except OSError as error:
                raise self.error(f"cannot be read: {error.strerror}") from None
            if count == 0:
                raise self.error(f"ends at byte {offset + done}, inside what should be there",
                                 hint="is it truncated?")
            done += count

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)

    def __enter__(self) -> Source:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()


def _shown(path: str) -> str:
    # A path may hold a line end or an escape sequence; a message is one line.
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in path)
