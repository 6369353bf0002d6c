"""What the system allows this process."""

from __future__ import annotations

import resource


def raise_descriptors() -> None:
    """Allow this process, and those that it starts, as many open descriptors as it may have (getrlimit(2))."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
