"""Guests that do what no driver does: every offset and size, and random mixtures, against invariants."""

from __future__ import annotations

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cellvisor.core._native import _native
from cellvisor.core.abi import pci, virtio
from cellvisor.core.mem import layout
from cellvisor.core.virtio import transport
from cellvisor.core.wire.spec import Spec, Window, WindowKind
from tests.fakes.pci import WINDOW64, Bench

SIZES = range(1, 9)
EDGES = (transport.ISR, transport.DEVICE, transport.DEVICE + 60, transport.NOTIFY, transport.NOTIFY + 8,
         transport.MSIX_TABLE, transport.MSIX_TABLE + 48, transport.MSIX_PBA, transport.BAR_SIZE)
OFFSETS = sorted({*range(0x50), *(edge + at for edge in EDGES for at in range(-9, 10))} & {*range(0x80000)})


def bench_of(live):
    bench = Bench()
    if live:
        bench.driver.start()
    return bench


def invariants(bench):
    vm, device = bench.vm, bench.device
    vm.check()
    allowed = {}
    if device._base is not None and device.live:
        allowed = {device._base + 0x6000 + 4 * queue["index"]: bench.kicks[queue["index"]]
                   for queue in device.queues()}
    assert vm.doorbells == allowed
    flags = device.config.peek(bench.driver.msix + pci.MSIX_FLAGS, 2)
    assert not vm.irqfds or flags & 0xC000 == 0x8000
    watching = device.live and not flags & pci.MSIX_FLAGS_ENABLE
    assert set(vm.watched) == ({*bench.calls, bench.config_fd} if watching else set())
    status = device.status
    assert not status & virtio.S_DRIVER_OK or status & virtio.S_FEATURES_OK
    assert not status & virtio.S_FEATURES_OK or device.features & virtio.F_VERSION_1
    for queue, largest in zip(device._common.queues, bench.spec.queues, strict=True):
        assert 0 < queue.size <= largest
        assert queue.size & (queue.size - 1) == 0
        assert queue.vector in (0, 1, 2, virtio.NO_VECTOR)
    kinds = [entry[0] for entry in bench.owner.log if entry[0] != "config"]
    assert kinds == ["activate", "reset"] * (len(kinds) // 2) + ["activate"] * (len(kinds) % 2)
    shadow = bytes(_native.ffi.buffer(vm.board.config[3]))
    assert shadow == bytes(device.config._data)


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_every_access_to_bar_0(size, live):
    bench = bench_of(live)
    bar = bench.driver.bar
    for offset in OFFSETS:
        for value in (0, 1, 0x80, 0xFFFF_FFFF_FFFF_FFFF, 0x0101_0101_0101_0101):
            value &= (1 << 8 * size) - 1
            bench.root.mmio_write(bar + offset, size, value)
            read = bench.root.mmio_read(bar + offset, size)
            assert read is not None
            assert 0 <= read < 1 << 8 * size
            bench.device.reset_done(bench.device.epoch)
        invariants(bench)
    assert bench.root.mmio_read(bar + transport.BAR_SIZE - 1, size) is not None
    bench.root.machine_reset()
    bench.root.power_on()
    bench.driver.start()
    assert bench.driver.status & virtio.S_DRIVER_OK
    bench.close()


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_every_access_to_config_space(size, live):
    bench = bench_of(live)
    identity = bench.driver.config(0, 4)
    for offset in (*range(0x140), *range(0xFF0, 0x1000)):
        for value in (0, 0xFFFF_FFFF_FFFF_FFFF, 0x0102_0304_0506_0708):
            gpa = bench.driver.ecam(offset)
            assert bench.root.mmio_write(gpa, size, value & (1 << 8 * size) - 1)
            read = bench.root.mmio_read(gpa, size)
            assert read is not None
            assert 0 <= read < 1 << 8 * size
        invariants(bench)
    assert bench.driver.config(0, 4) == identity
    bench.root.machine_reset()
    bench.root.power_on()
    bench.driver.start()
    assert bench.driver.status & virtio.S_DRIVER_OK
    bench.close()


@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_access_to_the_config_ports(size):
    bench = bench_of(live=True)
    for register in (0, 4, 0x10, 0x3C, 0x40, bench.driver.pci_cfg + 16, 0xFC):
        for slot in (0, 3, 7, 31):
            for port in range(0xCF8, 0xD00):
                bench.root.io_write(0xCF8, 4, 1 << 31 | slot << 11 | register)
                for value in (0, (1 << 8 * size) - 1):
                    bench.root.io_write(port, size, value)
                    assert 0 <= bench.root.io_read(port, size) < 1 << 8 * size
                invariants(bench)
    bench.close()


accesses = st.tuples(
    st.one_of(
        st.tuples(st.just("bar"), st.one_of(st.sampled_from(OFFSETS), st.integers(0, transport.BAR_SIZE + 8))),
        st.tuples(st.just("config"), st.one_of(
            st.sampled_from([4, 5, 0x10, 0x14, 0x18, 0x1C, 0x42, 0x43]), st.integers(0, 0xFFF))),
        st.tuples(st.just("absolute"), st.one_of(
            st.integers(0, 1 << 52), st.integers(layout.MMIO32 - 8, layout.ECAM + layout.ECAM_SIZE),
            st.integers(WINDOW64[0] - 8, sum(WINDOW64)))),
        st.tuples(st.just("port"), st.integers(0xCF8, 0xCFF))),
    st.integers(1, 8),
    st.one_of(st.integers(0, 255), st.integers(0, (1 << 64) - 1),
              st.sampled_from([0xC000_0000, 0xC008_0004, 0x8000_1810, 0xFEE0_0000, 0x8000, 0xC000, 15, 11])),
    st.booleans())
events = st.sampled_from(["call0", "call1", "settle", "config", "needs-reset", "reset-done", "start", "reboot"])


def play(bench, step):
    driver, root, device = bench.driver, bench.root, bench.device
    if isinstance(step, tuple):
        (where, at), size, value, write = step
        value &= (1 << 8 * size) - 1
        if where == "port":
            root.io_write(at, min(size, 4), value & 0xFFFF_FFFF) if write else root.io_read(at, min(size, 4))
            return
        gpa = at
        if where == "bar":
            gpa = (device.config.bar_address(0) + at) & (1 << 64) - 1
        elif where == "config":
            gpa = driver.ecam(at)
        if write:
            root.mmio_write(gpa, size, value)
        else:
            read = root.mmio_read(gpa, size)
            assert read is None or 0 <= read < 1 << 8 * size
    elif step.startswith("call"):
        bench.vm.call(bench.calls[int(step[4:])])
    elif step == "settle":
        bench.vm.settle()
    elif step == "config":
        device.set_config(os.urandom(60))
    elif step == "needs-reset":
        device.needs_reset()
    elif step == "reset-done":
        device.reset_done(device.epoch)
    elif step == "reboot":
        if not device.resetting and device.live:
            device.request_reset()
        root.machine_reset()
        root.power_on()
    elif step == "start" and device.status == 0 and device.config.decodes and \
            device._base == device.config.bar_address(0):
        driver.start()


@settings(max_examples=150, deadline=None)
@given(st.lists(st.one_of(accesses, accesses, events), max_size=60))
def test_random_guests(steps):
    bench = Bench()
    try:
        for step in ["start", *steps]:
            play(bench, step)
            invariants(bench)
        bench.root.detach(3)
        assert not bench.vm.doorbells
        assert not bench.vm.irqfds
        assert not bench.vm.watched
        assert not any(bench.vm.lines.values())
    finally:
        bench.close()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([3, 4]), st.sampled_from([0x04, 0x10, 0x14, 0x18, 0x1C]),
                          st.sampled_from([1, 2, 4, 8]),
                          st.one_of(st.integers(0, (1 << 64) - 1), st.sampled_from(
                              [0, 2, 0xC000_0000, 0xC008_0000, 0xC010_0000, 0x40_0000_0000, 0x40_0020_0000,
                               0xE7F8_0000, 0xE800_0000, 0x1_0000_0000, 0xFFFF_FFFF_FFFF_FFFF]))),
                max_size=40))
