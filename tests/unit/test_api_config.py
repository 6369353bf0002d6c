"""The VmConfig of vm.create: Cloud Hypervisor's bodies are understood, what asks for more than there is is named."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cellvisor.controlplane import vmconfig
from cellvisor.core.errors import CellvisorError, UsageError


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("boot") / "vmlinux"
    path.write_bytes(b"kernel")
    return str(path)


def test_the_least(kernel: str) -> None:
    order = vmconfig.read({"payload": {"kernel": kernel}})
    assert (order.cpus.boot, order.cpus.max, order.memory.size) == (1, 1, 512 << 20)
    assert (order.payload.kernel, order.payload.cmdline, order.serial.mode) == (kernel, "", "null")
    assert [(want.kind, want.fixed_id, dict(want.body or {})) for want in order.wanted] == [
        ("console", "__console", {"mode": "tty"}), ("rng", "__rng", {})]


def test_as_cloud_hypervisor_shows_its_own(kernel: str) -> None:
    """What its vm.info has as `config` for a small VM, every default spelled out."""
    order = vmconfig.read({
        "cpus": {"boot_vcpus": 2, "max_vcpus": 4, "topology": None, "kvm_hyperv": False, "max_phys_bits": 46,
                 "affinity": None, "features": {"amx": False}, "nested": True},
        "memory": {"size": 1 << 30, "mergeable": False, "hotplug_method": "Acpi", "hotplug_size": None,
                   "hotplugged_size": None, "shared": False, "hugepages": False, "hugepage_size": None,
                   "prefault": True, "zones": None, "thp": True},
        "payload": {"firmware": None, "kernel": kernel, "cmdline": "quiet", "initramfs": None},
        "rate_limit_groups": [{"id": "g", "rate_limiter_config": {"bandwidth": None, "ops": {
            "size": 20, "one_time_burst": None, "refill_time": 100}}}],
        "disks": [{"path": "/a", "readonly": True, "rate_limiter_config": {
            "bandwidth": {"size": 1000, "one_time_burst": 0, "refill_time": 100}, "ops": None}}],
        "net": None, "rng": {"src": "/dev/random", "iommu": False}, "balloon": None, "fs": None, "pmem": None,
        "serial": {"file": None, "mode": "Null", "iommu": False, "socket": None},
        "console": {"file": "/dev/pts/3", "mode": "Pty", "iommu": False, "socket": None},
        "debug_console": {"file": None, "mode": "Off", "iobase": 233},
        "devices": None, "user_devices": None, "vdpa": None, "vsock": None, "pvpanic": False, "iommu": False,
        "numa": None, "watchdog": False, "gdb": False, "pci_segments": None, "platform": None, "tpm": None,
        "landlock_enable": False, "landlock_rules": None,
    })
    assert (order.cpus.boot, order.cpus.max, order.memory.prefault) == (2, 4, True)
    assert [group.as_json()["rate_limiter_config"]["ops"] for group in order.groups] == [
        {"size": 20, "one_time_burst": 0, "refill_time": 100}]
    assert [(want.kind, dict(want.body or {})) for want in order.wanted] == [
        ("console", {"mode": "Pty", "iommu": False}),
        ("disk", {"path": "/a", "readonly": True, "bw_size": 1000, "bw_one_time_burst": 0, "bw_refill_time": 100}),
        ("rng", {"src": "/dev/random", "iommu": False})]


def test_network_cards_as_cloud_hypervisor_shows_them(kernel: str) -> None:
    shown = {"tap": "tap0", "ip": None, "mask": None, "mac": "52:54:00:12:34:56", "host_mac": None, "mtu": None,
             "iommu": False, "num_queues": 2, "queue_size": 256, "vhost_user": False, "vhost_socket": None,
             "vhost_mode": "Client", "id": "_net0", "fds": None, "rate_limiter_config": {"bandwidth": None, "ops": {
                 "size": 10, "one_time_burst": None, "refill_time": 100}}, "pci_segment": 0, "offload_tso": True}
    order = vmconfig.read({"payload": {"kernel": kernel}, "net": [shown], "disks": [{"path": "/a"}]})
    assert [want.kind for want in order.wanted] == ["console", "disk", "net", "rng"]
    assert {key: value for key, value in (order.wanted[2].body or {}).items() if value is not None} == {
        "tap": "tap0", "mac": "52:54:00:12:34:56", "iommu": False, "num_queues": 2, "queue_size": 256, "id": "_net0",
        "ops_size": 10, "ops_refill_time": 100, "pci_segment": 0, "offload_tso": True}


def test_devices_of_any_type(kernel: str) -> None:
    order = vmconfig.read({"payload": {"kernel": kernel}, "console": {"mode": "Off"},
                           "virtio": [{"type": "pattern", "id": "p", "size": 3}]})
    want = order.wanted[-1]
    assert (want.kind, want.by_verb, want.body) == ("pattern", False, {"id": "p", "size": 3})
    assert [one.kind for one in order.wanted] == ["rng", "pattern"]


@pytest.mark.parametrize(("change", "message"), [
    ({"payload": None}, "create: payload is missing"),
    ({"payload": {}}, "payload: kernel is missing"),
    ({"payload": {"kernel": "/no/such"}}, "--kernel /no/such: No such file"),
    ({"payload": {"kernel": "a\0b"}}, "payload: kernel=.* is not a file name"),
    ({"payload": {"firmware": "/x"}}, "payload: firmware is not supported yet"),
    ({"payload": []}, "payload: list instead of an object"),
    ({"cpus": {"boot_vcpus": 65}}, "cpus: boot_vcpus=65 is above 64"),
    ({"cpus": {"boot_vcpus": 4, "max_vcpus": 2}}, "max=2 is below boot=4"),
    ({"cpus": {"boot_vcpu": 4}}, "cpus: unknown key 'boot_vcpu' .did you mean boot_vcpus"),
    ({"cpus": {"topology": {"packages": 2}}}, "cpus: topology is not supported yet"),
    ({"memory": {"size": 1}}, "size=1 is outside"),
    ({"memory": {"size": 2**64}}, "size=18446744073709551616 is out of range"),
    ({"memory": {"size": True}}, "memory: size=on is not a whole number"),
    ({"memory": {"hotplug_size": 1 << 30}}, "memory: hotplug_size is not supported yet"),
    ({"net": [{"fds": [3]}]}, r"create: fds=\[3\]: descriptors come with add-net"),
    ({"rate_limit_groups": [{"id": "a", "rate_limiter_config": {"ops": {"size": 1}}}]},
     "rate_limit_groups id=a: ops_size=1 needs ops_refill_time"),
    ({"rate_limit_groups": [{"id": "a", "size": 1}]}, "rate_limit_groups: unknown key 'size'"),
    ({"watchdog": True}, "create: watchdog is not supported yet"),
    ({"disk": []}, "create: unknown key 'disk' .did you mean disks"),
    ({"disks": {}}, "disks: not a list of objects"),
    ({"disks": ["/a"]}, "disks: not a list of objects"),
    ({"disks": [{"path": "/a", "rate_limiter_config": 1}]}, "rate_limiter_config: int instead of an object"),
    ({"disks": [{"path": "/a", "rate_limiter_config": {"bw": {}}}]}, "rate_limiter_config: unknown key 'bw'"),
    ({"serial": {"mode": "File"}}, "serial: mode=file needs file"),
    ({"serial": {"mode": "Teletype"}}, "serial: mode=Teletype is not off"),
    ({"virtio": [{"id": "x"}]}, "virtio: type='None' is not the name"),
])
def test_refusals_name_the_key(kernel: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        vmconfig.read({"payload": {"kernel": kernel}, **change})


KEYS = st.sampled_from(["cpus", "memory", "payload", "serial", "console", "rng", "disks", "virtio", "net", "mode",
                        "type", "boot_vcpus", "size", "kernel", "initramfs", "cmdline", "id", "file",
                        "rate_limiter_config", "bandwidth"]) | st.text(max_size=8)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-2**64, 2**64) | st.floats() | st.text(max_size=8) | st.just("Pty"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=12)


@given(st.dictionaries(KEYS, VALUES, max_size=6))
def test_no_body_does_more_than_fail(body: dict[str, Any]) -> None:
    try:
        vmconfig.read(body)
        status = 400
    except CellvisorError as error:
        status = error.status
    assert status == 400
