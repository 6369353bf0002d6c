"""Debian parts that tests need: programs installed on demand, stock kernels downloaded and unpacked once.

Everything is cached in .lab of the checkout and safe for several processes at once (a lock file per step).
"""

from __future__ import annotations

import fcntl
import json
import lzma
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

Flavour = Literal["cloud", "amd64"]

LAB = Path(__file__).resolve().parent.parent / ".lab"
META_PACKAGES: dict[str, str] = {"cloud": "linux-image-cloud-amd64", "amd64": "linux-image-amd64"}
LZ4_LEGACY = b"\x02\x21\x4c\x18"
XZ = b"\xfd7zXZ\x00"
ELF = b"\x7fELF"


class Missing(RuntimeError):
    """Something of Debian's is not there and could not be had; the message names it."""


@dataclass(frozen=True, slots=True)
class KernelPaths:
    """One Debian kernel, unpacked. `modules_dir` is .../lib/modules/<version>, with modules.dep."""

    bzimage: Path
    vmlinux: Path
    modules_dir: Path
    version: str


def need(program: str, package: str) -> str:
    """Return the path of `program`, installing Debian's `package` if it is missing. Raises Missing."""
    path = _which(program)
    if path:
        return path
    if os.geteuid() != 0:
        raise Missing(f"{program} is missing: install it with `apt-get install {package}` (not root here)")
    with _locked("apt"):
        if not (path := _which(program)):
            install([package])
            path = _which(program)
    if not path:
        raise Missing(f"{program} is missing although package {package} is installed")
    return path


def install(packages: Sequence[str]) -> None:
    """Install Debian packages, fetching the package lists if a first try fails. Raises Missing."""
    names = " ".join(packages)
    say(f"installing Debian package {names}")
    command = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", "-o", "DPkg::Lock::Timeout=600",
               *packages]
    if _run(command).returncode:
        _apt_update()
        done = _run(command)
        if done.returncode:
            raise Missing(f"cannot install {names}: {done.stderr.strip()[-300:]}")


def kernel(flavour: Flavour) -> KernelPaths:
    """Return Debian's current kernel of `flavour`, downloading and unpacking it the first time."""
    base = LAB / "kernels" / flavour
    ready = base / "ready.json"
    if not ready.exists():
        with _locked(f"kernel-{flavour}"):
            if not ready.exists():
                _build(flavour, base)
    said = json.loads(ready.read_text())
    return KernelPaths(base / said["bzimage"], base / said["vmlinux"], base / said["modules_dir"],
                       said["version"])


def vmlinux(flavour: Flavour) -> Path:
    """Return the uncompressed ELF kernel of `flavour`."""
    return kernel(flavour).vmlinux


def download(package: str, into: Path) -> Path:
    """Download one Debian package file into a directory and return its path. Raises Missing."""
    into.mkdir(parents=True, exist_ok=True)
    say(f"downloading Debian package {package}")
    command = ["apt-get", "download", "-qq", "-o", "APT::Sandbox::User=root", package]
    if _run(command, cwd=into).returncode:
        _apt_update()
        done = _run(command, cwd=into)
        if done.returncode:
            raise Missing(f"cannot download {package}: {done.stderr.strip()[-300:]}")
    found = sorted(into.glob(f"{package}_*.deb"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise Missing(f"apt-get download {package} left no file in {into}")
    return found[-1]


def unpack_payload(image: bytes) -> bytes:
    """Return the ELF kernel inside a bzImage (payload_offset and payload_length of the setup header)."""
    start = (image[0x1F1] + 1) * 512 + struct.unpack_from("<I", image, 0x248)[0]
    payload = image[start:start + struct.unpack_from("<I", image, 0x24C)[0]]
    if payload.startswith(LZ4_LEGACY):
        # The build appends the unpacked size, which is no part of the lz4 stream.
        tool = need("lz4", "lz4")
        elf = subprocess.run([tool, "-dc"], input=payload[:-4], stdout=subprocess.PIPE, check=True).stdout
    elif payload.startswith(XZ):
        elf = lzma.LZMADecompressor().decompress(payload)
    else:
        raise Missing(f"kernel payload is compressed in an unknown way ({payload[:6].hex()})")
    if not elf.startswith(ELF):
        raise Missing(f"kernel payload holds no ELF file ({elf[:4].hex()})")
    return elf


def say(line: str) -> None:
    """Tell what is being done, for it may take a while."""
    print(f"debian: {line}", file=sys.stderr, flush=True)


def _build(flavour: Flavour, base: Path) -> None:
    need("dpkg", "dpkg")
    depmod = need("depmod", "kmod")
    meta = META_PACKAGES[flavour]
    package = _kernel_package(meta)
    version = package.removeprefix("linux-image-")
    fresh = base.with_suffix(".new")
    shutil.rmtree(fresh, ignore_errors=True)
    deb = download(package, fresh)
    say(f"unpacking {deb.name}")
    root = fresh / "root"
    _check(["dpkg", "-x", str(deb), str(root)])
    deb.unlink()
    say(f"indexing the modules of {version}")
    _check([depmod, "-b", str(root), version])
    bzimage = Path("root/boot") / f"vmlinuz-{version}"
    say(f"decompressing the {flavour} kernel {version}")
    (fresh / "vmlinux").write_bytes(unpack_payload((fresh / bzimage).read_bytes()))
    paths = KernelPaths(bzimage, Path("vmlinux"), Path("root/lib/modules") / version, version)
    (fresh / "ready.json").write_text(json.dumps(asdict(paths), default=str, indent=1) + "\n")
    shutil.rmtree(base, ignore_errors=True)
    fresh.rename(base)


def _kernel_package(meta: str) -> str:
    # Package names carry the exact version; only the meta package knows today's.
    for attempt in range(2):
        text = _run(["apt-cache", "depends", "--important", meta]).stdout
        for line in text.splitlines():
            name = line.strip().removeprefix("Depends: ")
            if name.startswith("linux-image-") and name != line.strip():
                return name
        if attempt == 0:
            _apt_update()
    raise Missing(f"apt knows no kernel behind {meta}: {text.strip()!r}")


def _apt_update() -> None:
    say("fetching the package lists")
    _run(["apt-get", "update", "-qq"])


def _run(command: list[str], cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C"}
    try:
        return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True,
                              stdin=subprocess.DEVNULL, check=False)
    except FileNotFoundError:
        raise Missing(f"{command[0]} is missing: this needs a Debian machine") from None


def _check(command: list[str]) -> None:
    done = _run(command)
    if done.returncode:
        raise Missing(f"{' '.join(command)} failed: {done.stderr.strip()[-300:]}")


def _which(program: str) -> str | None:
    # /sbin is not on every user's PATH, yet depmod and mke2fs live there.
    return shutil.which(program, path=os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin")


@contextmanager
def _locked(name: str) -> Iterator[None]:
    LAB.mkdir(exist_ok=True)
    with open(LAB / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
