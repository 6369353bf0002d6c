"""Every error that cellvisor raises on purpose.

CellvisorError                 has a machine code, one sentence and a hint
 +- UsageError                 the request or the command line is wrong (HTTP 400, exit status 2)
 +- NotFound                   no such VM, device or file (404)
 +- Conflict                   not now, or exists already (409)
 +- TryAgain                   later it may work (429)
 +- Internal                   ours (500)
 +- RingError                  the guest's ring or memory reference is wrong: the device gets NEEDS_RESET
"""

from __future__ import annotations


class CellvisorError(Exception):
    """Say what is wrong in one line; `code` is for programs, `hint` says what to do."""

    code = "internal"
    status = 500

    def __init__(self, message: str, *, hint: str = "", code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        if code is not None:
            self.code = code

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message

    def as_wire(self) -> dict[str, object]:
        """Return the error as it travels in a reply."""
        return {"code": self.code, "status": self.status, "message": self.message, "hint": self.hint}


class UsageError(CellvisorError):
    code = "bad-request"
    status = 400


class NotFound(CellvisorError):
    code = "not-found"
    status = 404


class Conflict(CellvisorError):
    code = "conflict"
    status = 409


class TryAgain(CellvisorError):
    code = "try-again"
    status = 429


class Internal(CellvisorError):
    pass


class RingError(CellvisorError):
    """The driver broke a rule of the virtqueue: message says which, with the value seen."""

    code = "bad-ring"


_BY_STATUS: dict[object, type[CellvisorError]] = {
    cls.status: cls for cls in (UsageError, NotFound, Conflict, TryAgain, Internal)
}


def from_wire(body: dict[str, object]) -> CellvisorError:
    """Make the error that a reply carries."""
    cls = _BY_STATUS.get(body.get("status"), Internal)
    return cls(str(body.get("message", "")), hint=str(body.get("hint", "")), code=str(body.get("code", "")))
