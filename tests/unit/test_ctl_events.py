"""Following events: what is kept and what is published make one whole, whenever the subscription comes to stand."""

from __future__ import annotations

from itertools import islice
from typing import Any

import pytest

from cellvisor.core.errors import NotFound
from cellvisor.core.wire.messages import pack
from cellvisor.ctl.zmqlink import ZmqLink


class Vm(ZmqLink):
    """A VM whose turns are (events that are kept from now on, events that the subscription brings)."""

    def __init__(self, *turns: tuple[list[int], list[int]]) -> None:
        self.turns, self.kept, self.published = list(turns), list[int](), list[int]()

    def call(self, verb: str, args: dict[str, Any], fds: Any = ()) -> Any:
        if not self.turns:
            raise NotFound("ended")
        kept, self.published = self.turns.pop(0)
        self.kept += kept
        return {"events": [{"seq": seq} for seq in self.kept if seq > args["since"]]}

    def _subscribe(self) -> Any:
        return self

    def __enter__(self) -> Vm:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def setsockopt(self, *option: Any) -> None:
        pass

    def poll(self, timeout: int) -> bool:
        return bool(self.published)

    def recv_multipart(self) -> list[bytes]:
        return [b"", pack({"seq": self.published.pop(0)})]


@pytest.mark.parametrize("turns", [
    [([1, 2], [3, 4])],
    [([1, 2, 3], [2, 3, 4])],                # heard as well as kept
    [([1], []), ([2, 3, 4], [])],            # heard of nothing
    [([1], [3]), ([2, 3], [4])],             # 2 was published before the subscription stood
    [([1], [4]), ([2, 3, 4], [])],
])
def test_every_event_once(turns: list[tuple[list[int], list[int]]]) -> None:
    assert [event["seq"] for event in islice(Vm(*turns).events(0, True), 10)] == [1, 2, 3, 4]


def test_a_successor_counts_from_further_on() -> None:
    vm = Vm(([1, 2], [1_000_001]), ([1_000_001], [1_000_002]))
    assert [event["seq"] for event in vm.events(0, True)] == [1, 2, 1_000_001, 1_000_002]
