"""Boot a stock Debian kernel with a console, a disk and an RNG, each in a process of its own, kill the disk's while the
guest writes to it, and say what happened.

Runs where KVM can run Linux: in the nested lab or on a machine with hardware KVM (tests/lab/demo.py decides).
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from cellvisor.ctl.client import Client
from tests.lab import disk, guest, initramfs, vmms

HERE = Path(__file__).parent


def say(text: str) -> None:
    """Write one line at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def kill_the_disk(client: Client) -> None:
    """Kill the process that serves the disk and tell of the one that goes on."""
    disk = next(device for device in client.call("devices")["devices"] if device["type"] == "blk")
    os.kill(disk["pid"], signal.SIGKILL)
    say(f"demo: kill -9 {disk['pid']}, the disk's process, in the middle of it")
    until = time.monotonic() + 60
    while time.monotonic() < until:
        for event in client.events(follow=False):
            if event["event"] == "device.restarted":
                about = event["properties"]
                say(f"demo: process {about['pid']} goes on where it ended, ready {about['ms']:.0f} ms after the death")
                return
        time.sleep(0.05)
    raise SystemExit("demo: the disk's process was not replaced")


def main() -> int:
    """Run the demo; the exit status is 0 only if the disk's content is verified on both sides."""
    with tempfile.TemporaryDirectory(prefix="cellvisor-demo-") as folder:
        return _run(Path(folder))


def _run(folder: Path) -> int:
    source = guest.kernels() / "cloud"
    image, report = disk.make(folder / "disk.img"), folder / "report.json"
    initrd = folder / "initrd"
    own = initramfs.overlay({"init": (HERE / "init.sh").read_bytes()})
    initrd.write_bytes((source / "initrd").read_bytes() + own)
    command = [vmms.cellvisor_command(), "run", "--name", "demo", "--kernel", str(source / "vmlinux"),
               "--initramfs", str(initrd), "--cmdline", "console=hvc0 quiet panic=-1", "--cpus", "boot=2",
               "--memory", "size=512M", "--disk", f"path={image}", "--console", "tty", "--report", str(report)]
    say(f"demo: $ {' '.join(['cellvisor', *command[1:]])}")
    run = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, errors="replace")
    said = ""
    assert run.stdout is not None
    for line in run.stdout:
        said += line
        say(line.rstrip("\r\n"))
        if "each write timed" in line:
            with Client("demo") as client:
                kill_the_disk(client)
    status = run.wait()
    say("demo: the guest has powered off, exit status 0\n" if status == 0 else
        f"demo: cellvisor run ended with status {status}")
    if report.exists():
        subprocess.run([vmms.cellvisor_command(), "report", str(report)], check=False)
    digest = re.search(r"sha256 ([0-9a-f]{64})", said)
    if status or digest is None:
        return 1
    pause = re.search(r"none failed: usually (\d+) ms, the longest (\d+) ms", said)
    if pause is None:
        return 1
    same = disk.digest_on_host(image) == digest[1]
    say(f"\ndemo: the file system is clean and its data {'is' if same else 'IS NOT'} what the guest wrote;\n"
        f"demo: the death of the disk's process cost one write {pause[2]} ms instead of {pause[1]}, and nothing else")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