def test_two_devices_with_wandering_bars(writes):
    fd = os.memfd_create("window")
    window = Window(2, 0, 1 << 21, WindowKind.MEMORY, fd="mem")
    spec = Spec(virtio_id=virtio.ID_PMEM, queues=(8,), config=bytes(16), windows=(window,))
    first = Bench(spec, window_fds={"mem": fd})
    second = Bench(spec, window_fds={"mem": fd})
    second.root.detach(3)
    second.device._ports = first.vm.ports
    second.device._windows._ports = first.vm.ports
    second.device._msix._port = first.vm.ports.msi
    second.device._interrupts._ports = first.vm.ports
    first.root.attach(4, second.device)
    second.driver.root, second.driver.slot = first.root, 4
    first.driver.start()
    second.driver.start()
    for slot, register, size, value in writes:
        first.root.mmio_write(layout.ECAM + (slot << 15) + register, size, value & (1 << 8 * size) - 1)
        first.vm.check()
        bells = first.vm.doorbells
        assert set(bells.values()) <= {*first.kicks, *second.kicks}
        assert len(first.vm.mappings) <= 2
        for gpa, bell in bells.items():
            device = first.device if bell in first.kicks else second.device
            if device.config.decodes:
                assert gpa == device.config.bar_address(0) + 0x6000
                assert first.root.mmio_read(gpa, 2) == 0
    first.close()
    second.close()
    os.close(fd)
