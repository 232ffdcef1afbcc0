"""A pretend accelerator: real numbers on the CPU behind a device of its own, which refuses what a GPU would refuse.

A tensor on ``phantom:0`` or ``phantom:1`` keeps an ordinary CPU tensor inside. Every operation on it is dispatched
through :class:`PhantomTensor`, which

* raises where a CPU tensor with a dimension, or a tensor of the other index, is an operand: a GPU would too;
* counts launches (every operation that is neither a view nor a bare allocation), reads on the host (a value, a copy to
  the CPU, a shape that depends on values) and transfers to the device, forward and backward apart from nothing;
* keeps account of the bytes that are alive on it, and of their peak.

Inside :func:`shapes_only` operations on large tensors have a shape and no numbers: launches, reads and memory stay as
they are, in a fraction of the time.

Backward runs on index 0 only: autograd knows no second index of a backend made in Python. Launches are the same on
every machine, so a test may assert them. What a real GPU fuses or splits (a matrix product, a sort) is one launch here.
Use: ``with phantom.device() as seen: model = phantom.to_device(model)``.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "phantom"
NUM_DEVICES = 2
Model = TypeVar("Model", bound=nn.Module)


class _Backend:
    """What torch asks of ``torch.phantom``: the device module of a backend."""

    default_generators = (torch.default_generator,) * NUM_DEVICES
    _initialized = True

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        pass

    def device_count(self) -> int:
        return NUM_DEVICES

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.default_generator.get_state()

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        torch.default_generator.set_state(state)

    def device(self, index: Any) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


class Ledger:
    """What was counted while a :func:`device` or :func:`counting` block ran.

    Attributes:
        launches: by operation name.
        reads: on the host, by operation name.
        uploads: copies of CPU tensors to the device, by operation name.
        allocated: bytes allocated in the block (also those that were freed again).
        peak: most bytes alive in the block, over what was alive when it began.
    """

    def __init__(self) -> None:
        self.launches: Counter[str] = Counter()
        self.reads: Counter[str] = Counter()
        self.uploads: Counter[str] = Counter()
        self.allocated = 0
        self.start = _Block.alive
        self.peak = 0

    @property
    def total(self) -> int:
        """All launches."""
        return sum(self.launches.values())


class _Block:
    """The memory behind a tensor and its views."""

    alive = 0

    def __init__(self, size: int) -> None:
        self.size = size
        _Block.alive += size
        for ledger in _LEDGERS:
            ledger.allocated += size
            ledger.peak = max(ledger.peak, _Block.alive - ledger.start)

    def __del__(self) -> None:
        if _Block is not None:  # the interpreter is going down
            _Block.alive -= self.size

    def __deepcopy__(self, memo: Any) -> _Block:
        return _Block(self.size)


_LEDGERS: list[Ledger] = []
_HOST_READS = frozenset(
    {
        "_local_scalar_dense",
        "nonzero",
        "masked_select",
        "equal",
        "is_nonzero",
        "_unique2",
        "unique_dim",
        "unique_consecutive",
    }
)
_FREE = frozenset(
    {"empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "detach", "_unsafe_view", "lift_fresh"}
)


class PhantomTensor(torch.Tensor):
    """A CPU tensor that says it lies on the pretend device."""

    host: Tensor
    block: _Block

    @staticmethod
    def __new__(cls, host: Tensor, index: int, block: _Block | None = None, requires_grad: bool = False) -> Any:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            host.size(),
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device=torch.device(NAME, index),
            requires_grad=requires_grad,
        )
        made.host = host
        made.block = _Block(host.untyped_storage().nbytes()) if block is None else block
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __repr__(self) -> str:  # type: ignore[override]
        return f"PhantomTensor({self.host!r}, device={self.device})"

    def __format__(self, spec: str) -> str:
        """As of an ordinary tensor: a number where it holds one, which reads the host."""
        return format(self.item() if self.dim() == 0 else repr(self), spec)

    def tolist(self) -> Any:
        """Torch refuses this for subclasses; on a GPU it reads the host."""
        for ledger in _LEDGERS:
            ledger.reads["tolist"] += 1
        return self.host.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Factories(TorchDispatchMode):
    """Catches ``torch.zeros(..., device="phantom")`` and the like, which no operand leads to the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == NAME:
            return _run(func, args, kwargs)
        return func(*args, **kwargs)


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run one operation on the tensors inside, and count it."""
    flat, spec = tree_flatten((args, kwargs))
    inputs = [value for value in flat if isinstance(value, Tensor)]
    ours = [value for value in inputs if isinstance(value, PhantomTensor)]
    name = func._schema.name.removeprefix("aten::")
    target = kwargs.get("device")
    target = None if target is None else torch.device(target)
    if name == "copy_" or name == "_copy_from":
        return _copy(func, args, kwargs)
    indices = {value.device.index for value in ours}
    if name != "_to_copy":
        strangers = [tuple(v.shape) for v in inputs if not isinstance(v, PhantomTensor) and v.dim() > 0]
        if strangers and ours:
            raise RuntimeError(f"{name}: expected all tensors on one device, found {NAME} and CPU of shape {strangers}")
        if len(indices) > 1:
            raise RuntimeError(f"{name}: expected all tensors on one device, found {NAME} indices {sorted(indices)}")
    inside = [value.host if isinstance(value, PhantomTensor) else value for value in flat]
    call_args, call_kwargs = tree_unflatten(inside, spec)
    if target is not None:
        call_kwargs = {**call_kwargs, "device": torch.device("cpu")}
    if name == "histc" and not call_args[0].is_floating_point():
        call_args = (call_args[0].float(), *call_args[1:])
    if _Shapes.only and name not in _HOST_READS and _is_large(inside):
        inside = [_shape_of(value) for value in inside]
        call_args, call_kwargs = tree_unflatten(inside, spec)
        call_kwargs = call_kwargs if target is None else {**call_kwargs, "device": torch.device("meta")}
    with _disable_current_modes():
        if func is torch.ops.aten.bmm.dtype:  # low precision in, fp32 out: a CPU has no such product
            out = torch.bmm(call_args[0].float(), call_args[1].float()).to(call_args[2])
        elif name == "histc" and call_args[0].is_meta:  # torch knows no shape of it
            out = call_args[0].new_empty(call_args[1])
        else:
            out = func(*call_args, **call_kwargs)
    leaves_device = target is not None and target.type != NAME
    index = (target.index or 0) if target is not None and target.type == NAME else next(iter(indices), 0)
    if name == "_to_copy":
        if leaves_device or not ours:
            _count("reads" if ours else "uploads", name)
            # A copy that stays on the CPU, or comes from it.
            return out if leaves_device else PhantomTensor(out, index)
        if target is not None and indices != {index}:
            _count("launches", f"{name}:peer")
    boolean_index = name in ("index", "index_put_", "index_put", "_index_put_impl_") and any(
        isinstance(v, PhantomTensor) and v.dtype in (torch.bool, torch.uint8) for v in (args[1] or ())
    )
    if name in _HOST_READS or boolean_index:
        _count("reads", name)
    if name not in _FREE and not _is_view(func):
        _count("launches", name)
    return _wrap(func, flat, spec, inside, out, index)


def _wrap(func: Any, flat: list[Any], spec: Any, inside: list[Any], out: Any, index: int) -> Any:
    """Put results back on the device: an operand that was written to as itself, a view beside its base."""
    if func._schema.is_mutable:
        args, kwargs = tree_unflatten(flat, spec)
        written = []
        for position, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[position] if position < len(args) else kwargs.get(argument.name)
                written.append(value)
        hosts = {id(value): host for value, host in zip(flat, inside, strict=True)}
        for value in tree_flatten(written)[0]:
            if isinstance(value, PhantomTensor) and hosts[id(value)].is_meta:
                value.host = hosts[id(value)]
        if len(func._schema.returns) == 0:
            return None
        if len(written) == 1 and not isinstance(written[0], list | tuple):
            if written[0].shape != written[0].host.shape:  # squeeze_ and the like: the wrapper's shape follows
                with torch._C._DisableTorchDispatch():
                    func(*args, **kwargs)
                assert written[0].shape == written[0].host.shape, f"{func} is not supported on the pretend device"
            return written[0]
        return tuple(written)
    pairs = zip(flat, inside, strict=True)
    bases = {host.untyped_storage()._cdata: v.block for v, host in pairs if isinstance(v, PhantomTensor)}

    def place(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return PhantomTensor(value, index, bases.get(value.untyped_storage()._cdata) if value.numel() else None)

    return tree_map(place, out)


def _copy(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = func._schema.name.removeprefix("aten::")
    source, target = (args[1], args[0]) if name == "copy_" else (args[0], args[1])
    here, there = (value.host if isinstance(value, PhantomTensor) else value for value in (source, target))
    if not isinstance(target, PhantomTensor):
        _count("reads", "copy_")
    elif not isinstance(source, PhantomTensor):
        _count("uploads", "copy_")
    _count("launches", "copy_")
    if there.is_meta or here.is_meta:
        if isinstance(target, PhantomTensor):
            target.host = _shape_of(there)
            return target
        raise RuntimeError(f"a copy of shape {tuple(there.shape)} leaves the device inside phantom.shapes_only()")
    with _disable_current_modes():
        there.copy_(here)
    return target


class _Shapes:
    """Whether large tensors go without numbers."""

    only = False
    largest = 2**16  # elements of an operation's operands that are still worked out


def _is_large(inside: list[Any]) -> bool:
    tensors = [value for value in inside if isinstance(value, Tensor)]
    return any(value.is_meta for value in tensors) or sum(value.numel() for value in tensors) > _Shapes.largest


def _shape_of(value: Any) -> Any:
    """A tensor of that layout without numbers; anything else as it is."""
    if not isinstance(value, Tensor) or value.is_meta:
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


@contextlib.contextmanager
def shapes_only() -> Iterator[None]:
    """Operations on large tensors have a shape and no numbers inside the block; reading one of them on the host raises.

    What was written in the block has no numbers after it either.
    """
    _Shapes.only = True
    try:
        yield
    finally:
        _Shapes.only = False


def _is_view(func: Any) -> bool:
    returns = func._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def _count(what: str, name: str) -> None:
    for ledger in _LEDGERS:
        getattr(ledger, what)[name] += 1


_KERNELS: list[torch.library.Library] = []


def _install() -> None:
    """Make torch know the device. Once per process: a name cannot be taken back."""
    if _KERNELS:
        return
    _setup_privateuseone_for_python_backend(NAME, backend_module=_Backend())
    kernels = torch.library.Library("aten", "IMPL")
    _KERNELS.append(kernels)

    def empty(
        size: Any,
        dtype: Any = None,
        layout: Any = None,
        device: Any = None,
        pin_memory: Any = None,
        memory_format: Any = None,
    ) -> Any:
        with _disable_current_modes():
            host = torch.empty(size, dtype=dtype or torch.get_default_dtype())
        return PhantomTensor(host, torch.device(device or NAME).index or 0)

    def empty_strided(
        size: Any, stride: Any, dtype: Any = None, layout: Any = None, device: Any = None, pin_memory: Any = None
    ) -> Any:
        with _disable_current_modes():
            host = torch.empty_strided(size, stride, dtype=dtype or torch.get_default_dtype())
        return PhantomTensor(host, torch.device(device or NAME).index or 0)

    def copy_from(source: Any, target: Any, non_blocking: bool = False) -> Any:
        return _copy(torch.ops.aten._copy_from.default, (source, target), {})

    kernels.impl("empty.memory_format", empty, "PrivateUse1")
    kernels.impl("empty_strided", empty_strided, "PrivateUse1")
    kernels.impl("_copy_from", copy_from, "PrivateUse1")


@contextlib.contextmanager
def device() -> Iterator[Ledger]:
    """The device exists inside the block; everything in it is counted."""
    _install()
    with _Factories(), counting() as ledger:
        yield ledger


@contextlib.contextmanager
def counting() -> Iterator[Ledger]:
    """Count what happens inside the block; blocks may be nested."""
    ledger = Ledger()
    _LEDGERS.append(ledger)
    try:
        yield ledger
    finally:
        _LEDGERS.remove(ledger)


def to_device(value: Any, index: int = 0) -> Any:
    """A model (in place), or nested tensors, on ``phantom:index``."""
    place = torch.device(NAME, index)
    if isinstance(value, nn.Module):
        return value.to(place)
    return tree_map(lambda each: each.to(place) if isinstance(each, Tensor) else each, value)


def tensors_of(root: Any, skip: tuple[type, ...] = (nn.Module,)) -> dict[str, Tensor]:
    """Every tensor reachable from an object through attributes and containers, by path; modules are not entered."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    queue: list[tuple[str, Any]] = [("", root)]
    while queue:
        path, value = queue.pop()
        if id(value) in seen or isinstance(value, (str, bytes, int, float, type(None), type)):
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            found[path] = value
        elif path and isinstance(value, skip):
            continue
        elif isinstance(value, dict):
            queue += [(f"{path}[{key!r}]", each) for key, each in value.items()]
        elif isinstance(value, (list, tuple, set, frozenset)):
            queue += [(f"{path}[{number}]", each) for number, each in zip(itertools.count(), value)]
        elif type(value).__module__.startswith("chronomoe_hf") and hasattr(value, "__dict__"):
            queue += [(f"{path}.{name}", each) for name, each in vars(value).items()]
    return found
