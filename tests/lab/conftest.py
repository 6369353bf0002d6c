"""Tests marked `lab` run inside L1 and report here; on a machine with hardware KVM they run directly.

    here: collect --> run the others --> farm: boot L1 machines, run groups --> reports, as if run here
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING

import pytest

from tests.lab import place

if TYPE_CHECKING:
    from cellvisor.ctl.client import Client
    from tests.lab.guest import Linux
    from tests.lab.hotplug import Shared


@pytest.fixture
def vm(shared: Shared) -> Iterator[tuple[Linux, Client]]:
    """The module's guest, which gets everything back; the module says with `shared` what it is like."""
    yield shared.get()
    shared.give_back()


def _is_for_lab(item: pytest.Item) -> bool:
    return item.get_closest_marker("lab") is not None and not place.find().direct


def pytest_report_collectionfinish(items: list[pytest.Item]) -> str | list[str]:
    """Say where the marked tests run."""
    count = sum(item.get_closest_marker("lab") is not None for item in items)
    where = place.find()
    if not count or where.inside:
        return []
    what = "run directly on this machine" if where.direct else "run in the nested lab, not on this machine"
    return f"lab: {count} tests {what}: {where.why}"


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop(session: pytest.Session) -> Generator[None, object, object]:
    """Keep the marked tests from the ordinary loop and run them in L1 afterwards."""
    everything = session.items
    for_lab = [item for item in everything if _is_for_lab(item)]
    if not for_lab or session.config.option.collectonly:
        return (yield)
    session.items = [item for item in everything if not _is_for_lab(item)]
    try:
        result = yield
    finally:
        session.items = everything
    from tests.lab.farm import Farm

    Farm(session, for_lab).run()
    return result
