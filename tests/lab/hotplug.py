"""What the hotplug tests ask of a VM and its guest, and a guest that they share."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from cellvisor.core.errors import CellvisorError
from cellvisor.ctl.client import Client
from tests.lab import programs
from tests.lab.guest import Linux

MOST_PSS = 4096  # KiB that a role's processes may grow by: what is remembered of events and operations fills up
SECONDS = 180.0  # the lab is slow; on real hardware all of it takes milliseconds
MIB = 1 << 20
USUAL = ["00", "01", "02", "03", "04", "05"]  # slots


def sparse(path: Path, size: int = 16 * MIB) -> Path:
    """Make an empty raw image."""
    with path.open("wb") as file:
        file.truncate(size)
    return path


def client_of(guest: Linux) -> Client:
    """Connect to the guest's VM."""
    def connect() -> Client | None:
        for directory in (guest.folder / "cellvisor").glob("*"):
            with suppress(CellvisorError):
                return Client(str(directory), timeout=SECONDS)
        return None

    client: Client = eventually(connect, "the API")
    return client


def eventually(condition: Callable[[], Any], what: str) -> Any:
    """Wait until `condition` is true and return what it gave."""
    until = time.monotonic() + SECONDS
    while not (found := condition()):
        assert time.monotonic() < until, f"waited in vain for {what}"
        time.sleep(0.1)
    return found


def add(client: Client, verb: str = "add-disk", **options: Any) -> dict[str, str]:
    """Add a device and return what Cloud Hypervisor would answer."""
    answer = client.call(verb, **options)
    return {"id": answer["id"], "bdf": answer["bdf"]}


def outcome(client: Client, key: str, timeout: float = SECONDS) -> dict[str, Any]:
    """Wait up to `timeout` seconds for the end of the latest operation of a device and return it."""
    until = time.monotonic() + timeout
    while True:
        left = max(0.0, until - time.monotonic())
        answer: dict[str, Any] = client.call("ops", action="wait", id=key, timeout=min(left, 30.0))
        if left == 0 or answer["state"] not in ("requested", "guest-notified"):
            return answer


def is_done(client: Client, key: str) -> None:
    """Wait until it is done."""
    operation = outcome(client, key)
    assert operation["state"] == "done", operation


def remove(client: Client, key: str) -> None:
    """Remove a device and wait until it is gone."""
    client.call("remove-device", id=key, timeout=SECONDS)
    is_done(client, key)


def device(client: Client, key: str) -> dict[str, Any]:
    """Return what the VM knows of a device, {} if there is none."""
    found: list[dict[str, Any]] = client.call("devices")["devices"]
    return next((one for one in found if one["id"] == key), {})


class Killer:
    """Kills the process of a device again and again: `kills` so far."""

    def __init__(self, client: Client, key: str) -> None:
        self.kills = 0
        self._client, self._key = client, key
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="killer")

    def _run(self) -> None:
        client = Client(self._client.path, timeout=180)
        while not self._stop.wait(0.3):
            with suppress(ProcessLookupError):
                pid = device(client, self._key).get("pid")
                if pid:
                    os.kill(pid, signal.SIGKILL)
                    self.kills += 1
        client.close()

    def __enter__(self) -> Killer:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join(60)


def footprint(client: Client) -> dict[str, int]:
    """Count what must not grow: free slots, processes, and descriptors of those that are not a device's."""
    counted = {"free slots": int(client.call("capacity")["slots"]["free"])}
    for one in client.call("info", processes=True)["processes"]:
        counted[one["role"]] = counted.get(one["role"], 0) + 1
        if one["role"] != "worker":
            counted[f"{one['role']} fds"] = len(os.listdir(f"/proc/{one['pid']}/fd"))
    return counted


def has_process(key: str) -> bool:
    """Say whether a device's process is there: one that ends shares memory with the others, whose PSS is less then."""
    for path in Path("/proc").glob("[0-9]*/comm"):
        with suppress(OSError):
            if path.read_text() == f"cv-{key}\n":
                return True
    return False


def pss(client: Client) -> dict[str, int]:
    """Return the VM's memory in KiB by role, without guest RAM, which every device that maps it divides anew."""
    found: dict[str, int] = {}
    for one in client.call("info", processes=True)["processes"]:
        found[one["role"]] = found.get(one["role"], 0) + one["pss"] - one["pss_shmem"]
    return found


def slots(guest: Linux) -> list[str]:
    """Return the slots that the guest sees, in hexadecimal."""
    return [line[3:5] for line in guest.run("lspci").splitlines()]


def disk_in(guest: Linux, slot: int) -> str:
    """Return the name of the disk in a slot once the driver has it."""
    where = f"ls /sys/bus/pci/devices/0000:00:{slot:02x}.0/virtio*/block 2>/dev/null"
    name: str = eventually(lambda: guest.try_run(where).output.strip(), f"a disk in slot {slot}")
    return name


def usual(folder: Path, tools: bool = False, args: Sequence[str] = ()) -> Linux:
    """Console, three disks and the rng: the next slot is 6, as in Cloud Hypervisor's usual VM.

    With `tools` the first disk has fio on it, and programs.install() is the caller's to do.
    """
    first = (f"path={programs.make(folder / 'fio.img', 'fio')},readonly=on" if tools
             else f"path={sparse(folder / 'disk0.raw')}")
    more = [f"path={sparse(folder / f'disk{number}.raw')}" for number in (1, 2)]
    return Linux("cloud", disks=[first, *more], args=args)


class Shared:
    """A usual guest with fio for tests that give back all they added; one that did not costs a new guest.

        none --get()--> running --give_back()--> running, or none if it is not as it was
    """

    def __init__(self, folder: Path, *args: str) -> None:
        self._folder, self._args = folder, args
        self._running: tuple[Linux, Client] | None = None

    def get(self) -> tuple[Linux, Client]:
        """Return the guest and a connection to its VM."""
        if self._running is None:
            guest = usual(self._folder, tools=True, args=self._args)
            guest.__enter__()
            try:
                programs.install(guest, "vda", "fio")
                self._running = guest, client_of(guest)
            except BaseException:
                guest.close()
                raise
        return self._running

    def give_back(self) -> None:
        """Check that the guest has what it had and complains of nothing."""
        guest, client = self.get()
        try:
            assert [one["id"] for one in client.call("devices")["devices"]] == [
                "__console", "_disk0", "_disk1", "_disk2", "__rng"]
            assert slots(guest) == USUAL
            assert guest.run("dmesg | grep -iE 'acpi.*error|warning:|bug:|hung task|stall'; true") == ""
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the guest."""
        if self._running is not None:
            guest, client = self._running
            self._running = None
            client.close()
            guest.close()
