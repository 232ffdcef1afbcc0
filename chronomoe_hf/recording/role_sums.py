"""Role vectors: what every expert puts out on the mean, along which direction it varies, and with whom it agrees.

Opt-in (``CoherenceConfig(roles=True)``); without it nothing of this exists. Forwards add to sums of the open window, on
the device of the layer's outputs and without a host read; ranks meet once a window, when it closes; only then do the
role vector and the direction move. So within a window every token of an expert is compared with one fixed direction,
which was found from *other* tokens: a direction fitted to the tokens that it judges would make any cloud of few points
in a wide space look like two.

Shape suffixes: L layers, G layers of a chunk, E experts, K experts per token, S tokens read, A = S * K assignments,
D width of an output, M columns of :data:`MOMENTS`, P sums of :data:`PAIRS`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from chronomoe_hf import distributed
from chronomoe_hf.recording.expert_sums import Reading, product32

ALPHA = 0.9
"""Decay of a role vector per window: half-life 6.6 windows."""
MOMENTS = ("weight", "upper", "sum", "upper_sum", "square", "rows")
"""Per expert, over its tokens read, with t the projection of an output on the expert's direction, less that of its
mean: tokens, tokens with t > 0, sum t, sum of t where t > 0, sum t^2, all counted for the tokens they stand for; and
the rows that were read."""
PAIRS = ("together", "cosine")
"""Per pair (i, j), over the tokens read that both serve: their number, and the sum of cos(f_i, f_j), token by token."""
WINDOW = ("sum_ED", "along_ED", "table_EM", "pair_PEE")
"""What is added up in a window, on each rank by itself until the window closes."""
KEPT = ("mean_ED", "direction_ED", "offset_E", "updates_E", "shared_PEE")
"""What moves when a window closes; the same on all ranks."""


class RoleReading(NamedTuple):
    """What a closed window shows of a layer's roles, on the host.

    Args:
        moments_EM: float64, see MOMENTS.
        pairs_PEE: float64, see PAIRS; of this window and, each weighing ALPHA as much as the one after it, of those
            before: in a wide layer few tokens of one window are shared by a pair.
        cosine_EE: cos(r_i, r_j) of the role vectors; 0 where either is unknown.
        centred_EE: the same after subtracting the layer's mean role vector.
        updates_E: int64, windows in which the expert had a token read.
    """

    moments_EM: np.ndarray[Any, Any]
    pairs_PEE: np.ndarray[Any, Any]
    cosine_EE: np.ndarray[Any, Any]
    centred_EE: np.ndarray[Any, Any]
    updates_E: np.ndarray[Any, Any]


class LayerRoleState:
    """One layer's tensors; see WINDOW and KEPT.

    Args:
        layer_id: draws the first directions, the same on every rank.
        num_experts: E.
        width: D.
        device: of the layer's outputs.
    """

    def __init__(self, layer_id: int, num_experts: int, width: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(layer_id)
        direction_ED = torch.randn(num_experts, width, generator=generator)
        self.direction_ED = torch.nn.functional.normalize(direction_ED, dim=-1).to(device)
        self.mean_ED = torch.zeros(num_experts, width, device=device)
        self.sum_ED = torch.zeros(num_experts, width, device=device)
        self.along_ED = torch.zeros(num_experts, width, device=device)
        self.offset_E = torch.zeros(num_experts, device=device)
        self.updates_E = torch.zeros(num_experts, dtype=torch.int64, device=device)
        self.table_EM = torch.zeros(num_experts, len(MOMENTS), dtype=torch.float64, device=device)
        self.pair_PEE = torch.zeros(len(PAIRS), num_experts, num_experts, device=device)
        self.shared_PEE = torch.zeros_like(self.pair_PEE)

    def to_(self, device: torch.device) -> None:
        """Move every tensor."""
        for name in (*WINDOW, *KEPT):
            setattr(self, name, getattr(self, name).to(device))

    @property
    def width(self) -> int:
        """D."""
        return self.mean_ED.shape[1]

    def window(self) -> list[Tensor]:
        """The sums of the open window."""
        return [getattr(self, name) for name in WINDOW]

    def role_vectors(self) -> Tensor:
        """r_e, fp32 ``(E, D)``, bias-corrected; 0 for an expert that was never read."""
        weight_E = 1.0 - ALPHA ** self.updates_E.double()
        return (self.mean_ED / weight_E.clamp_min(1e-30)[:, None]).masked_fill(weight_E[:, None] == 0.0, 0.0).float()

    def close(self) -> RoleReading:
        """Move role vectors and directions by the window's sums (over all ranks), read, and start a new window.

        r_e <- ALPHA r_e + (1 - ALPHA) ybar_e, with ybar_e the mean output of the window's tokens. The direction takes
        one step of the power iteration on the covariance of the outputs: u <- C u / |C u|.
        """
        tokens_E = self.table_EM[:, 0]
        seen_E = tokens_E > 0
        mean_ED = (self.sum_ED / tokens_E.clamp_min(1e-30)[:, None]).float()
        self.mean_ED.lerp_(mean_ED, (seen_E * (1.0 - ALPHA)).float()[:, None])
        self.updates_E.add_(seen_E)
        # sum of (t - mean t) (y - ybar) = sum of t y, less (sum of t) ybar
        turned_ED = self.along_ED - self.table_EM[:, 2:3].float() * mean_ED
        length_E = turned_ED.norm(dim=-1)
        turns_E = seen_E & (length_E > 0) & length_E.isfinite()
        unit_ED = turned_ED / length_E.clamp_min(1e-30)[:, None]
        self.direction_ED.copy_(torch.where(turns_E[:, None], unit_ED, self.direction_ED))
        self.offset_E.copy_(torch.where(seen_E, (mean_ED * self.direction_ED).sum(-1), self.offset_E))
        self.shared_PEE.mul_(ALPHA).add_(self.pair_PEE)
        cosine_EE, centred_EE = _cosines(self.role_vectors(), self.updates_E > 0)
        parts = [self.table_EM, self.shared_PEE, cosine_EE, centred_EE, self.updates_E]
        flat = torch.cat([part.double().flatten() for part in parts]).cpu().numpy()
        out = np.split(flat, np.cumsum([part.numel() for part in parts])[:-1])
        table, pair, cosine, centred, updates = (v.reshape(p.shape) for v, p in zip(out, parts, strict=True))
        torch._foreach_zero_(self.window())
        return RoleReading(table, pair, cosine, centred, updates.astype(np.int64))


def _cosines(role_ED: Tensor, known_E: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines of role vectors as they are and centred over the known ones; 0 where one of both is unknown or zero."""
    centre_D = role_ED[known_E].mean(0) if bool(known_E.any()) else torch.zeros_like(role_ED[0])
    centred_ED = (role_ED - centre_D).masked_fill(~known_E[:, None], 0.0)
    units = [torch.nn.functional.normalize(each_ED.double(), dim=-1) for each_ED in (role_ED, centred_ED)]
    return units[0] @ units[0].T, units[1] @ units[1].T


