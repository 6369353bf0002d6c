"""The common configuration structure: status, features and queue registers in every order."""

from __future__ import annotations

import pytest

from cellvisor.core.abi import virtio
from cellvisor.core.wire.spec import Spec
from tests.fakes.pci import Bench

SETUP = virtio.S_ACKNOWLEDGE | virtio.S_DRIVER
LIVE = SETUP | virtio.S_FEATURES_OK | virtio.S_DRIVER_OK


@pytest.fixture
def bench():
    made = Bench()
    yield made
    made.vm.check()
    made.close()



def test_reset_without_a_live_worker_is_instant(bench):
    driver = bench.driver
    assert driver.accept(virtio.F_VERSION_1)
    driver.set_queue(0, 16)
    driver.status = 0
    assert driver.status == 0
    assert bench.owner.log == []
    assert not bench.device.resetting


def test_owner_may_answer_a_reset_at_once(bench):
    bench.driver.start()
    bench.owner.reset = bench.device.reset_done
    bench.driver.status = 0
    assert bench.driver.status == 0


def test_features_are_refused_without_version_1_or_with_unknown_bits(bench):
    driver = bench.driver
    assert not driver.accept(virtio.BLK_F_RO)
    assert driver.status == SETUP
    assert not driver.accept(virtio.F_VERSION_1 | virtio.BLK_F_FLUSH)
    assert not driver.accept(virtio.F_VERSION_1 | virtio.F_RING_PACKED)
    driver.status = driver.status | virtio.S_DRIVER_OK
    assert driver.status == SETUP
    assert bench.owner.log == []
    assert driver.accept(virtio.F_VERSION_1), "after better features it is accepted"
    driver.set_reg(virtio.COMMON_DRIVER_FEATURE_SELECT, 4, 0)
    driver.set_reg(virtio.COMMON_DRIVER_FEATURE, 4, virtio.BLK_F_FLUSH)
    assert driver.reg(virtio.COMMON_DRIVER_FEATURE, 4) == 0, "locked by FEATURES_OK"


def test_features_beyond_64_bits(bench):
    driver = bench.driver
    for select in (2, 3, 0xFFFF_FFFF):
        driver.set_reg(virtio.COMMON_DEVICE_FEATURE_SELECT, 4, select)
        assert driver.reg(virtio.COMMON_DEVICE_FEATURE, 4) == 0
    driver.set_reg(virtio.COMMON_DRIVER_FEATURE_SELECT, 4, 2)
    driver.set_reg(virtio.COMMON_DRIVER_FEATURE, 4, 0)
    assert driver.accept(virtio.F_VERSION_1)
    driver.status = 0
    driver.set_reg(virtio.COMMON_DRIVER_FEATURE_SELECT, 4, 2)
    driver.set_reg(virtio.COMMON_DRIVER_FEATURE, 4, 1)
    assert not driver.accept(virtio.F_VERSION_1)


def test_transport_features_are_cores_alone():
    bench = Bench(Spec(virtio_id=virtio.ID_RNG, queues=(8,), features=(1 << 64) - 1))
    offered = bench.driver.features()
    for bit in (virtio.F_RING_PACKED, virtio.F_ACCESS_PLATFORM, virtio.F_IN_ORDER, virtio.F_SR_IOV,
                virtio.F_RING_RESET, virtio.F_NOTIFICATION_DATA, 1 << 45):
        assert not offered & bit, hex(bit)
    assert offered & 1 << 63
    assert offered & 1 << 23
    assert bench.driver.device == (0, 0), "no config bytes, no device-cfg capability"
    bench.close()


def test_status_order_is_kept(bench):
    driver = bench.driver
    driver.status = virtio.S_FEATURES_OK
    assert driver.status == 0
    driver.status = LIVE
    assert driver.status == SETUP, "no VERSION_1 was accepted"
    driver.status = virtio.S_NEEDS_RESET | SETUP
    assert driver.status == SETUP, "NEEDS_RESET is the device's"
    driver.status = virtio.S_FAILED
    assert driver.status == SETUP | virtio.S_FAILED, "bits leave by a reset only"
    driver.status = 0
    assert driver.status == 0


