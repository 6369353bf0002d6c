"""The machine: guest RAM, the KVM VM of the day, its vCPUs and its devices; boots, pauses, resets, ends.

Runs on core's main thread; what vCPU threads want is posted here. States: core.state.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cellvisor.core import log
from cellvisor.core._native import _native
from cellvisor.core.abi import acpi as acpi_abi
from cellvisor.core.acpi.config import AcpiConfig
from cellvisor.core.acpi.tables import build_tables
from cellvisor.core.adapters import Exits, LinkOwner
from cellvisor.core.barrier import Barrier
from cellvisor.core.boot.loader import BootConfig, load
from cellvisor.core.config import MachineConfig
from cellvisor.core.errors import CellvisorError, Conflict, UsageError
from cellvisor.core.fds import Connection
from cellvisor.core.hotplug import Hotplug
from cellvisor.core.kvm.vcpu import KICK_SIGNAL, Vcpu, Wanted
from cellvisor.core.kvm.vm import Kvm, Vm, check
from cellvisor.core.link import Link
from cellvisor.core.mem import layout
from cellvisor.core.mem.ram import GuestRam
from cellvisor.core.mem.table import RangeTable
from cellvisor.core.platform import Platform
from cellvisor.core.server import Server
from cellvisor.core.state import State, change
from cellvisor.core.virtio.device import VirtioPciDevice
from cellvisor.core.watchdog import Watchdog
from cellvisor.core.wire.messages import ToWorker

lib = _native.lib
PARK_SECONDS = 5.0
WORKER_SECONDS = 10.0  # a worker that neither resets nor pauses in this time is given up
Done = Callable[[CellvisorError | None], None]


class Machine:
    """Everything that one VM is. `links` are its devices by id."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self.kvm = Kvm()
        check(lib.cv_install_kick(KICK_SIGNAL), "sigaction")
        self.lock = threading.RLock()
        self.state = State.CREATED
        self.links: dict[str, Link] = {}
        self.config: MachineConfig | None = None
        self.ram: GuestRam | None = None
        self._table: RangeTable | None = None
        self.platform: Platform | None = None
        self._hotplug: Hotplug | None = None
        self.vm: Vm | None = None
        self.vcpus: list[Vcpu] = []
        self.resets = 0
        self.reason = ""  # why it crashed
        self._barrier: Barrier | None = None
        self._watchdog = Watchdog(server.reactor, server.hung)

    # ---- life

    def configure(self, config: MachineConfig) -> None:
        """Make RAM and the board. Raises UsageError for what the host cannot give."""
        if self.config is not None:
            raise Conflict("the VM is configured already")
        layout.check_ram_size(config.memory, self.kvm.phys_bits)
        for flag, path in (("--kernel", config.kernel), ("--initramfs", config.initramfs)):
            if path and not Path(path).exists():
                raise UsageError(f"{flag}: {path} does not exist")
        self.ram = GuestRam(config.memory, prefault=config.prefault, hugepages=config.hugepages, thp=config.thp)
        self._table = RangeTable.create()
        self._table.publish(self.ram.ranges)
        self.platform = Platform(self._server, self.lock, config, self.kvm.phys_bits, self._guest_reset,
                                 self._guest_shutdown)
        self._hotplug = Hotplug(self._server, self.lock, self.platform.slots, self.links)
        self.config = config

    def serial_path(self) -> str:
        """Return the path of the serial port's pty, file or socket, or ""."""
        serial = self.platform.serial if self.platform else None
        return serial.channel.path if serial else ""

    def attach(self, device: str, kind: str, slot: int, generation: int, token: str) -> None:
        """Expect a worker for `device`; a later generation takes over what its predecessor left."""
        if self.platform is None:
            raise Conflict("attach: the VM is not configured")
        link = self.links.get(device)
        if link is None:
            taken = [other.device for other in self.links.values() if other.slot == slot]
            if taken:
                raise Conflict(f"attach: slot {slot} belongs to {taken[0]}")
            link = self.links[device] = Link(self, device, kind, slot)
            self._watchdog.watch(link)
        link.expect(generation, token)

    @property
    def hotplug(self) -> Hotplug:
        """Who comes and goes. Raises Conflict before configure()."""
        if self._hotplug is None:
            raise Conflict("the VM is not configured")
        return self._hotplug

    def detach(self, device: str) -> None:
        """Forget a device that is in no slot. Raises NotFound, Conflict."""
        self.hotplug.detach(device)
        if self._barrier is not None:
            self._barrier.gone(device)

    def boot(self) -> None:
        """Load the kernel and run. Raises UsageError for a kernel that cannot be booted."""
        config, platform = self.config, self.platform
        if config is None or platform is None:
            raise Conflict("boot: the VM is not configured")
        change(self.state, State.RUNNING)
        waiting = [link.device for link in self.links.values() if not link.alive]
        if waiting:
            raise Conflict(f"boot: not ready: {', '.join(sorted(waiting))}")
        self._server.event("vm.booting")
        self._power_on(config, platform)
        self.state = change(self.state, State.RUNNING)
        self._run_all()
        self._server.event("vm.booted")

    def pause(self, then: Callable[[set[str]], None]) -> None:
        """Stop the vCPUs and quiesce the workers; `then(late)` when it is so, with who did not answer."""
        change(self.state, State.PAUSED)
        self._require_no_barrier("pause")
        self._server.event("vm.pausing")
        self._park_all()
        self.state = change(self.state, State.PAUSED)

        def paused(late: set[str]) -> None:
            if late:
                log.get("machine").warning("paused, but not quiet: %s", ", ".join(sorted(late)))
            self._server.event("vm.paused")
            then(late)

        asked = {link.device for link in self.links.values() if link.alive}
        for device in asked:
            self.links[device].send(ToWorker.PAUSE)
        self._wait_for(asked, "paused", paused)

    def resume(self) -> None:
        """Undo pause()."""
        if self.state is not State.PAUSED:
            raise Conflict(f"resume: the VM is {self.state}", hint="only a paused VM resumes")
        self._require_no_barrier("resume")
        self._server.event("vm.resuming")
        self.state = change(self.state, State.RUNNING)
        self._resume_workers()
        self._run_all()
        self._server.event("vm.resumed")

    def _resume_workers(self) -> None:
        for link in self.links.values():
            link.send(ToWorker.RESUME)

    def power_button(self) -> None:
        """Press it: the guest sees an ACPI event."""
        if self.platform is None or self.state not in (State.RUNNING, State.PAUSED):
            raise Conflict(f"power-button: the VM is {self.state}")
        self.platform.ged.raise_event(acpi_abi.EVENT_POWER_BUTTON)

    def quit(self) -> None:
        """End the VM, tell the workers to end, leave the main loop."""
        self._stop_all()
        for link in self.links.values():
            link.send(ToWorker.END)
        self._server.reactor.stop()

    # ---- power

    def _power_on(self, config: MachineConfig, platform: Platform) -> None:
        """Make a fresh VM over cleared RAM and load the kernel. RAM and devices must be quiet."""
        assert self.ram is not None
        tables = build_tables(AcpiConfig(boot_vcpus=config.boot_vcpus, max_vcpus=config.max_vcpus,
                                         mmio64=platform.mmio64, com1=platform.serial is not None))
        entry = load(self.ram, BootConfig(
            kernel=Path(config.kernel), ram_size=config.memory, cmdline=config.cmdline,
            phys_bits=self.kvm.phys_bits,
            initramfs=Path(config.initramfs) if config.initramfs else None))
        self.ram.write(layout.ACPI_TABLES, tables)
        vm = self.vm = Vm(self.kvm)
        for gpa, size, offset in self.ram.ranges:
            vm.add_memory(gpa, size, self.ram.host + offset)
        with self.lock:
            platform.bind(vm)
            platform.pci.power_on()
        exits = Exits(platform, self._server.post, self.vcpu_ended)
        self.vcpus = [Vcpu(vm, index, config.boot_vcpus, platform.board, exits)
                      for index in range(config.boot_vcpus)]
        kind = lib.CV_ENTRY_PVH if entry.kind == "pvh" else lib.CV_ENTRY_LONG
        self.vcpus[0].set_entry(kind, entry.rip, entry.boot_params, entry.page_tables, entry.gdt, entry.stack)
        for vcpu in self.vcpus:
            vcpu.start()

    def _run_all(self) -> None:
        for vcpu in self.vcpus:
            vcpu.request(Wanted.RUN)

    def _park_all(self) -> None:
        for vcpu in self.vcpus:
            vcpu.request(Wanted.PARK)
        for vcpu in self.vcpus:
            if not vcpu.wait_parked(PARK_SECONDS):
                log.get("machine").warning("vcpu%d does not stop", vcpu.index)
            vcpu.pause_clock()

    def _stop_all(self) -> None:
        """End the vCPUs and the VM of the day."""
        for vcpu in self.vcpus:
            vcpu.request(Wanted.STOP)
        for vcpu in self.vcpus:
            vcpu.close()
        self.vcpus = []

    def _drop_vm(self) -> None:
        if self.vm is not None and self.platform is not None:
            with self.lock:
                self.platform.bind(None)
            self.vm.close()
            self.vm = None

    # ---- reset

    def _guest_reset(self) -> None:
        """On a vCPU thread: the guest pulled the reset line; this vCPU executes nothing more."""
        self._park_caller()
        self._server.post(lambda: self.reset(lambda error: None))

    def _guest_shutdown(self) -> None:
        """On a vCPU thread: the guest went to S5."""
        self._park_caller()
        self._server.post(self._shutdown)

    def _park_caller(self) -> None:
        for vcpu in self.vcpus:
            if vcpu.is_current():
                vcpu.park_self()

    def _shutdown(self) -> None:
        if self.state in (State.RUNNING, State.PAUSED):
            self._stop_all()
            self.state = change(self.state, State.STOPPED)
            self._server.event("vm.shutdown")

    def vcpu_ended(self, index: int, reason: str) -> None:
        """A vCPU cannot go on: a triple fault resets the machine, anything else ends it."""
        if reason == "shutdown":
            log.get("machine").warning("vcpu%d: triple fault: resetting", index)
            self.reset(lambda error: None)
        elif self.state in (State.RUNNING, State.PAUSED):
            log.get("machine").error("vcpu%d: %s", index, reason)
            self._park_all()
            self._crashed(f"vcpu{index}: {reason}")

    def _crashed(self, reason: str) -> None:
        self.state, self.reason = change(self.state, State.CRASHED), reason
        self._server.event("vm.crashed", reason=reason)

    def reset(self, done: Done) -> None:
        """Begin a machine reset; `done(error)` when the guest runs again."""
        if self.state is State.RESETTING:
            done(Conflict("reset: one is under way"))
            return
        was_paused = self.state is State.PAUSED
        try:
            self.state = change(self.state, State.RESETTING)
        except Conflict as error:
            done(error)
            return
        self._server.event("vm.rebooting")
        self._stop_all()
        with self.lock:
            pending = {link.device for link in self.links.values()
                       if link.function is not None and link.function.request_reset()}

        def quiet(late: set[str]) -> None:
            for device in late:
                self._server.expel(self.links[device], "did not finish the machine reset in time")
            self._finish_reset(was_paused, done)

        self._wait_for(pending, "reset-done", quiet)

    def _finish_reset(self, was_paused: bool, done: Done) -> None:
        config, platform, ram = self.config, self.platform, self.ram
        assert config is not None and platform is not None and ram is not None
        try:
            self.hotplug.machine_reset()
            with self.lock:
                platform.pci.machine_reset()
            self._drop_vm()
            ram.clear()
            self.resets += 1
            self._power_on(config, platform)
        except (CellvisorError, OSError) as error:
            log.get("machine").error("reset: %s", error)
            self._crashed(f"reset: {error}")
            done(error if isinstance(error, CellvisorError) else CellvisorError(f"reset: {error}"))
            return
        self.state = change(self.state, State.PAUSED if was_paused else State.RUNNING)
        if not was_paused:
            self._resume_workers()
            self._run_all()
        self._server.event("vm.rebooted")
        if was_paused:  # who heard of the reboot would take it for running
            self._server.event("vm.paused")
        done(None)

    # ---- waiting for workers

    def quiesce(self, link: Link, then: Callable[[set[str]], None]) -> None:
        """Have one worker finish what it executes and fetch nothing more; `then(late)` like pause()."""
        self._require_no_barrier("quiesce")
        link.send(ToWorker.PAUSE)
        self._wait_for({link.device} if link.alive else set(), "paused", then)

    def _require_no_barrier(self, verb: str) -> None:
        if self._barrier is not None:
            raise Conflict(f"{verb}: the devices are still being waited for", hint="try again")

    def _wait_for(self, devices: set[str], answer: str, then: Callable[[set[str]], None]) -> None:
        def finished(late: set[str]) -> None:
            if self._barrier is barrier:  # a machine reset does not wait for the one before
                self._barrier = None
            then(late)

        barrier = self._barrier = Barrier(self._server.reactor, devices, answer, WORKER_SECONDS, finished)
        barrier.start()

    # ---- what links ask of their home

    def send(self, identity: str, body: dict[str, Any]) -> None:
        """Send to a worker."""
        self._server.send(identity, body)

    def build(self, link: Link) -> VirtioPciDevice:
        """Make the PCI function of a worker that said HELLO."""
        assert link.spec is not None and self.platform is not None
        owner = LinkOwner(self._server.post, link, self.hotplug.activated)
        return VirtioPciDevice(link.device, link.spec, self.platform.ports, owner, kick_fds=link.kick_fds,
                               call_fds=link.call_fds, config_fd=link.config_fd)

    def ready(self, link: Link) -> None:
        """Before boot, show the function to the guest; the next incarnation finds it there already."""
        self.hotplug.ready(link, self.state)
        generation = link.worker.generation if link.worker else 0
        self._server.event("device.ready", device=link.device, generation=generation)

    def answered(self, link: Link, what: str) -> None:
        """A worker has quiesced or reset."""
        if self._barrier is not None:
            self._barrier.answered(link.device, what)

    def failed(self, link: Link, reason: str) -> None:
        """A worker is gone. The guest is not told: a successor may carry on, kicks stay in the eventfds."""
        generation = link.worker.generation if link.worker else 0
        self._server.event("device.failed", device=link.device, generation=generation, reason=reason,
                           refused=link.refused)
        if self._barrier is not None and self._barrier.answer == "paused":
            self._barrier.gone(link.device)

    def told(self, link: Link, what: str, **more: Any) -> None:
        """The driver did `what`: "activated", "reset"; or "reset-waits", "poison", "backend": see CoreVerb."""
        self._server.event(f"device.{what}", device=link.device, **more)

    def offer(self, connection: Connection) -> None:
        """Answer a worker that waits for its descriptors."""
        self._server.offer(connection)

    @property
    def paused(self) -> bool:
        """Must workers stay quiet?"""
        return self.state is State.PAUSED

    def shared_descriptors(self) -> dict[str, int]:
        """Return guest RAM and its table for a worker."""
        assert self.ram is not None and self._table is not None
        return {"ram": self.ram.fd, "table": self._table.fd}

    def close(self) -> None:
        """Release everything."""
        self._stop_all()
        with contextlib.suppress(CellvisorError):
            self._drop_vm()
        if self.platform is not None:
            self.platform.close()
        for link in self.links.values():
            link.close()
        if self.ram is not None:
            self.ram.close()
        self.kvm.close()
