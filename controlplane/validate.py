"""The verb validate: what another verb would be refused for now is refused likewise, and nothing is done.

Each verb's file has its dry run beside it (`checks`), of the steps that the verb itself begins with. What only a
device's process can tell is asked of one that ends with the answer (devices/trial.py), or of the one that serves it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from cellvisor.controlplane import lifeverbs, plugverbs, ratelimit, swap
from cellvisor.controlplane.inventory import Device
from cellvisor.core.errors import UsageError
from cellvisor.core.wire.control import VERBS, Verb, check_args, check_fds, look_up

if TYPE_CHECKING:
    from cellvisor.controlplane.supervisor import Supervisor


def table(vm: Supervisor, turn: asyncio.Lock, admit: Callable[[Verb], None]) -> dict[str, plugverbs.Handler]:
    """Return verb -> handler(args, fds); `admit` raises CellvisorError for verbs that the VM's state rules out."""
    checks: dict[str, plugverbs.Handler] = {**lifeverbs.checks(vm, turn), **plugverbs.checks(vm),
                                            **ratelimit.checks(vm), **swap.checks(vm)}

    async def validate(args: dict[str, Any], fds: Sequence[int] = ()) -> dict[str, Any]:
        options = dict(args)
        name = options.pop("verb", None)
        verb = look_up(name) if isinstance(name, str) and name in VERBS else None  # says so if it is not supported yet
        if verb is None or verb.name not in checks:
            raise UsageError(f"validate: verb={str(name)[:40]!r} is not one that can be tried",
                             hint=f"verbs: {', '.join(checks)}")
        check_fds(verb, fds)
        given = check_args(verb, options)
        admit(verb)
        found = await checks[verb.name](given, *((fds,) if verb.takes_fds else ()))
        if isinstance(found, Device):
            return {"verb": verb.name, **_shown(found)}
        if isinstance(found, dict):
            return {"verb": verb.name, **found}
        return {"verb": verb.name, "devices": [_shown(device) for device in found]}

    return {"validate": validate}


def _shown(device: Device) -> dict[str, Any]:
    return {"id": device.id, "bdf": device.bdf, "type": device.type, "options": device.options}
