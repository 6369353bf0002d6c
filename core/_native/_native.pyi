"""What cffi generates: names come from the headers here and from kernel.cdef."""

from typing import Any

lib: Any
ffi: Any
