"""The virtio-pci transport, driven by a fake driver through config space and MMIO only."""

from __future__ import annotations

import os

import pytest

from cellvisor.core.abi import pci, virtio
from cellvisor.core.errors import Internal, UsageError
from cellvisor.core.pci import eventfd
from cellvisor.core.wire.spec import Spec, Window, WindowKind
from tests.fakes.pci import Bench

SETUP = virtio.S_ACKNOWLEDGE | virtio.S_DRIVER
LIVE = SETUP | virtio.S_FEATURES_OK | virtio.S_DRIVER_OK


@pytest.fixture
def bench():
    made = Bench()
    yield made
    made.vm.check()
    made.close()


def notify_of(bench, queue):
    return bench.driver.bar + bench.driver.notify[0] + queue * bench.driver.multiplier


def test_identity_and_layout(bench):
    driver = bench.driver
    assert driver.config(pci.VENDOR_ID, 4) == 0x1042_1AF4
    assert driver.config(pci.SUBSYSTEM_VENDOR_ID, 4) == 0x1042_1AF4
    assert driver.config(pci.REVISION_ID, 4) == 0x018000_01
    assert driver.config(pci.INTERRUPT_PIN, 1) == 1
    assert driver.common == (0, 0x38)
    assert driver.isr[0] == 0x2000
    assert driver.device == (0x4000, 60)
    assert driver.notify == (0x6000, 8)
    assert (driver.table, driver.pba, driver.multiplier) == (0x8000, 0x48000, 4)
    assert driver.config(driver.msix + pci.MSIX_FLAGS, 2) & pci.MSIX_FLAGS_QSIZE == 2  # two queues and config
    driver.set_config(pci.COMMAND, 2, 0)
    driver.set_config(pci.BAR_0, 8, (1 << 64) - 1)
    assert driver.config(pci.BAR_0, 8) == (1 << 64) - 0x80000 | pci.BAR_64


def test_life_cycle_with_msix(bench):
    driver, vm = bench.driver, bench.vm
    assert driver.features() == virtio.BLK_F_RO | virtio.F_VERSION_1 | virtio.F_RING_INDIRECT_DESC | \
        virtio.F_RING_EVENT_IDX
    assert not vm.doorbells
    driver.start()
    assert driver.status == LIVE
    (what, epoch, queues, features), = bench.owner.log
    assert (what, features) == ("activate", driver.features())
    assert queues == [
        {"index": 0, "size": 256, "desc": 0x10_0000_0000, "avail": 0x10_0001_0000, "used": 0x10_0002_0000},
        {"index": 1, "size": 64, "desc": 0x10_0010_0000, "avail": 0x10_0011_0000, "used": 0x10_0012_0000}]
    assert vm.doorbells == {notify_of(bench, queue): bench.kicks[queue] for queue in range(2)}

    vm.call(bench.calls[1])
    assert vm.messages == [(0xFEE0_0000, 0x42)]

    driver.status = 0
    assert bench.owner.log[1:] == [("reset", epoch)]
    assert driver.status == LIVE  # not yet
    assert not vm.doorbells
    assert not vm.irqfds
    driver.status = virtio.S_ACKNOWLEDGE
    assert driver.status == LIVE, "the driver has to wait"
    driver.set_reg(virtio.COMMON_CONFIG_VECTOR, 2, 2)
    driver.set_reg(virtio.COMMON_DRIVER_FEATURE_SELECT, 4, 7)
    driver.write(driver.device[0], 1, 1)
    assert not vm.irqfds
    assert driver.reg(virtio.COMMON_DRIVER_FEATURE_SELECT, 4) == 1
    driver.write(driver.notify[0], 2, 0)
    assert not eventfd.pending(bench.kicks[0])
    assert not bench.device.reset_done(epoch + 1)
    assert driver.status == LIVE
    assert bench.device.reset_done(epoch)
    assert driver.status == 0
    assert not bench.device.reset_done(epoch)
    driver.set_reg(virtio.COMMON_QUEUE_SELECT, 2, 0)
    assert driver.reg(virtio.COMMON_QUEUE_ENABLE, 2) == 0
    assert driver.reg(virtio.COMMON_QUEUE_VECTOR, 2) == virtio.NO_VECTOR
    assert driver.reg(virtio.COMMON_QUEUE_DESC, 8) == 0

    driver.start()
    assert bench.owner.log[2][:2] == ("activate", epoch + 1)


