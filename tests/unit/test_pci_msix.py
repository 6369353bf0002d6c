"""MSI-X: mask, unmask, pending bits; every vector's eventfds become irqfds and stop being so."""

from __future__ import annotations

import pytest

from cellvisor.core.abi import pci, virtio
from cellvisor.core.errors import Internal
from cellvisor.core.pci import eventfd
from tests.fakes.pci import Bench


@pytest.fixture
def bench():
    made = Bench()
    made.driver.start()
    yield made
    made.close()


def pba(bench):
    return bench.driver.read(bench.driver.pba, 8)


@pytest.mark.parametrize("drains", [True, False])
def test_masked_vector_is_pending_and_delivers_once_when_unmasked(bench, drains):
    driver, vm = bench.driver, bench.vm
    vm.drains = drains
    driver.mask(1, True)
    assert bench.calls[0] not in vm.irqfds
    assert bench.calls[1] in vm.irqfds
    assert pba(bench) == 0
    vm.call(bench.calls[0])
    vm.call(bench.calls[0])
    assert vm.messages == []
    assert pba(bench) == 0b10
    assert driver.read(driver.pba, 1) == 0b10
    assert driver.read(driver.pba + 1, 1) == 0
    assert eventfd.pending(bench.calls[0]), "reading the PBA takes nothing"
    driver.set_vector(1, data=0x77, masked=True)
    assert vm.messages == []
    driver.mask(1, False)
    assert vm.messages == [(0xFEE0_0000, 0x77)], "with the route as it is now"
    assert pba(bench) == 0
    driver.mask(1, True)
    assert pba(bench) == 0, "what was delivered is not pending any more"
    driver.mask(1, False)
    assert len(vm.messages) == 1


def test_function_mask_and_disable_hold_everything_back(bench):
    driver, vm = bench.driver, bench.vm
    flags = driver.msix + pci.MSIX_FLAGS
    driver.set_config(flags, 2, pci.MSIX_FLAGS_ENABLE | pci.MSIX_FLAGS_MASKALL)
    assert not vm.irqfds
    vm.call(bench.calls[0])
    bench.device.set_config(bytes(60))
    assert pba(bench) == 0b011
    driver.set_config(flags + 1, 1, pci.MSIX_FLAGS_ENABLE >> 8)
    assert sorted(vm.messages) == [(0xFEE0_0000, 0x40), (0xFEE0_0000, 0x41)]
    assert len(vm.irqfds) == 3
    driver.set_config(flags, 2, 0xFFFF)
    assert driver.config(flags, 2) == 0xC002, "the size is read only"


def test_new_message_for_a_live_vector(bench):
    driver, vm = bench.driver, bench.vm
    entry = driver.table + pci.MSIX_ENTRY_SIZE
    driver.write(entry + pci.MSIX_ENTRY_DATA, 4, 0x99)
    vm.call(bench.calls[0])
    assert vm.messages == [(0xFEE0_0000, 0x99)]
    driver.write(entry, 8, 0xFEE1_F003)
    vm.call(bench.calls[0])
    assert vm.messages[1] == (0xFEE1_F000, 0x99), "the two lowest address bits are zero"
    assert driver.read(entry, 8) == 0xFEE1_F000


@pytest.mark.parametrize("address", [0, 0x1000, 0xFED0_0000, 0x1_FEE0_0000, 0xFF_FEE0_0000, (1 << 64) - 4])
def test_addresses_that_are_no_lapic_interrupt_nobody(bench, address):
    driver, vm = bench.driver, bench.vm
    driver.mask(1, True)
    driver.set_vector(1, data=1, address=address)
    vm.call(bench.calls[0])
    assert vm.messages == []
    assert pba(bench) == 0b10
    driver.set_vector(1, data=1, address=0xFEE0_1000)
    assert vm.messages == [(0xFEE0_1000, 1)]
    driver.set_vector(1, data=1, address=0x100_FEE0_1000)  # an x2APIC id above 255
    vm.call(bench.calls[0])
    assert vm.messages[1:] == [(0x100_FEE0_1000, 1)]


def test_queues_may_share_a_vector_and_change_it(bench):
    driver, vm = bench.driver, bench.vm
    driver.set_reg(virtio.COMMON_QUEUE_SELECT, 2, 1)
    driver.set_reg(virtio.COMMON_QUEUE_VECTOR, 2, 1)
    assert vm.irqfds[bench.calls[0]] == vm.irqfds[bench.calls[1]]
    vm.call(bench.calls[1])
    assert vm.messages == [(0xFEE0_0000, 0x41)]
    driver.set_reg(virtio.COMMON_QUEUE_VECTOR, 2, virtio.NO_VECTOR)
    assert bench.calls[1] not in vm.irqfds
    vm.call(bench.calls[1])
    assert len(vm.messages) == 1
    assert pba(bench) == 0
    driver.set_reg(virtio.COMMON_QUEUE_VECTOR, 2, 2)
    assert vm.messages[1:] == [(0xFEE0_0000, 0x42)]


def test_a_refusal_by_kvm_is_no_crash_and_is_tried_again(bench, monkeypatch):
    driver, vm = bench.driver, bench.vm
    driver.mask(1, True)

    def refuse(fd, gsi):
        raise Internal("irqfd: No space left")

    port = vm.ports.msi
    monkeypatch.setattr(port, "assign", refuse)
    driver.mask(1, False)
    assert bench.calls[0] not in vm.irqfds
    monkeypatch.undo()
    vm.call(bench.calls[0])
    assert pba(bench) == 0b10
    driver.mask(1, False)
    assert vm.messages == [(0xFEE0_0000, 0x41)]


def test_table_ends_where_it_says(bench):
    driver = bench.driver
    end = driver.table + 3 * pci.MSIX_ENTRY_SIZE
    driver.write(end, 4, 0xFFFF_FFFF)
    driver.write(end - 2, 4, 0xFFFF_FFFF)
    assert driver.read(end, 8) == 0
    assert driver.read(end - 4, 4) == 0, "reserved bits of the control dword stay zero"
    driver.write(driver.table, 8, (1 << 64) - 1)
    assert driver.read(driver.table, 8) == (1 << 64) - 4
    assert driver.read(driver.table + 2, 4) == 0xFFFF_FFFF
    driver.write(driver.pba, 8, (1 << 64) - 1)
    assert driver.read(driver.pba, 8) == 0


def test_gsis_are_given_back(bench):
    assert len(bench.vm.gsis) == 3
    bench.root.detach(3)
    assert not bench.vm.gsis
    assert not bench.vm.irqfds
