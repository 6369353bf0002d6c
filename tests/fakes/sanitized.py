"""A pytest plugin: `-p tests.fakes.sanitized` runs tests with C that AddressSanitizer and UBSan watch.

`environment()` builds that extension and returns what a process needs to load it. tests/unit/test_sanitizers.py.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

from tests.debian import need

ROOT = Path(__file__).resolve().parents[2]
NAME = "cellvisor.core._native._native"
FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -O1"
LIBRARY = "CELLVISOR_SANITIZED"  # the path of the extension, in the environment

if LIBRARY in os.environ:
    _spec = importlib.util.spec_from_file_location(NAME, os.environ[LIBRARY])
    assert _spec is not None
    assert _spec.loader is not None
    sys.modules[NAME] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules[NAME])


def environment() -> dict[str, str]:
    """Build the extension if its sources changed (seconds); returns the environment of a process that uses it."""
    sources = sorted(path for path in (ROOT / "core" / "_native").iterdir()
                     if path.suffix in (".c", ".h", ".cdef", ".py") and path.stem != "_native")
    key = hashlib.sha256(FLAGS.encode() + b"\0".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    folder = ROOT / "build" / "sanitized"
    folder.mkdir(parents=True, exist_ok=True)
    where = folder / key
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (where / "done").exists():
            subprocess.run([sys.executable, "-W", "ignore", "setup.py", "-q", "build_ext", "--build-lib", str(where),
                            "--build-temp", str(where / "objects")], cwd=ROOT, check=True, capture_output=True,
                           env={**os.environ, "CFLAGS": FLAGS})
            (where / "done").touch()
    library, = where.glob("cellvisor/core/_native/_native*.so")
    runtime = [_runtime(name) for name in ("libasan.so", "libubsan.so", "libstdc++.so")]
    return {**os.environ, LIBRARY: str(library), "LD_PRELOAD": " ".join(runtime), "CELLVISOR_TEST_CFLAGS": FLAGS,
            # Python itself keeps memory until its end, and its own allocator would hide what lies beside an object.
            "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1", "UBSAN_OPTIONS": "print_stacktrace=1",
            "PYTHONMALLOC": "malloc"}


def _runtime(name: str) -> str:
    return subprocess.run([need("gcc", "gcc"), f"-print-file-name={name}"], check=True, capture_output=True,
                          text=True).stdout.strip()
