"""What core holds for its controlplane: whom it listens to, and the state that a successor reads back.

    generation 1 --a message with the token and a higher generation--> that one; earlier ones are strangers

The state travels inside the request whose step it records (`blob` in its args) and is kept when the step was
taken, so a successor sees either both or neither. To core it is opaque: only its size is judged.
"""

from __future__ import annotations

from cellvisor.core.errors import UsageError

MAX_BLOB = 1 << 20
DIGITS = 9  # of a generation: more than one restart a second for thirty years


class Custody:
    """The controlplane of the day and its state, b"" until the first was recorded."""

    def __init__(self, token: str) -> None:
        self._token = token
        self.generation = 1
        self.blob = b""

    @property
    def identity(self) -> str:
        """The ZeroMQ routing id of the present controlplane."""
        return f"controlplane/{self.generation}/{self._token}"

    def admits(self, identity: str) -> bool:
        """Tell whether `identity` is the present controlplane, or a successor, who is the present one from now on."""
        role, _, rest = identity.partition("/")
        number, _, token = rest.partition("/")
        known = role == "controlplane" and token == self._token and number.isdecimal() and len(number) <= DIGITS
        if known and int(number) > self.generation:
            self.generation = int(number)
        return known and int(number) == self.generation

    @staticmethod
    def checked(blob: object) -> bytes:
        """Return `blob`. Raises UsageError if it is not bytes or too long."""
        if type(blob) is not bytes or not 0 < len(blob) <= MAX_BLOB:
            size = len(blob) if type(blob) is bytes else type(blob).__name__
            raise UsageError(f"blob: {size}, not 1 to {MAX_BLOB} bytes")
        return blob
