"""Write initramfs archives (cpio "newc", Linux Documentation/driver-api/early-userspace/buffer-format.rst).

Neither root nor a cpio program is needed. Archives may be concatenated, so
a guest's own files go in a second one.
"""

from __future__ import annotations

import lzma
import shutil
import stat
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path

from tests.debian import need

BUSYBOX = Path("/bin/busybox")  # where busybox-static puts it, here and in L1


class Archive:
    """One cpio archive in memory: add entries, parents first is taken care of."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._folders: set[str] = set()
        self._inode = 0

    def file(self, path: str, data: bytes, mode: int = 0o644) -> None:
        """Add a regular file at `path` (no leading slash)."""
        self._entry(path, stat.S_IFREG | mode, data)

    def link(self, path: str, target: str) -> None:
        """Add a symbolic link."""
        self._entry(path, stat.S_IFLNK | 0o777, target.encode())

    def device(self, path: str, major: int, minor: int) -> None:
        """Add a character device; the kernel opens /dev/console before init can mount anything."""
        self._entry(path, stat.S_IFCHR | 0o600, b"", major, minor)

    def folder(self, path: str) -> None:
        """Add a folder and its parents, once."""
        if path in self._folders or path in ("", "."):
            return
        self._folders.add(path)
        self._entry(path, stat.S_IFDIR | 0o755, b"")

    def to_bytes(self) -> bytes:
        """Return the archive, closed."""
        return b"".join([*self._parts, _record("TRAILER!!!", 0, 0, b"", 0, 0)])

    def _entry(self, path: str, mode: int, data: bytes, major: int = 0, minor: int = 0) -> None:
        self.folder(str(Path(path).parent))
        self._inode += 1
        self._parts.append(_record(path, self._inode, mode, data, major, minor))


def _record(path: str, inode: int, mode: int, data: bytes, major: int, minor: int) -> bytes:
    name = path.encode() + b"\0"
    fields = (inode, mode, 0, 0, 1, 0, len(data), 0, 0, major, minor, len(name), 0)
    head = b"070701" + b"".join(b"%08x" % field for field in fields) + name
    return head + bytes(-len(head) % 4) + data + bytes(-len(data) % 4)


def base(modules_dir: Path, names: Iterable[str], scratch: Path) -> bytes:
    """Return an archive of busybox, its commands and the named modules; it has no /init yet."""
    archive = Archive()
    archive.device("dev/console", 5, 1)
    for folder in ("proc", "sys", "tmp", "run", "mnt", "root"):
        archive.folder(folder)
    archive.file("bin/busybox", BUSYBOX.read_bytes(), 0o755)
    commands = subprocess.run([BUSYBOX, "--list"], capture_output=True, text=True, check=True).stdout
    for command in commands.split():
        if command != "busybox":
            archive.link(f"bin/{command}", "busybox")
    archive.link("sbin/modprobe", "../bin/busybox")  # where the kernel looks when it wants a module itself
    root = copy_modules(modules_dir, names, scratch)
    for path in sorted(root.rglob("*")):
        if path.is_file():
            archive.file(str(path.relative_to(scratch)), path.read_bytes())
    return archive.to_bytes()


def overlay(files: Mapping[str, bytes]) -> bytes:
    """Return an archive of executable `files` (path without leading slash), to follow a base()."""
    archive = Archive()
    for path, data in files.items():
        archive.file(path, data, 0o755)
    return archive.to_bytes()


def copy_modules(modules_dir: Path, names: Iterable[str], root: Path) -> Path:
    """Copy the named modules and what they depend on to `root`/lib/modules, unpacked and indexed."""
    target = root / "lib/modules" / modules_dir.name
    for name in closure(modules_dir, names):
        source, copy = modules_dir / name, target / name.removesuffix(".xz")
        copy.parent.mkdir(parents=True, exist_ok=True)
        data = source.read_bytes()
        copy.write_bytes(lzma.decompress(data) if name.endswith(".xz") else data)
    for index in ("modules.order", "modules.builtin", "modules.builtin.modinfo"):
        if (modules_dir / index).exists():
            shutil.copy(modules_dir / index, target / index)
    subprocess.run([need("depmod", "kmod"), "-b", str(root), modules_dir.name], check=True)
    return target


def closure(modules_dir: Path, names: Iterable[str]) -> list[str]:
    """Return the files of the named modules and of all they need. Raises KeyError for an unknown name."""
    files: dict[str, tuple[str, list[str]]] = {}
    for line in (modules_dir / "modules.dep").read_text().splitlines():
        path, _, needs = line.partition(":")
        files[_name(path)] = (path, needs.split())
    built_in = {_name(line) for line in (modules_dir / "modules.builtin").read_text().splitlines()}
    found: dict[str, None] = {}
    for name in names:
        if name not in built_in:
            own, others = files[name]
            found.update(dict.fromkeys([own, *others]))
    return sorted(found)


def _name(path: str) -> str:
    return Path(path).name.partition(".ko")[0].replace("-", "_")