class RoleState:
    """The roles of all layers of a system; layers whose experts cannot be read have none.

    Args:
        num_experts: E of each layer.
    """

    def __init__(self, num_experts: Sequence[int]) -> None:
        self.num_experts = list(num_experts)
        self.layers: dict[int, LayerRoleState] = {}

    def add(self, layer_ids: Sequence[int], reading: Reading) -> None:
        """Add one reading of distinct layers of one shape to their open windows. No host read."""
        rows_GSKD = reading.rows_GSKD
        states = [self._layer(each, rows_GSKD.shape[-1], rows_GSKD.device) for each in layer_ids]
        direction_GED = torch.stack([state.direction_ED for state in states])
        offset_GE = torch.stack([state.offset_E for state in states])
        sums = role_sums(reading, direction_GED, offset_GE)
        targets = [getattr(state, name) for name in WINDOW for state in states]
        values = [part for value in sums for part in value.unbind(0)]
        torch._foreach_add_(targets, values)

    def _layer(self, layer_id: int, width: int, device: torch.device) -> LayerRoleState:
        state = self.layers.get(layer_id)
        if state is None or state.width != width:  # of another width: a state that was loaded into another model
            state = LayerRoleState(layer_id, self.num_experts[layer_id], width, device)
            self.layers[layer_id] = state
        if state.mean_ED.device != device:
            state.to_(device)
        return state

    def drop_window(self) -> None:
        """Forget the open window."""
        for state in self.layers.values():
            torch._foreach_zero_(state.window())

    def close(self, home: torch.device, copies: int) -> dict[int, RoleReading]:
        """Close the window of every layer that was ever read on any rank. Collective: one all-reduce a layer.

        Args:
            home: device on which collectives run.
            copies: how many ranks have seen the same batch.

        Returns:
            What it shows, by layer id, the same on all ranks.
        """
        width_L = torch.zeros(len(self.num_experts), dtype=torch.int64)
        for layer_id, state in self.layers.items():
            width_L[layer_id] = state.width
        if distributed.active():  # a rank may have read nothing of a layer yet, and must take part all the same
            width_L = distributed.all_reduce_max_(width_L.to(home)).cpu()
        out = {}
        for layer_id, width in enumerate(width_L.tolist()):
            if width == 0:
                continue
            state = self.layers.get(layer_id) or self._layer(layer_id, width, home)
            if distributed.active():
                parts = state.window()
                flat = torch.cat([part.to(home).double().flatten() for part in parts])
                flat = distributed.all_reduce_sum_(flat).div_(copies)
                for part, value in zip(parts, flat.split([part.numel() for part in parts]), strict=True):
                    part.copy_(value.view_as(part))
            out[layer_id] = state.close()
        return out

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of every tensor, as ``"<layer id>.<name>"``."""
        return {
            f"{layer_id}.{name}": getattr(state, name).detach().cpu().clone()
            for layer_id, state in sorted(self.layers.items())
            for name in (*WINDOW, *KEPT)
        }

    def load_layer(self, layer_id: int, tensors: Mapping[str, Tensor], *, with_window: bool) -> None:
        """Take over one layer's tensors (checked by the checkpoint room).

        Args:
            layer_id: live layer.
            tensors: by name, of one layer.
            with_window: the sums of the open window too; else it starts afresh.
        """
        known = self.layers.get(layer_id)
        device = tensors["mean_ED"].device if known is None else known.mean_ED.device
        state = LayerRoleState(layer_id, self.num_experts[layer_id], tensors["mean_ED"].shape[1], device)
        for name in (*KEPT, *(WINDOW if with_window else ())):
            getattr(state, name).copy_(tensors[name])
        self.layers[layer_id] = state


def role_sums(reading: Reading, direction_GED: Tensor, offset_GE: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What one reading adds to the sums of WINDOW, in that order.

    Args:
        reading: rows of tokens, zero where they do not count.
        direction_GED: unit vectors, fp32.
        offset_GE: projection of the expert's mean output, fp32.

    Returns:
        fp32 ``(G, E, D)``, fp32 ``(G, E, D)``, float64 ``(G, E, M)``, fp32 ``(G, P, E, E)``.
    """
    rows_GAD, hit_GAE = reading.rows_GSKD.flatten(1, 2), reading.hit_GAE.float()
    gain_GA = None if reading.gain_GSK is None else reading.gain_GSK.flatten(1)
    # Every row along every direction, then its own expert's: less memory than a copy of the rows.
    all_GAE = product32(rows_GAD, direction_GED.to(rows_GAD.dtype).mT)
    own_GA = (all_GAE * hit_GAE).sum(-1)
    if gain_GA is not None:
        own_GA = own_GA * gain_GA
    t_GA = own_GA - torch.einsum("gae,ge->ga", hit_GAE, offset_GE)
    upper_GA = (t_GA > 0).float()
    columns_GA5 = torch.stack([torch.ones_like(t_GA), upper_GA, t_GA, t_GA * upper_GA, t_GA * t_GA], dim=-1)
    moments_GE5 = torch.bmm(hit_GAE.mT, columns_GA5)
    table_GEM = torch.cat([moments_GE5.double() * reading.scale, moments_GE5[..., :1].double()], dim=-1)
    weighed_GA = t_GA if gain_GA is None else t_GA * gain_GA
    along_GED = product32((hit_GAE * weighed_GA[..., None]).to(rows_GAD.dtype).mT, rows_GAD)
    return (
        reading.output_GED.float() * reading.scale,
        along_GED * reading.scale,
        table_GEM,
        _pair_sums(reading, hit_GAE),
    )


def _pair_sums(reading: Reading, hit_GAE: Tensor) -> Tensor:
    """Sums over tokens that two experts serve, fp32 ``(G, P, E, E)``; see PAIRS. Scales of rows do not matter."""
    num_groups, num_tokens, num_k, width = reading.rows_GSKD.shape
    hit_GSKE = hit_GAE.view(num_groups, num_tokens, num_k, -1)
    on_GSE = hit_GSKE.sum(2)
    rows_NKD = reading.rows_GSKD.reshape(-1, num_k, width)
    dot_NKK = product32(rows_NKD, rows_NKD.mT)
    length_NK = dot_NKK.diagonal(dim1=-2, dim2=-1).sqrt()
    cosine_NKK = dot_NKK / (length_NK[:, :, None] * length_NK[:, None, :])
    cosine_GSKK = cosine_NKK.nan_to_num_(0.0).clamp_(-1.0, 1.0).view(num_groups, num_tokens, num_k, num_k)
    together_GEE = torch.bmm(on_GSE.mT, on_GSE)
    cosine_GEE = torch.bmm(hit_GAE.mT, (cosine_GSKK @ hit_GSKE).flatten(1, 2))
    return torch.stack([together_GEE, cosine_GEE], dim=1)
