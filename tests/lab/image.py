"""Build the lab's parts from Debian's packages: L1's root image, its kernel, and the guests' kernels.

Built once per recipe under .lab (recipe.key()); a lock keeps two builders apart, a rename ends each build, so
neither Ctrl-C nor a full disk leaves anything that looks finished.

    absent --lock--> building (l1.new) --rename--> ready (l1-KEY/)     all but the two newest l1-* are removed
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from tests.debian import Flavour, Missing, kernel, need
from tests.lab import initramfs, recipe


@dataclass(frozen=True, slots=True)
class Image:
    """L1, ready to boot."""

    root: Path  # ext4
    vmlinux: Path
    initrd: Path  # busybox and modules, without /init


def l1() -> Image:
    """Return L1's image, building it the first time (about 90 s). Raises Missing."""
    folder = _built("l1", _build_l1)
    return Image(folder / "root.img", folder / "vmlinux", folder / "initrd")


def guests() -> Path:
    """Return the folder of guest kernels: <flavour>/{bzImage,vmlinux,initrd,version}."""
    return _built("guests", _build_guests)


def say(line: str) -> None:
    """Tell what is being done, for it may take a while."""
    print(f"lab: {line}", file=sys.stderr, flush=True)


def _built(what: str, build: Callable[[Path], None]) -> Path:
    folder = recipe.cache() / f"{what}-{recipe.key()}"
    if folder.exists():
        return folder
    with _locked(what):
        if not folder.exists():
            _make(what, folder, build)
    return folder


def _make(what: str, folder: Path, build: Callable[[Path], None]) -> None:
    fresh = folder.with_name(f"{what}.new")
    began = time.monotonic()
    try:
        shutil.rmtree(fresh, ignore_errors=True)
        _check_room(fresh.parent)
        fresh.mkdir(parents=True)
        build(fresh)
        _sync(fresh)
        fresh.rename(folder)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise Missing(f"no space left in {fresh.parent} while building the lab: it takes up to "
                      f"{recipe.BUILD_BYTES >> 30} GiB; free some or set CELLVISOR_LAB_CACHE") from None
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    # Two checkouts with different recipes may share the cache; older images are nobody's.
    ready = [path for path in folder.parent.glob(f"{what}-*") if path.is_dir()]
    for old in sorted(ready, key=lambda path: path.stat().st_mtime)[:-2]:
        shutil.rmtree(old, ignore_errors=True)
    say(f"{folder.name} is ready after {time.monotonic() - began:.0f} s")


def _check_room(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < recipe.BUILD_BYTES:
        raise Missing(f"{folder} has {free >> 20} MiB free, building the lab takes up to "
                      f"{recipe.BUILD_BYTES >> 20} MiB; free some or set CELLVISOR_LAB_CACHE")


def _build_guests(into: Path) -> None:
    need("busybox", "busybox-static")
    for flavour, more in recipe.FLAVOURS.items():
        stock = kernel(cast("Flavour", flavour))
        say(f"packing the guest kernel {stock.version}")
        folder = into / flavour
        folder.mkdir()
        shutil.copy(stock.bzimage, folder / "bzImage")
        shutil.copy(stock.vmlinux, folder / "vmlinux")
        (folder / "version").write_text(stock.version + "\n")
        scratch = into / "scratch"
        names = (*recipe.L2_MODULES, *more)
        (folder / "initrd").write_bytes(initramfs.base(stock.modules_dir, names, scratch))
        shutil.rmtree(scratch)


def _build_l1(into: Path) -> None:
    if os.geteuid() != 0:
        raise Missing("building the lab's root file system takes root: run this target once as root")
    mmdebstrap, mke2fs = need("mmdebstrap", "mmdebstrap"), need("mke2fs", "e2fsprogs")
    guest_kernels = guests()
    root = into / "root"
    say(f"installing Debian {recipe.SUITE} for L1 (mmdebstrap, about a minute)")
    leave_out = [f"--dpkgopt=path-exclude={pattern}" for pattern in recipe.L1_LEFT_OUT]
    _check([mmdebstrap, "--quiet", "--variant=minbase", "--mode=root", "--format=directory",
            f"--include={','.join(recipe.L1_PACKAGES)}", '--aptopt=APT::Install-Recommends "false"',
            *leave_out, recipe.SUITE, str(root)])
    say(f"installing Python packages for L1: {' '.join(recipe.PYTHON_PACKAGES)}")
    packages = root / f"usr/local/lib/python{recipe.PYTHON}/dist-packages"
    _check([sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile",
            "--root-user-action=ignore", "--target", str(packages), "--python-version", recipe.PYTHON,
            "--only-binary=:all:", *recipe.PYTHON_PACKAGES])
    # setuptools' hook for distutils would cost every Python start in L1 some ten milliseconds.
    (packages / "distutils-precedence.pth").unlink(missing_ok=True)
    (packages / "cellvisor.pth").write_text("/cellvisor/src\n")
    _check(["chroot", str(root), "python3", "-m", "compileall", "-q",
            f"/usr/local/lib/python{recipe.PYTHON}/dist-packages"])
    stock = kernel("amd64")
    say(f"adding the modules of {stock.version} and the guest kernels")
    initramfs.copy_modules(stock.modules_dir, recipe.L1_MODULES, root / "usr")
    shutil.copytree(guest_kernels, root / "lab/guests")
    (root / "cellvisor").mkdir()
    shutil.copy(stock.vmlinux, into / "vmlinux")
    (into / "initrd").write_bytes(
        initramfs.base(stock.modules_dir, recipe.L1_BOOT_MODULES, into / "scratch"))
    say("making L1's disk image")
    _check([mke2fs, "-q", "-t", "ext4", "-O", "^has_journal", "-E", "lazy_itable_init=1", "-m", "0",
            "-d", str(root), str(into / "root.img"), f"{recipe.IMAGE_BYTES >> 10}k"])
    shutil.rmtree(into / "scratch")
    shutil.rmtree(root)


def _check(command: list[str]) -> None:
    # Output comes only when it failed: these tools say a lot on a good day.
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
                          env={**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"})
    if done.returncode == 0:
        return
    said = (done.stdout + done.stderr).strip()
    if "No space left on device" in said:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    raise Missing(f"{Path(command[0]).name} failed with status {done.returncode}:\n{said[-2000:]}")


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _locked(what: str) -> Iterator[None]:
    recipe.cache().mkdir(parents=True, exist_ok=True)
    with open(recipe.cache() / f"{what}.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another build of {what}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
