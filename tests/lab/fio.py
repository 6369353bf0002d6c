"""What fio does in guests; programs.py brings it there."""

from __future__ import annotations

import re

from tests.lab.guest import Linux
from tests.lab.programs import LOADER

# Writes, reads back and compares every block; the first wrong byte or failed request ends it with an error.
VERIFY = "--direct=1 --ioengine=libaio --bs=4k --verify=crc32c --verify_fatal=1 --do_verify=1"


def load(guest: Linux, disk: str) -> None:
    """Keep a disk busy with random writes at depth 16 until it fails or the guest ends."""
    job = "--name=load --rw=randwrite --direct=1 --ioengine=libaio --iodepth=16 --bs=4k --time_based --runtime=9999"
    guest.run(f"fio --filename=/dev/{disk} {job} >/tmp/fio.log 2>&1 &")
    guest.run(f"until [ $(cut -c1-200 /sys/block/{disk}/stat | awk '{{print $5}}') -gt 100 ]; do sleep 0.1; done")


def ended_with_an_error(guest: Linux) -> bool:
    """Wait for load() to end, as it does when its disk goes, and tell whether it says so."""
    guest.run(f"while pidof {LOADER} >/dev/null; do sleep 0.1; done")
    return re.search(r"err= *[1-9]|error=", guest.run("cat /tmp/fio.log")) is not None


def verify_until_told(guest: Linux, disk: str, size: str = "16M", depth: int = 16) -> None:
    """Write and verify a disk, round after round, until finish()."""
    job = f"--name=verify --filename=/dev/{disk} --rw=randwrite --size={size} --iodepth={depth} {VERIFY}"
    guest.run(f"(n=0; until [ -e /tmp/stop ]; do n=$((n + 1)); fio --randseed=$n {job} >/tmp/fio.log 2>&1 || break; "
              "echo $n >/tmp/rounds; done; touch /tmp/ended) >/dev/null 2>&1 &")


def finish(guest: Linux, timeout: float = 180) -> int:
    """Let the round end and return how many there were, all without an error."""
    guest.run("touch /tmp/stop; until [ -e /tmp/ended ]; do sleep 0.2; done", timeout)
    said = guest.run("cat /tmp/fio.log")
    assert re.search(r"verify: .*err= 0:", said), said
    assert guest.run("dmesg | grep -iE 'i/o error|hung task'; true") == ""
    return int(guest.run("cat /tmp/rounds"))