@pytest.mark.parametrize("size", [0, 3, 255, 512, 0xFFFF])
def test_queue_sizes_that_make_no_sense_are_ignored(bench, size):
    driver = bench.driver
    driver.set_reg(virtio.COMMON_QUEUE_SIZE, 2, size)
    assert driver.reg(virtio.COMMON_QUEUE_SIZE, 2) == 256
    driver.set_reg(virtio.COMMON_QUEUE_SIZE, 2, 1)
    assert driver.reg(virtio.COMMON_QUEUE_SIZE, 2) == 1
    driver.set_reg(virtio.COMMON_QUEUE_ENABLE, 2, 2)
    assert driver.reg(virtio.COMMON_QUEUE_ENABLE, 2) == 0


QUEUE_FIELDS = [(virtio.COMMON_QUEUE_SIZE, 2), (virtio.COMMON_QUEUE_VECTOR, 2), (virtio.COMMON_QUEUE_ENABLE, 2),
                (virtio.COMMON_QUEUE_NOTIFY_OFF, 2), (virtio.COMMON_QUEUE_DESC, 8),
                (virtio.COMMON_QUEUE_AVAIL, 8), (virtio.COMMON_QUEUE_USED, 8)]


@pytest.mark.parametrize("index", [2, 3, 64, 0xFFFF])
def test_queues_that_do_not_exist_read_zero(bench, index):
    driver = bench.driver
    driver.set_reg(virtio.COMMON_QUEUE_SELECT, 2, index)
    for register, size in QUEUE_FIELDS:
        driver.set_reg(register, size, 1)
        assert driver.reg(register, size) == 0


@pytest.mark.parametrize("live", [False, True])
def test_queue_registers_are_frozen_by_enable_and_by_driver_ok(bench, live):
    driver = bench.driver
    if live:
        driver.start()
    else:
        assert driver.accept(virtio.F_VERSION_1)
        driver.set_queue(0, 256)
        driver.set_queue(1, 64)
    for index in range(2):
        driver.set_reg(virtio.COMMON_QUEUE_SELECT, 2, index)
        frozen = [field for field in QUEUE_FIELDS if field[0] != virtio.COMMON_QUEUE_VECTOR]
        before = [driver.reg(*field) for field in frozen]
        for register, size in frozen:
            for poison in (0, 1, 3, 0x8000, 0xFFFF, (1 << 64) - 1):
                driver.set_reg(register, size, poison & (1 << 8 * size) - 1)
                driver.set_reg(register, 4, poison & 0xFFFF_FFFF)
                driver.set_reg(register + 4, 4, poison & 0xFFFF_FFFF)
        assert [driver.reg(*field) for field in frozen] == before
    if live:
        assert [queue["size"] for queue in bench.device.queues()] == [256, 64]
        driver.status = SETUP
        assert driver.status == LIVE


def test_a_queue_cannot_be_enabled_after_driver_ok(bench):
    driver = bench.driver
    assert driver.accept(virtio.F_VERSION_1)
    driver.set_queue(1, 32)
    driver.status = driver.status | virtio.S_DRIVER_OK
    assert [queue["index"] for queue in bench.owner.log[0][2]] == [1]
    assert list(bench.vm.doorbells) == [bench.driver.bar + bench.driver.notify[0] + 4]
    driver.set_queue(0, 32)
    driver.set_reg(virtio.COMMON_QUEUE_SELECT, 2, 0)
    assert driver.reg(virtio.COMMON_QUEUE_ENABLE, 2) == 0
    assert driver.reg(virtio.COMMON_QUEUE_DESC, 8) == 0


def test_vectors_out_of_range_read_back_as_none(bench):
    driver = bench.driver
    for vector, expected in ((2, 2), (3, virtio.NO_VECTOR), (0xFFFE, virtio.NO_VECTOR)):
        driver.set_reg(virtio.COMMON_QUEUE_VECTOR, 2, vector)
        driver.set_reg(virtio.COMMON_CONFIG_VECTOR, 2, vector)
        assert driver.reg(virtio.COMMON_QUEUE_VECTOR, 2) == expected
        assert driver.reg(virtio.COMMON_CONFIG_VECTOR, 2) == expected
