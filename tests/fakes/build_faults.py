"""Build the ring code a second time, with a fault point before every store, and import it.

The result is cached under build/faults/ by the hash of its sources. `native()` has lib and ffi like
core._native._native, plus lib.cv_fault_arm, cv_fault_point, cv_fault_dead and cv_fault_left.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import shutil
from pathlib import Path
from types import ModuleType

from cffi import FFI

ROOT = Path(__file__).resolve().parents[2]
NATIVE = ROOT / "core" / "_native"
HEADERS = ("memory.h", "ring.h")
SOURCES = ("memory.c", "chain.c", "ring.c")
FAULTS = Path(__file__).with_name("faults.h")
FLAGS = os.environ.get("CELLVISOR_TEST_CFLAGS", "-O1").split()
CDEF = """
#define CV_KILLED ...
extern int cv_fault_dead;
extern long cv_fault_left;
void cv_fault_arm(long points);
int cv_fault_point(void);
"""
CODE = """
#include "memory.h"
#include "ring.h"
#include "faults.h"
jmp_buf cv_fault_env;
int cv_fault_dead;
long cv_fault_left = -1;
void cv_fault_arm(long points) { cv_fault_dead = 0; cv_fault_left = points; }
int cv_fault_point(void) { CV_ENTER(); CV_POINT(); return 0; }
"""


def native() -> ModuleType:
    """Return the module, building it if its sources changed (a few seconds)."""
    inputs = [NATIVE / name for name in (*HEADERS, *SOURCES, "ring_private.h")]
    inputs += [FAULTS, Path(__file__)]
    key = hashlib.sha256(b"\0".join([*map(Path.read_bytes, inputs), *map(str.encode, FLAGS)])).hexdigest()[:16]
    name = f"_ring_faults_{key}"
    folder = ROOT / "build" / "faults"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = list(folder.glob(f"{name}.*.so"))
        path = str(found[0]) if found else _build(name, folder)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _build(name: str, folder: Path) -> str:
    ffi = FFI()
    text = CDEF
    for header in HEADERS:
        for line in (NATIVE / header).read_text().splitlines():
            if not line.startswith("#") or (line.startswith("#define ") and len(line.split()) >= 3):
                text += line + "\n"
    ffi.cdef(text)
    ffi.set_source(name, CODE, sources=[str(NATIVE / source) for source in SOURCES],
                   include_dirs=[str(NATIVE), str(FAULTS.parent)],
                   extra_compile_args=[*FLAGS, "-g", "-std=gnu11", "-D_GNU_SOURCE", "-DCV_FAULTS",
                                       f"-include{FAULTS}"],
                   extra_link_args=[flag for flag in FLAGS if flag.startswith("-fsanitize")])
    scratch = folder / f"{name}.{os.getpid()}"
    scratch.mkdir()
    built = Path(ffi.compile(tmpdir=str(scratch)))
    final = folder / built.name
    built.rename(final)
    shutil.rmtree(scratch)
    return str(final)
