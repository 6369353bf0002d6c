"""Boot a stock Debian kernel with a console, a disk and an RNG, each in a process of its own, and say what happened.

Runs where KVM can run Linux: in the nested lab or on a machine with hardware KVM (tests/lab/demo.py decides).
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.lab import disk, guest, initramfs, vmms

HERE = Path(__file__).parent


def say(text: str) -> None:
    """Write one line at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


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
    status = run.wait()
    say("demo: the guest has powered off, exit status 0\n" if status == 0 else
        f"demo: cellvisor run ended with status {status}")
    if report.exists():
        subprocess.run([vmms.cellvisor_command(), "report", str(report)], check=False)
    digest = re.search(r"sha256 ([0-9a-f]{64})", said)
    if status or digest is None:
        return 1
    same = disk.digest_on_host(image) == digest[1]
    say(f"\ndemo: the file system is clean and its data {'is' if same else 'IS NOT'} what the guest wrote")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
