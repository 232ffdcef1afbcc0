"""The windows of a long run in little memory: packed one by one, and unpacked when they are looked at."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import overload

from chronomoe_hf.telemetry.views import Window

_HELD = 128  # unpacked windows: more than a page draws


class PackedWindows(Sequence[Window]):
    """Windows of a run, oldest first, as a sequence that cannot be changed.

    A window of 48 layers takes about 15 kB packed, and 90 kB as objects. The last 128 that were looked at stay as
    objects, so that a page that returns to the ones it draws gets the same ones.

    Args:
        packed: made by :meth:`pack`, in any order; they are sorted by step, those of one step stay in their order.
    """

    def __init__(self, packed: Iterable[tuple[int, bytes]] = ()) -> None:
        self._packed = [data for _, data in sorted(packed, key=lambda pair: pair[0])]
        self._held: OrderedDict[int, Window] = OrderedDict()

    @staticmethod
    def pack(window: Window) -> tuple[int, bytes]:
        """Step and bytes of one window."""
        return window.step, pickle.dumps(window, protocol=pickle.HIGHEST_PROTOCOL)

    def __len__(self) -> int:
        return len(self._packed)

    @overload
    def __getitem__(self, index: int) -> Window: ...

    @overload
    def __getitem__(self, index: slice) -> list[Window]: ...

    def __getitem__(self, index: int | slice) -> Window | list[Window]:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        at = index + len(self) if index < 0 else index
        if not 0 <= at < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        held = self._held.get(at)
        if held is None:
            held = self._held[at] = pickle.loads(self._packed[at])  # our own bytes, of this process
            if len(self._held) > _HELD:
                self._held.popitem(last=False)
        self._held.move_to_end(at)
        return held
