"""The state of the machine, and which changes are legal.

    created --boot--> running <--pause/resume--> paused
                         |  \\--- guest or user reset ---> resetting --> running
                         +--- guest power-off, quit ---> stopped
                         +--- KVM error ---------------> crashed
"""

from __future__ import annotations

from enum import StrEnum

from cellvisor.core.errors import Conflict


class State(StrEnum):
    CREATED = "created"
    RUNNING = "running"
    PAUSED = "paused"
    RESETTING = "resetting"
    STOPPED = "stopped"
    CRASHED = "crashed"


LEGAL: dict[State, frozenset[State]] = {
    State.CREATED: frozenset({State.RUNNING, State.STOPPED}),
    State.RUNNING: frozenset({State.PAUSED, State.RESETTING, State.STOPPED, State.CRASHED}),
    State.PAUSED: frozenset({State.RUNNING, State.RESETTING, State.STOPPED, State.CRASHED}),
    State.RESETTING: frozenset({State.RUNNING, State.PAUSED, State.STOPPED, State.CRASHED}),
    State.STOPPED: frozenset(),
    State.CRASHED: frozenset({State.STOPPED, State.RESETTING}),
}


def change(old: State, new: State) -> State:
    """Return `new`, or raise Conflict naming both states."""
    if new not in LEGAL[old]:
        raise Conflict(f"the VM is {old}, so it cannot become {new}", hint="see `cellvisor info`")
    return new
