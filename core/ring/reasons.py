"""What C's reasons for refusing a ring mean in words: `value` is what was seen (core/_native/ring.h)."""

from __future__ import annotations

from typing import Any

from cellvisor.core.errors import CellvisorError, Internal, RingError

_TEXTS = {
    "CV_BAD_JUMP": "avail.idx is {value} ahead, more than the queue's size",
    "CV_BAD_HEAD": "head {value} is outside the descriptor table",
    "CV_BAD_BUSY": "head {value} was offered while the device holds it",
    "CV_BAD_NEXT": "descriptor {value} is outside its table",
    "CV_BAD_LONG": "the chain of head {value} is longer than the queue (or a loop)",
    "CV_BAD_ADDRESS": "address {value:#x} is not RAM",
    "CV_BAD_EMPTY": "a buffer of length 0 at {value:#x}",
    "CV_BAD_ORDER": "a readable buffer at {value:#x} follows a writable one",
    "CV_BAD_TOTAL": "a chain of {value:#x} bytes",
    "CV_BAD_INDIRECT_OFF": "an indirect table at {value:#x}, but the feature was not accepted",
    "CV_BAD_INDIRECT_NESTED": "an indirect table at {value:#x} inside an indirect table",
    "CV_BAD_INDIRECT_NEXT": "an indirect descriptor is followed by descriptor {value}",
    "CV_BAD_INDIRECT_SIZE": "an indirect table of {value} bytes",
    "CV_BAD_SHARED": "the chain of head {value} shares descriptors with another",
    "CV_BAD_PIECES": "the chain of head {value} falls into too many pieces",
    "CV_BAD_SIZE": "size {value} is not a power of two up to the device's maximum",
    "CV_BAD_ALIGNMENT": "the ring part at {value:#x} is misaligned",
    "CV_BAD_DESC_RING": "the descriptor table at {value:#x} is not in one piece of RAM",
    "CV_BAD_AVAIL_RING": "the available ring at {value:#x} is not in one piece of RAM",
    "CV_BAD_USED_RING": "the used ring at {value:#x} is not in one piece of RAM",
    "CV_BAD_TABLE": "the range table (version {value}) makes no sense",
    "CV_BAD_STATE_CONFIG": "the state memfd knows other rings under this epoch (size {value})",
    "CV_BAD_STATE_VALUE": "the state memfd holds a head in state {value}",
    "CV_BAD_STATE_POS": "the state memfd holds a head at used position {value}, which cannot be",
    "CV_BAD_STATE_COUNTER": "the state memfd holds the counter {value:#x}",
}
# Mistakes of the device itself, not of the driver.
_OURS = {
    "CV_BAD_CHAIN": "the chain is not outstanding: completed before, or of an earlier activation",
    "CV_BAD_SENDING": "another chain is being sent",
}


def reason(lib: Any, code: int, index: int, value: int) -> CellvisorError:
    """Return the error for C's `code`, naming queue `index`: RingError, or Internal for our own mistakes."""
    for name, text in _TEXTS.items():
        if getattr(lib, name) == code:
            return RingError(f"queue {index}: {text.format(value=value)}")
    for name, text in _OURS.items():
        if getattr(lib, name) == code:
            return Internal(f"queue {index}: {text}")
    return Internal(f"queue {index}: ring error {code}")
