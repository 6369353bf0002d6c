"""Pack the checkout for L1: a tar that L1 unpacks from its second disk into /cellvisor.

It changes with every edit, so it stays out of the image. Python files travel compiled (L1's Python is the
host's minor version or it compiles them itself), for L1 is an emulated machine and slow at that.
"""

from __future__ import annotations

import importlib.util
import io
import os
import py_compile
import sys
import tarfile
from pathlib import Path

from tests.lab import recipe
from tests.lab.recipe import CHECKOUT

PARTS = ("conftest.py", "controlplane", "core", "ctl", "deploy", "devices", "pyproject.toml", "src", "tests")
LEFT_OUT = {"__pycache__", "build", ".pytest_cache", ".mypy_cache", ".ruff_cache", ".hypothesis"}


def pack(into: Path) -> Path:
    """Write the checkout as a tar file (about 1 s, much less once compiled) and return it."""
    compiled = recipe.cache() / "compiled"
    with tarfile.open(into, "w") as tar:
        for part in PARTS:
            if (CHECKOUT / part).exists():
                _add(tar, CHECKOUT / part, compiled)
    return into


def _add(tar: tarfile.TarFile, path: Path, compiled: Path) -> None:
    name = path.relative_to(CHECKOUT)
    if path.name in LEFT_OUT or path.name.endswith((".egg-info", ".o")):
        return
    if path.is_dir() and not path.is_symlink():
        for child in sorted(path.iterdir()):
            _add(tar, child, compiled)
        return
    try:
        tar.add(path, str(name), recursive=False)
        if path.suffix == ".py" and f"{sys.version_info[0]}.{sys.version_info[1]}" == recipe.PYTHON:
            _add_compiled(tar, path, name, compiled)
    except FileNotFoundError:
        return  # an editor's file, gone again


def _add_compiled(tar: tarfile.TarFile, path: Path, name: Path, compiled: Path) -> None:
    copy = compiled / name.with_suffix(".pyc")
    stamp = path.stat()
    if not (copy.exists() and copy.stat().st_mtime_ns == stamp.st_mtime_ns):
        copy.parent.mkdir(parents=True, exist_ok=True)
        # py_compile renames, so two packers do not meet; a file that does not compile is L1's to refuse.
        if not py_compile.compile(str(path), str(copy), dfile=f"/cellvisor/{name}", quiet=2):
            return
        os.utime(copy, ns=(stamp.st_mtime_ns, stamp.st_mtime_ns))
    data = copy.read_bytes()
    info = tarfile.TarInfo(importlib.util.cache_from_source(str(name)))
    info.size, info.mtime = len(data), int(stamp.st_mtime)
    tar.addfile(info, io.BytesIO(data))
