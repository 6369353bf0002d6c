"""The command line of `cellvisor run`: what it accepts, and one line naming flag and value for the rest."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from cellvisor.controlplane import flags
from cellvisor.controlplane.config import VmConfig, check_cpus
from cellvisor.core.errors import UsageError


@pytest.fixture
def kernel(tmp_path: Path) -> str:
    path = tmp_path / "vmlinux"
    path.write_bytes(b"kernel")
    return str(path)


def parse(kernel: str, text: str) -> flags.RunFlags:
    return flags.parse(["--kernel", kernel, *shlex.split(text)])


def test_defaults_are_cloud_hypervisors(kernel: str) -> None:
    found = parse(kernel, "")
    assert (found.cpus.boot, found.cpus.max) == (1, 1)
    assert found.memory.size == 512 << 20
    assert found.serial.mode == "null"
    assert [(want.kind, want.text, want.fixed_id) for want in found.wanted] == [
        ("console", "tty", "__console"), ("rng", "", "__rng")]


def test_everything_at_once(kernel: str) -> None:
    found = parse(kernel, "--cpus boot=2,max=4 --memory size=1G,prefault=on,thp=off --disk path=a path=b,readonly=on"
                          " --disk path=c --rng src=/dev/random --console null --serial file=/tmp/x"
                          " --device-type blk,path=d --name web -vv --cmdline 'a=b c' --event-monitor fd=7")
    assert (found.cpus.boot, found.cpus.max) == (2, 4)
    assert (found.memory.size, found.memory.prefault, found.memory.thp) == (1 << 30, True, False)
    assert [(want.kind, want.text) for want in found.wanted] == [
        ("console", "null"), ("disk", "path=a"), ("disk", "path=b,readonly=on"), ("disk", "path=c"),
        ("rng", "src=/dev/random"), ("blk", "path=d")]
    assert (found.serial.mode, found.serial.file) == ("file", "/tmp/x")
    assert (found.name, found.verbosity, found.event_monitor) == ("web", 2, "/proc/self/fd/7")
    body = VmConfig(found.cpus, found.memory, found.payload, found.serial).as_json()
    assert body["cpus"] == {"boot_vcpus": 2, "max_vcpus": 4}
    assert body["payload"] == {"kernel": kernel, "initramfs": None, "cmdline": "a=b c"}
    assert body["serial"] == {"mode": "File", "file": "/tmp/x", "socket": None}


def test_bare_rng_and_no_console(kernel: str) -> None:
    assert [want.kind for want in parse(kernel, "--rng --console off").wanted] == ["rng"]


@pytest.mark.parametrize(("text", "message"), [
    ("--cpus boot=0", "--cpus: boot=0 is below 1"),
    ("--cpus boot=65", "--cpus: boot=65 is above 64"),
    ("--cpus boot=4,max=2", "--cpus: max=2 is below boot=4"),
    ("--cpus boots=1", "--cpus: unknown key 'boots' .*known keys: boot, max"),
    ("--cpus 4", "--cpus"),
    ("--memory size=0", "--memory: size=0 is outside"),
    ("--memory size=1000T", "--memory: size=.* is outside"),
    ("--memory size=3000001K", "--memory: size=.* not a multiple"),
    ("--memory size=lots", "--memory: size=lots is not a size"),
    ("--memory hugepage_size=2M", "--memory: unknown key 'hugepage_size'"),
    ("--memory shared=off", "--memory: shared=off"),
    ("--initramfs /no/such", "--initramfs /no/such: No such file"),
    ("--initramfs /", "--initramfs /: not a file"),
    ("--serial tty2", "--serial: mode=tty2"),
    ("--serial file", "--serial file: .*write --serial file=PATH"),
    ("--serial pty,socket=/x", "--serial pty,socket=/x"),
    ("--api-socket fd=x", "--api-socket 'fd=x' .write PATH, path=PATH or fd=NUMBER"),
    ("--api-socket path=", "--api-socket 'path='"),
    (f"--api-socket /{'x' * 107}", "--api-socket /xxx.* socket paths have at most 107 bytes"),
    ("--vsock cid=3", "--vsock: not supported yet"),
    ("--rate-limit-group bw_size=1", "--rate-limit-group: id is missing"),
    ("--rate-limit-group id=a,bw_size=1", "--rate-limit-group id=a: bw_size=1 needs bw_refill_time"),
    ("--rate-limit-group id=a id=a", "--rate-limit-group: id=a is given twice"),
    ("--rate-limit-group id=a/b", "--rate-limit-group: id='a/b' cannot name a group"),
    ("--rate-limit-group id=a,ops=5", "--rate-limit-group: unknown key 'ops'"),
    ("--dsik path=x", "unknown flag --dsik .did you mean --disk. known flags: --api --api-socket"),
    ("stray", "unexpected argument 'stray'"),
    ("--disk", "--disk: expected at least one argument"),
    ("--device-type path=x", "--device-type 'path=x' does not begin"),
    ("--event-monitor x", "--event-monitor 'x'"),
    ("--name a/b", "--name 'a/b'"),
    (f"--cmdline {'x' * 70000}", "--cmdline has 70000 bytes"),
])
def test_refusals_name_flag_and_value(kernel: str, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        parse(kernel, text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("argv", "message"), [
    ([], "--kernel is missing"),
    (["--kernel"], "--kernel: expected one argument"),
    (["--kernel", "/no/such"], "--kernel /no/such: No such file"),
    (["--kernel", "/dev/null"], "--kernel /dev/null: not a file"),
    (["--kernel", "a\0b"], "--kernel a.b: embedded null"),
])
def test_a_kernel_is_needed(argv: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        flags.parse(argv)


def test_empty_kernel(tmp_path: Path) -> None:
    (tmp_path / "k").touch()
    with pytest.raises(UsageError, match="empty file"):
        flags.parse(["--kernel", str(tmp_path / "k")])


def test_max_follows_boot(kernel: str) -> None:
    assert check_cpus(parse(kernel, "--cpus boot=3").cpus).max == 3


@pytest.mark.parametrize(("text", "found"), [
    ("--api-socket /tmp/x", "/tmp/x"), ("--api-socket path=/tmp/x", "/tmp/x"), ("--api-socket fd=7", "fd=7")])
def test_api_socket(kernel: str, text: str, found: str) -> None:
    assert parse(kernel, text).api_socket == found
    empty = flags.parse(shlex.split(text))
    assert (empty.api_socket, empty.order, empty.wanted) == (found, None, ())
    with pytest.raises(UsageError, match="--kernel is missing: --cpus needs it"):
        flags.parse([*shlex.split(text), "--cpus", "boot=2"])
