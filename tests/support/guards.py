"""Guards that raise or count where a value of a tensor is read on the host."""

from __future__ import annotations

from typing import Any

from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


class NoHost(TorchDispatchMode):
    """Raises where a value of a tensor is read on the host, inside our own code."""

    FORBIDDEN = ("_local_scalar_dense", "item", "nonzero", "masked_select", "unique", "_to_copy", "equal", "is_nonzero")

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        name = func._schema.name.removeprefix("aten::")
        moved = name == "_to_copy" and (kwargs or {}).get("device") is not None
        if name in self.FORBIDDEN and (name != "_to_copy" or moved):
            raise AssertionError(f"{name} reads the device: {args!r:.200}")
        return func(*args, **(kwargs or {}))


class Transfers(TorchFunctionMode):
    """Counts the calls by which a tensor's values leave the device."""

    READS = frozenset({"cpu", "item", "__float__", "__int__", "__bool__", "__index__", "equal", "nonzero"})

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__ in self.READS:
            self.reads.append(func.__name__)
        return func(*args, **(kwargs or {}))