def test_intx_while_msix_is_off(bench):
    driver, vm = bench.driver, bench.vm
    driver.start(msix=False)
    assert set(vm.watched) >= set(bench.calls)
    vm.call(bench.calls[0])
    assert vm.lines[3]
    assert driver.config(pci.STATUS, 2) & pci.STATUS_INTERRUPT
    assert vm.shadow._board.config[3][pci.STATUS] & pci.STATUS_INTERRUPT
    assert driver.read(driver.isr[0], 1) == virtio.ISR_QUEUE
    assert not vm.lines[3]
    assert driver.read(driver.isr[0], 1) == 0

    bench.device.set_config(bytes(60))
    vm.call(bench.calls[1])
    assert driver.read(driver.isr[0], 1) == virtio.ISR_QUEUE | virtio.ISR_CONFIG

    driver.set_config(pci.COMMAND, 2, pci.COMMAND_MEMORY | pci.COMMAND_INTX_DISABLE)
    vm.call(bench.calls[1])
    assert not vm.lines[3]
    driver.set_config(pci.COMMAND, 2, pci.COMMAND_MEMORY)
    assert vm.lines[3], "the interrupt is still pending"

    driver.set_config(driver.msix + pci.MSIX_FLAGS, 2, pci.MSIX_FLAGS_ENABLE)
    assert not vm.lines[3]
    assert not vm.watched
    driver.set_config(driver.msix + pci.MSIX_FLAGS, 2, 0)
    assert vm.lines[3]
    driver.status = 0
    assert not vm.lines[3]
    assert not vm.watched


def test_needs_reset_raises_the_config_interrupt(bench):
    driver, vm = bench.driver, bench.vm
    bench.device.needs_reset()
    bench.device.set_config(bytes(60))
    assert driver.status == 0, "nothing to reset yet"
    assert driver.read(driver.isr[0], 1) == 0, "nobody listens yet"
    assert not any(vm.lines.values())
    driver.start()
    bench.device.needs_reset()
    vm.settle()
    assert driver.status == LIVE | virtio.S_NEEDS_RESET
    assert vm.messages == [(0xFEE0_0000, 0x40)]
    driver.status = LIVE
    assert driver.status == LIVE | virtio.S_NEEDS_RESET
    driver.status = 0
    bench.device.reset_done(bench.device.epoch)
    assert driver.status == 0


def test_device_config(bench):
    driver, vm = bench.driver, bench.vm
    base = driver.device[0]
    assert [driver.read(base + at, 1) for at in range(62)] == [*range(60), 0, 0]
    generation = driver.reg(virtio.COMMON_CONFIG_GENERATION, 1)
    driver.start()
    bench.device.set_config(bytes(range(100, 160)))
    vm.settle()
    assert driver.read(base, 8) == int.from_bytes(bytes(range(100, 108)), "little")
    assert driver.reg(virtio.COMMON_CONFIG_GENERATION, 1) == generation + 1
    assert vm.messages == [(0xFEE0_0000, 0x40)]
    for _ in range(255):
        bench.device.set_config(bytes(60))
    assert driver.reg(virtio.COMMON_CONFIG_GENERATION, 1) == generation, "eight bits"
    driver.write(base + 32, 1, 1)
    driver.write(base + 58, 4, 0x44332211)
    driver.write(base + 60, 4, 1)
    assert bench.owner.log[1:] == [("config", 32, b"\1"), ("config", 58, b"\x11\x22")]
    with pytest.raises(UsageError, match="61 config bytes"):
        bench.device.set_config(bytes(61))


def test_notify_without_an_ioeventfd(bench):
    driver = bench.driver
    driver.write(driver.notify[0], 2, 0)
    assert not eventfd.pending(bench.kicks[0]), "not enabled"
    assert driver.accept(virtio.F_VERSION_1)
    driver.set_queue(1, 8)
    driver.write(driver.notify[0] + 4, 2, 0xFFFF)
    assert eventfd.take(bench.kicks[1]) == 1
    for at in (1, 2, 3, 5, 6, 8, 0x1FFC):
        driver.write(driver.notify[0] + at, 2, 1)
    assert not eventfd.pending(bench.kicks[0])
    assert not eventfd.pending(bench.kicks[1])


