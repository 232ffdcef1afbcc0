"""The tensors of a checkpoint under a model's own names, one at a time, converted as ``from_pretrained`` does it.

``save_pretrained`` writes Hub names: experts one by one, gate and up projection apart. Transformers keeps, per family,
a list of renamings and conversions (``transformers.conversion_mapping``), and ``from_pretrained`` groups the tensors of
the files by the model tensor they become. The same is done here, without building a model: first every group is
converted on the meta device, which reads nothing and shows the shapes, then group by group with values.
"""

from __future__ import annotations

import copy
import functools
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from chronomoe_hf.errors import StateCorruptError, StateMismatchError, StateMissingError
from chronomoe_hf.jsonfiles import weight_map

OPEN_FILES = 2  # at once; a group of tensors may lie in two shards
MAPPED_BYTES = 256 * 2**20  # read from mapped files before they are let go: their pages count as memory in use


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of the weights in `directory`: the shards that its index names, or the single file.

    Raises:
        StateMissingError: There are none.
        StateCorruptError: The index is not one, or names a file that is not there.
    """
    index = directory / SAFE_WEIGHTS_INDEX_NAME
    if not index.is_file():
        if not (directory / SAFE_WEIGHTS_NAME).is_file():
            raise StateMissingError(f"{directory} holds no {SAFE_WEIGHTS_NAME}")
        return [directory / SAFE_WEIGHTS_NAME]
    try:
        names = set(weight_map(index).values())
    except ValueError as error:
        raise StateCorruptError(f"{index} is not a weight index ({error}); load an older checkpoint") from None
    missing = sorted(name for name in names if not (directory / name).is_file())
    if missing:
        raise StateCorruptError(
            f"{index} names {missing[0]} ({len(missing)} files in all), which is not there; load an older checkpoint"
        )
    return [directory / name for name in sorted(names)]


class _Files:
    """Reads single tensors; few files are open, and little of them stays mapped into memory, at once."""

    def __init__(self, paths: list[Path]) -> None:
        self._mapped = 0
        self._open: OrderedDict[Path, tuple[ExitStack, Any]] = OrderedDict()
        self.where: dict[str, Path] = {}
        for path in paths:  # opening checks the header against the size of the file
            self.where.update(dict.fromkeys(self._handle(path).keys(), path))

    def _handle(self, path: Path) -> Any:
        if path not in self._open:
            while len(self._open) >= OPEN_FILES:
                self._open.popitem(last=False)[1][0].close()
            stack = ExitStack()
            self._open[path] = stack, stack.enter_context(safe_open(path, framework="pt", device="cpu"))
        self._open.move_to_end(path)
        return self._open[path][1]

    def shape(self, name: str) -> list[int]:
        """Shape of a tensor, from the header."""
        return list(self._handle(self.where[name]).get_slice(name).get_shape())

    def read(self, name: str) -> Tensor:
        """The tensor."""
        tensor: Tensor = self._handle(self.where[name]).get_tensor(name)
        self._mapped += tensor.nbytes
        return tensor

    def release(self) -> None:
        """Let go of what was read, once it is much; call between groups."""
        if self._mapped > MAPPED_BYTES:
            self.close()
            self._mapped = 0

    def close(self) -> None:
        """Close what is open."""
        while self._open:
            self._open.popitem()[1][0].close()


@dataclass
class _Group:
    """What one conversion takes: `transform` as Transformers has it, and (its source pattern, name in the files)."""

    transform: Any
    sources: list[tuple[str, str]] = field(default_factory=list)


class ConvertedWeights:
    """The weights of a checkpoint as a model names and shapes them. A context manager: it holds files open.

    Args:
        model: Says which family's conversions apply.
        directory: Holds safetensors weights that ``save_pretrained`` wrote.
        live: The model's ``state_dict``: names, shapes and dtypes to convert to.
        only: Names of the model's tensors that are wanted; None = all. Nothing else is read.

    Raises:
        StateMissingError: There are no safetensors weights.
        StateMismatchError: A tensor has another shape than the model's.
        SafetensorError: A file is damaged.
        Exception: Whatever Transformers raises where it cannot convert; nothing was read then.
    """

    def __init__(
        self, model: PreTrainedModel, directory: Path, live: Mapping[str, Tensor], only: Collection[str] | None = None
    ) -> None:
        self._model = model
        self._live = live
        self._files = _Files(weight_files(directory))
        try:
            self._groups = _grouped(model, self._files.where, live)
            if only is not None:
                self._groups = {name: group for name, group in self._groups.items() if name in only}
            self._check_shapes(directory)
        except BaseException:
            self._files.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.close()

    def _check_shapes(self, directory: Path) -> None:
        def shape_only(name: str, dtype: torch.dtype) -> Tensor:
            return torch.empty(self._files.shape(name), dtype=dtype, device="meta")

        for target, group in self._groups.items():
            for name, value in self._convert(target, group, shape_only):
                if name in self._live and value.shape != self._live[name].shape:
                    raise StateMismatchError(
                        f"the weights in {directory} cannot be loaded into {type(self._model).__name__}: {name} has "
                        f"shape {tuple(value.shape)} there and {tuple(self._live[name].shape)} in the model"
                    )

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """``(name, value)`` of every tensor of the model that the checkpoint has, on the CPU, in the model's dtype."""

        def values(name: str, dtype: torch.dtype) -> Tensor:
            return self._files.read(name).to(dtype)

        for target, group in self._groups.items():
            for name, value in self._convert(target, group, values):
                if name in self._live:
                    yield name, value.to(self._live[name].dtype)
            self._files.release()

    def _convert(
        self, target: str, group: _Group, load: Callable[[str, torch.dtype], Tensor]
    ) -> Iterator[tuple[str, Tensor]]:
        transform = copy.deepcopy(group.transform)
        for pattern, name in group.sources:
            transform.add_tensor(target, name, pattern, functools.partial(load, name, self._live[target].dtype))
        converted = transform.convert(target, model=self._model, config=self._model.config)
        while converted:  # popped, so that a value can be freed before the next one is handed out
            name, value = converted.popitem()
            yield name, value[0] if isinstance(value, list) else value


def _grouped(model: PreTrainedModel, names: Mapping[str, Path], live: Mapping[str, Tensor]) -> dict[str, _Group]:
    """Model tensor -> its group: the rules of ``convert_and_load_state_dict_in_model``."""
    # Imported here: Transformers does not promise these, and where they are missing a second model is loaded instead.
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    groups: dict[str, _Group] = {}
    for name in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, live)
        if target not in live and name in live:
            target, pattern = name, None
        if target not in live:
            continue  # of another head, or tied to a tensor that is saved once
        if target not in groups:
            transform = WeightRenaming(name, target) if pattern is None else copy.deepcopy(by_pattern[pattern])
            groups[target] = _Group(transform)
        groups[target].sources.append((name if pattern is None else pattern, name))
    return groups
