"""The controlplane's state as it is kept in core: everything that a successor cannot ask core or the nurseries for.

msgpack, {"v": VERSION, ...}. A reader refuses versions that it does not know; unknown keys of its own are an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from cellvisor.controlplane.config import Cpus, Memory, Payload, Serial, VmConfig
from cellvisor.controlplane.flags import RunFlags
from cellvisor.controlplane.inventory import Device, Wanted
from cellvisor.core.errors import Conflict, UsageError
from cellvisor.core.wire.budget import RateLimitGroup
from cellvisor.core.wire.messages import pack, unpack

VERSION = 1


@dataclass(frozen=True, slots=True)
class Life:
    """The latest incarnation of a device: which one core expects, and whether it was given up.

    `restarts` are the moments of its latest restarts (CLOCK_MONOTONIC, s), `served` whether any one ever served.
    """

    generation: int
    token: str
    parked: bool = False
    reason: str = ""
    served: bool = False
    restarts: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Record:
    """What one controlplane leaves to the next.

    `configured` says that core has a machine, `inventory` is Inventory.state(). `present` and `homes` are nurseries
    by number; `terminal` is what the user's terminal was like; `parts` belongs to others, each under its own key.
    """

    flags: RunFlags
    config: VmConfig
    began: int
    created: bool = False
    configured: bool = False
    inventory: Mapping[str, Any] = field(default_factory=dict)
    lives: Mapping[str, Life] = field(default_factory=dict)
    present: int = 0
    homes: Mapping[str, int] = field(default_factory=dict)
    terminal: list[Any] | None = None
    memory_effects: Mapping[str, Any] = field(default_factory=dict)
    parts: Mapping[str, Any] = field(default_factory=dict)

    def pack(self) -> bytes:
        """Encode it."""
        return pack({"v": VERSION, **asdict(self)})


def read(data: bytes) -> Record:
    """Decode what pack() made. Raises Conflict for another version, UsageError for nonsense."""
    body = unpack(data)
    version = body.pop("v", None)
    if version != VERSION:
        raise Conflict(f"the VM's state has version {version!r}, this cellvisor reads {VERSION}",
                       hint="adopt it with the version that started it")
    try:
        body["flags"] = _flags(body["flags"])
        body["config"] = _config(body["config"])
        body["lives"] = {device: Life(**one) for device, one in body["lives"].items()}
        return Record(**body)
    except (KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"the VM's state makes no sense: {type(error).__name__}: {error}") from None


def _flags(body: dict[str, Any]) -> RunFlags:
    payload = body.pop("payload")
    return RunFlags(**{**body, **_parts(body), "payload": Payload(**payload) if payload else None,
                       "wanted": tuple(Wanted(**one) for one in body["wanted"])})


def _config(body: dict[str, Any]) -> VmConfig:
    return VmConfig(**{**body, **_parts(body), "payload": Payload(**body["payload"]),
                       "devices": tuple(Device(**one) for one in body["devices"])})


def _parts(body: dict[str, Any]) -> dict[str, Any]:
    groups = tuple(RateLimitGroup(**one) for one in body.get("groups", ()))
    return {"cpus": Cpus(**body["cpus"]), "memory": Memory(**body["memory"]), "serial": Serial(**body["serial"]),
            "groups": groups}