def test_pci_cfg_capability(bench):
    driver = bench.driver
    cap = driver.pci_cfg

    def aim(offset, length, bar=0):
        driver.set_config(cap + virtio.PCI_CAP_BAR, 1, bar)
        driver.set_config(cap + virtio.PCI_CAP_OFFSET, 4, offset)
        driver.set_config(cap + virtio.PCI_CAP_LENGTH, 4, length)

    def get():
        return driver.config(cap + virtio.PCI_CAP_DATA, 4)

    def put(value):
        driver.set_config(cap + virtio.PCI_CAP_DATA, 4, value)

    assert bench.vm.board.ask[3][(cap + 16) // 32] & 1 << (cap + 16) // 4 % 8, "C must not answer for the data"
    driver.set_config(pci.COMMAND, 2, 0)
    aim(virtio.COMMON_NUM_QUEUES, 2)
    assert get() == 2
    aim(virtio.COMMON_QUEUE_SIZE, 2)
    put(0xABCD0080)
    assert get() == 0x80
    aim(0x4000, 4)
    assert get() == 0x03020100
    aim(0x4004, 4)
    assert driver.config(cap + 16, 1) == 4
    driver.set_config(pci.COMMAND, 2, pci.COMMAND_MEMORY)
    driver.start()
    aim(0x6004, 2)
    put(1)
    assert eventfd.take(bench.kicks[1]) == 1
    for offset, length, bar in ((0x6004, 3, 0), (17, 2, 0), (0x6005, 2, 0), (0x7FFFE, 4, 0), (0x80000, 4, 0),
                                (0xFFFF_FFFC, 4, 0), (0x6004, 2, 1), (0x6004, 2, 2), (0x6004, 2, 255),
                                (0x6004, 8, 0), (0x6004, 0, 0)):
        aim(offset, length, bar)
        put(1)
        assert get() == 1, "stored, not done"
        assert not eventfd.pending(bench.kicks[1]), (offset, length, bar)


def test_moving_the_bar_moves_the_doorbells_and_decode_does_not(bench):
    driver, vm = bench.driver, bench.vm
    driver.start()
    old, before = driver.bar, dict(vm.doorbells)
    calls = vm.doorbell_calls
    driver.set_config(pci.COMMAND, 2, 0)
    assert bench.root.mmio_read(old, 4) is None, "dispatch respects decode"
    driver.set_config(pci.BAR_0, 4, 0xFFFF_FFFF)
    driver.set_config(pci.BAR_0 + 4, 4, 0xFFFF_FFFF)
    driver.set_config(pci.BAR_0, 8, old)
    driver.set_config(pci.COMMAND, 2, pci.COMMAND_MEMORY)
    assert vm.doorbells == before
    assert vm.doorbell_calls == calls, "sizing costs no ioeventfd"

    new = 0x40_0000_0000 + (1 << 30)
    driver.set_config(pci.BAR_0, 8, new)
    assert driver.bar == new
    assert bench.root.mmio_read(old, 4) is None
    assert vm.doorbells == {new + 0x6000: bench.kicks[0], new + 0x6004: bench.kicks[1]}
    assert driver.status == LIVE


@pytest.mark.parametrize("gpa", [0, 0x10_0000, 0x1_0000_0000, 0xE800_0000, 0xE7FC_0000, 0xFEE0_0000,
                                 0xBFFC_0000, (1 << 64) - 0x80000, 0x7F_FFFC_0000 + 0x40000])
def test_a_misplaced_bar_is_nowhere(bench, gpa):
    driver, vm = bench.driver, bench.vm
    driver.start()
    old = driver.bar
    gpa &= -0x80000
    inside = any(base <= gpa < end for base, end in ((0xC000_0000, 0xE800_0000), (0x40 << 32, 0x80 << 32)))
    driver.set_config(pci.BAR_0, 8, gpa)
    if not inside:
        assert not vm.doorbells
        assert bench.root.mmio_read(gpa, 1) is None or gpa == 0xE800_0000
    vm.check()
    driver.set_config(pci.BAR_0, 8, old)
    assert len(vm.doorbells) == 2
    assert driver.status == LIVE


def test_machine_reset_puts_everything_back(bench):
    driver, vm = bench.driver, bench.vm
    home = driver.bar
    driver.start()
    epoch = bench.device.epoch
    driver.set_config(pci.BAR_0, 8, 0xD000_0000)
    driver.set_config(pci.INTERRUPT_LINE, 1, 11)
    eventfd.signal(bench.calls[0])
    bench.root.machine_reset()
    assert not vm.doorbells
    assert not vm.irqfds
    assert not vm.gsis
    assert bench.root.mmio_read(home, 4) is None
    bench.root.power_on()
    assert driver.bar == home
    assert driver.status == 0
    assert driver.config(pci.INTERRUPT_LINE, 1) == 0
    assert driver.config(driver.msix + pci.MSIX_FLAGS, 2) == 2
    assert driver.read(driver.table + pci.MSIX_ENTRY_CONTROL, 4) == 1
    assert not bench.device.reset_done(epoch), "void"
    vm.messages.clear()
    driver.start()
    assert vm.messages == [], "an interrupt from before the reset"
    assert bench.device.epoch > epoch


def test_request_reset_and_remove(bench):
    driver, vm = bench.driver, bench.vm
    assert not bench.device.request_reset()
    driver.start()
    assert bench.device.request_reset()
    assert bench.owner.log[-1] == ("reset", bench.device.epoch)
    assert bench.device.reset_done(bench.device.epoch)
    driver.start(msix=False)
    vm.call(bench.calls[0])
    bench.root.detach(3)
    assert not vm.doorbells
    assert not vm.irqfds
    assert not vm.watched
    assert vm.lines == {3: False}
    assert driver.config(0, 4) == 0xFFFF_FFFF
    bench.device.remove()


def test_shared_memory_window_follows_its_bar():
    fd = os.memfd_create("pmem")
    os.ftruncate(fd, 1 << 21)
    window = Window(bar=2, offset=0, size=1 << 21, kind=WindowKind.MEMORY, fd="mem", shmid=7, config_fixup=8)
    spec = Spec(virtio_id=virtio.ID_PMEM, queues=(8,), config=bytes(16), windows=(window,))
    bench = Bench(spec, window_fds={"mem": fd})
    driver, vm = bench.driver, bench.vm
    bar2 = driver.config(pci.BAR_0 + 8, 8) & ~0xF
    assert vm.mappings == {bar2: (1 << 21, fd, 0, False)}
    assert driver.read(driver.device[0] + 8, 8) == bar2
    cap = next(at for kind, at in driver.capabilities if kind == pci.CAP_VENDOR
               and driver.config(at + 3, 1) == virtio.CAP_SHARED_MEMORY)
    assert driver.config(cap + 2, 1) == 24
    assert driver.config(cap + virtio.PCI_CAP_BAR, 2) == 0x0702
    assert driver.config(cap + virtio.PCI_CAP_LENGTH, 4) == 1 << 21
    driver.set_config(pci.BAR_0 + 8, 8, 0x50_0000_0000)
    assert list(vm.mappings) == [0x50_0000_0000]
    assert driver.read(driver.device[0] + 8, 8) == 0x50_0000_0000
    bench.device.set_config(bytes(16))
    assert driver.read(driver.device[0] + 8, 8) == 0x50_0000_0000
    driver.set_config(pci.BAR_0 + 8, 8, 0)  # over RAM
    assert not vm.mappings
    bench.root.machine_reset()
    bench.root.power_on()
    assert list(vm.mappings) == [bar2]
    bench.root.detach(3)
    assert not vm.mappings
    os.close(fd)
    bench.close()


def test_a_window_attached_before_there_is_a_vm_is_mapped_at_power_on(monkeypatch):
    fd = os.memfd_create("pmem")
    window = Window(bar=2, offset=0x1000, size=0x1000, kind=WindowKind.MEMORY, fd="mem")
    bench = Bench(Spec(virtio_id=virtio.ID_PMEM, windows=(window,)), window_fds={"mem": fd})
    bench.root.detach(3)

    def refuse(*args):
        raise Internal("there is no VM")

    monkeypatch.setattr(bench.vm.ports.memory, "map", refuse)
    bench.root.attach(3, bench.device)
    assert not bench.vm.mappings
    monkeypatch.undo()
    bench.root.power_on()
    assert list(bench.vm.mappings) == [bench.device.config.bar_address(2) + 0x1000]
    bench.close()
    os.close(fd)


@pytest.mark.parametrize(("change", "text"), [
    ({"virtio_id": 0}, "virtio id 0"),
    ({"virtio_id": 64}, "virtio id 64"),
    ({"windows": (Window(0, 0, 4096, "bytes"),)}, "BAR 0"),
    ({"windows": (Window(2, 0, 4096, "memory", fd="gone"),)}, "'gone'"),
    ({"windows": (Window(2, 0, 100, "memory", fd="mem"),)}, "whole pages"),
    ({"windows": (Window(2, 0, 4096, "bytes"), Window(2, 4000, 4096, "bytes"))}, "overlap"),
    ({"windows": (Window(2, 0, 4096, "bytes", config_fixup=1),)}, "fix-up"),
    ({"windows": tuple(Window(2, at << 12, 4096, "memory", fd="mem") for at in range(4))}, "at most 3"),
])
def test_a_spec_that_lies_is_refused(change, text):
    spec = Spec(**{"virtio_id": 4, "queues": (8,), "config": bytes(8), **change})
    with pytest.raises(UsageError, match=text):
        Bench(spec, window_fds={"mem": 0})
