"""What a device is: the Spec that a worker sends in its Hello, and from which core builds the PCI function."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from cellvisor.core.errors import UsageError

MAX_QUEUES = 64
MAX_QUEUE_SIZE = 32768
MAX_CONFIG = 4096


class WindowKind(StrEnum):
    """What lies behind a BAR window (design: bytes, doorbell, memory, file)."""

    BYTES = "bytes"
    DOORBELL = "doorbell"
    MEMORY = "memory"
    FILE = "file"


@dataclass(frozen=True, slots=True)
class Window:
    """One stretch of a BAR. `bar` 0..5, `offset` and `size` in bytes; `fd` names a deposited descriptor.

    On a virtio device bar must be 2 (BAR 0 is the transport's) and `shmid` gives the
    VIRTIO_PCI_CAP_SHARED_MEMORY_CFG id (virtio 1.2, 4.1.4.7). `config_fixup` is the offset in the
    device config where core stores the window's gpa as le64 (virtio-pmem), or -1.
    """

    bar: int
    offset: int
    size: int
    kind: str
    fd: str = ""
    fd_offset: int = 0
    shmid: int = 0
    readonly: bool = False
    config_fixup: int = -1
    data: bytes = b""


@dataclass(frozen=True, slots=True)
class Spec:
    """A device's identity and shape.

    Either `virtio_id` (virtio 1.2 section 5) or raw PCI ids (`vendor`, `device`). `pci_class` is 24 bits
    (class, subclass, interface). `queues` holds the largest size of each virtqueue, `features` the device's
    feature bits (transport bits are added by core), `config` the bytes of device config space.
    `private_size` is the room in the state memfd for the device's own recoverable state.
    """

    virtio_id: int = 0
    pci_class: int = 0xFF0000
    queues: tuple[int, ...] = ()
    features: int = 0
    config: bytes = b""
    windows: tuple[Window, ...] = ()
    private_size: int = 0
    vendor: int = 0x1AF4
    device: int = 0
    subsystem: int = 0
    revision: int = 1
    title: str = ""
    counters: tuple[str, ...] = field(default=())

    def as_wire(self) -> dict[str, Any]:
        return asdict(self)


def spec_from_wire(body: object) -> Spec:
    """Check what a worker says of itself; it may lie. Raises UsageError naming the field."""
    if not isinstance(body, dict):
        raise UsageError(f"spec: not a map but {type(body).__name__}")
    kinds = {
        "virtio_id": int, "pci_class": int, "features": int, "private_size": int, "vendor": int,
        "device": int, "subsystem": int, "revision": int, "config": bytes, "title": str,
    }
    values: dict[str, Any] = {}
    for key, kind in kinds.items():
        value = body.get(key)
        if type(value) is not kind:
            raise UsageError(f"spec: {key} is {type(value).__name__}, not {kind.__name__}")
        values[key] = value
    limits = {"virtio_id": 0xFF, "pci_class": 0xFFFFFF, "features": 2**64 - 1, "private_size": 1 << 20,
              "vendor": 0xFFFF, "device": 0xFFFF, "subsystem": 0xFFFF, "revision": 0xFF}
    for key, limit in limits.items():
        if not 0 <= values[key] <= limit:
            raise UsageError(f"spec: {key}={values[key]:#x} is outside 0..{limit:#x}")
    if len(values["config"]) > MAX_CONFIG:
        raise UsageError(f"spec: config has {len(values['config'])} bytes, at most {MAX_CONFIG}")
    queues = body.get("queues")
    if not isinstance(queues, list | tuple) or len(queues) > MAX_QUEUES:
        raise UsageError(f"spec: queues must be a list of at most {MAX_QUEUES}")
    for size in queues:
        if type(size) is not int or not 1 <= size <= MAX_QUEUE_SIZE or size & (size - 1):
            raise UsageError(f"spec: queue size {size!r} is not a power of two up to {MAX_QUEUE_SIZE}")
    counters = body.get("counters", ())
    if not isinstance(counters, list | tuple) or len(counters) > 64:
        raise UsageError("spec: counters must be a list of at most 64 names")
    windows = body.get("windows", ())
    if not isinstance(windows, list | tuple) or len(windows) > 16:
        raise UsageError("spec: windows must be a list of at most 16")
    return Spec(**values, queues=tuple(queues), counters=tuple(str(name)[:64] for name in counters),
                windows=tuple(_window(item) for item in windows))


def _window(body: object) -> Window:
    if not isinstance(body, dict) or set(body) - set(Window.__slots__):
        raise UsageError("spec: a window is not a map of known keys")
    try:
        window = Window(**body)
    except TypeError as error:
        raise UsageError(f"spec: window: {error}") from None
    whole = ("bar", "offset", "size", "fd_offset", "shmid", "config_fixup")
    if any(type(getattr(window, key)) is not int for key in whole) or type(window.data) is not bytes:
        raise UsageError("spec: window: a number or data has the wrong type")
    if window.kind not in list(WindowKind):
        raise UsageError(f"spec: window kind {window.kind!r} is none of {', '.join(WindowKind)}")
    if not (0 <= window.bar <= 5 and 0 <= window.offset < 1 << 40 and 0 < window.size <= 1 << 40):
        raise UsageError(f"spec: window bar={window.bar} offset={window.offset:#x} size={window.size:#x}")
    if not (0 <= window.shmid <= 255 and 0 <= window.fd_offset < 1 << 62 and -1 <= window.config_fixup < MAX_CONFIG):
        raise UsageError("spec: window shmid, fd_offset or config_fixup out of range")
    return window
