"""Router-row drift: how far every expert's row of the router's weight has moved since the model was wrapped.

Opt-in (``lifecycle__router_drift=True``), because the rows of the start must be kept: on the CPU, in the weight's
own dtype, and in every saved state, so that a resumed run measures from where the first one began. Steps between
windows do nothing for it; when a window closes, the rows are compared on the routers' device, layers of one shape
together, and read once.

Shape suffixes: L layers, E router classes (experts first), D router input width, G layers of a chunk.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from chronomoe_hf import distributed
from chronomoe_hf.wrapping.layer import Layer
from chronomoe_hf.wrapping.weights import packed_as

logger = logging.getLogger("chronomoe_hf")

START = re.compile(r"router\.(\d{1,9})\.start")
"""Names of the tensors in a saved state."""
_LIMIT = 64 * 2**20
_ADAPTER_WRAPPER = "base_layer"  # PEFT's name for what an adapter acts on


class RouterDrift:
    """The rows that drift is measured from, and the measurement.

    The drift of an expert is ``|W_e - W_e(start)| / |W_e(start)|`` (Euclidean norms, computed in fp32 or better):
    0 = has not moved, 1 = has moved by its own length. Unknown where the weight cannot be read whole outside a forward
    (FSDP, ZeRO-3, tensor parallel, offloaded), where it is quantised, where an adapter that is not merged acts on it,
    and where the row was zero.

    Args:
        layers: the wrapped layers.
        on: ``LifecycleConfig.router_drift``; False keeps nothing and measures nothing.

    Attributes:
        start: layer id -> the router's weight at the start, ``(E, D)``, on the CPU.
    """

    def __init__(self, layers: Sequence[Layer], on: bool) -> None:
        self.layers, self.on = layers, on
        self.start: dict[int, Tensor] = {}
        if on:
            for layer, weight_ED in self._readable():
                if bool(weight_ED.isfinite().all()):
                    self.start[layer.layer_id] = weight_ED.to("cpu", copy=True)

    def _readable(self) -> Iterator[tuple[Layer, Tensor]]:
        """Layers whose router's weight lies here whole, and is all that acts."""
        names = {id(module): name for name, module in self.layers[0].root.named_modules()}
        for layer in self.layers:
            weight_ED, path = layer.adapter.weight(layer.router), names.get(id(layer.router), "")
            if distributed.is_sharded(weight_ED) or weight_ED.is_meta or _ADAPTER_WRAPPER in path.split("."):
                continue
            if weight_ED.dim() == 2 and packed_as(weight_ED) is None:
                yield layer, weight_ED.detach()

    @torch.no_grad()
    def read(self) -> dict[int, list[float]]:
        """Drift per expert by layer id, NaN or inf where a row was zero; layers where it is unknown are left out."""
        groups: dict[Any, list[tuple[Layer, Tensor, Tensor]]] = {}
        for layer, now_ED in self._readable() if self.on else ():
            start_ED = self.start.get(layer.layer_id)
            if start_ED is not None and start_ED.shape == now_ED.shape:
                key = now_ED.device, now_ED.dtype, start_ED.dtype, now_ED.shape
                groups.setdefault(key, []).append((layer, now_ED, start_ED))
        ids, parts = [], []
        for group in groups.values():
            size = max(1, _LIMIT // (12 * group[0][1].numel()))  # three copies in fp32
            for at in range(0, len(group), size):
                chunk = group[at : at + size]
                drift_GE = _drift([now for _, now, _ in chunk], [start for _, _, start in chunk])
                for (layer, _, _), drift_E in zip(chunk, drift_GE, strict=True):
                    ids.append(layer)
                    parts.append(drift_E[: layer.num_experts])
        devices: dict[torch.device, list[int]] = {}
        for index, part in enumerate(parts):
            devices.setdefault(part.device, []).append(index)
        out: dict[int, list[float]] = {}
        for places in devices.values():  # one transfer a device
            flat = iter(torch.cat([parts[index] for index in places]).tolist())
            out |= {ids[index].layer_id: [next(flat) for _ in range(ids[index].num_experts)] for index in places}
        return out

    # ---- files -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """The rows of the start by name."""
        return {f"router.{layer_id}.start": start_ED for layer_id, start_ED in self.start.items()}

    def load(self, tensors: Mapping[str, Tensor], pairs: Sequence[tuple[int, int]]) -> None:
        """Measure from the rows of a saved state; where it has a layer without rows, that drift is unknown from now on.

        Args:
            tensors: of the saved state, checked.
            pairs: (saved layer, live layer) that agree.
        """
        if not self.on:
            return
        found = {new: tensors[name] for old, new in pairs if (name := f"router.{old}.start") in tensors}
        if pairs and not found:
            logger.warning(
                "the saved state holds no router rows to measure drift from (lifecycle.router_drift was off): it stays "
                "unknown in this run"
            )
        for _, new in pairs:
            self.start.pop(new, None)
        self.start |= {layer_id: start_ED.clone() for layer_id, start_ED in found.items()}


def _drift(now: list[Tensor], start: list[Tensor]) -> Tensor:
    """Drift of the rows of some layers of one shape, ``(G, E)``, on their device."""
    now_GED = torch.stack(now)
    wide = torch.promote_types(now_GED.dtype, torch.float32)
    start_GED = torch.stack(start).to(now_GED.device).to(wide)
    moved_GE = torch.linalg.vector_norm(now_GED.to(wide) - start_GED, dim=-1)
    return moved_GE / torch.linalg.vector_norm(start_GED, dim=-1)
