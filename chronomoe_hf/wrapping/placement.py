"""Where the state of every layer lies: on the device of its router, from wrap on and wherever the router goes.

The stacked state and the first layer's sums share a device ("home"). A layer elsewhere keeps its sums and its lens with
its router and reads beta from a mirror of the stacked state, which is refreshed once a step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from chronomoe_hf.recording.totals import Sums
from chronomoe_hf.step_state import StepState
from chronomoe_hf.wrapping.layer import Layer


class Placement:
    """Moves what belongs to a layer to the device on which its router runs.

    Args:
        state: the stacked state.
        sums: the sums of all layers.
        layers: the wrapped layers. A router whose weight is on the meta device counts as on the CPU until it is there.
    """

    def __init__(self, state: StepState, sums: Sums, layers: Sequence[Layer]) -> None:
        self.state = state
        self.sums = sums
        self.handles = [layer.handle for layer in layers]
        self.recorders = [layer.recorder for layer in layers]
        devices = [layer.adapter.weight(layer.router).device for layer in layers]
        self.devices = [torch.device("cpu") if device.type == "meta" else device for device in devices]
        for handle in self.handles:
            handle.placer = self
        self.arrange()

    @property
    def home(self) -> torch.device:
        """Where the stacked state lies and collectives run."""
        return self.devices[0]

    def place(self, layer_id: int, device: torch.device) -> None:
        """A layer's router runs on `device` from now on."""
        if device.type != "meta" and device != self.devices[layer_id]:
            self.devices[layer_id] = device
            self.arrange()

    def arrange(self) -> None:
        """Bring everything where `devices` says, and the views in line with it."""
        self.state.to_(self.home)
        self.state.mirrors = {}
        for handle, recorder, device in zip(self.handles, self.recorders, self.devices, strict=True):
            self.state.bind(handle.state, device)
            recorder.to_(device)
            if handle.lens is not None:
                handle.lens.to(device)
        self.sums.settle(set(self.devices), self.home)
