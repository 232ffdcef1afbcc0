"""Pure numbers about routing: how evenly experts are used, and how far two routings differ.

Host functions take counts or shares of one layer (a sequence, an array or a 1-D tensor, length E) and return
Python numbers; what is undefined without a single assignment is ``None``, never NaN. Sums run over sorted
values, so the order of the experts cannot change a result. Tensor functions stay on their device.

Symbols: E experts, k experts per token, s_e share of expert e (count / sum of counts), fair share = 1/E.
Shape suffixes: E experts, T tokens.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np

from chronomoe_hf.errors import ConfigError, shown

if TYPE_CHECKING:  # host numbers are read without torch; the tensor functions import it when they run
    from torch import Tensor

Values: TypeAlias = "Sequence[float] | Sequence[int] | Tensor | np.ndarray[Any, Any]"


def _sorted_weights(values: Values) -> np.ndarray[Any, Any]:
    """Ascending float64 copy of non-negative finite values, shape ``(E,)``; raises ConfigError otherwise."""
    to_host: Any = getattr(values, "detach", None)  # of a tensor: float64 before numpy, which knows no bfloat16
    weight_E = np.asarray(values if to_host is None else to_host().cpu().double().numpy(), dtype=np.float64)
    if weight_E.ndim != 1 or weight_E.size == 0:
        raise ConfigError(f"expected one value per expert, shape (E,) with E >= 1, got shape {weight_E.shape}")
    weight_E = np.sort(weight_E)
    low, high = float(weight_E[0]), float(weight_E[-1])
    if not (low >= 0.0 and high < math.inf):  # NaN sorts last and fails the second comparison
        raise ConfigError(f"counts and shares are finite and >= 0, got values from {low} to {high}")
    return weight_E


def _sorted_shares(values: Values) -> np.ndarray[Any, Any] | None:
    """Ascending shares that sum to one, or None where nothing was counted."""
    weight_E = _sorted_weights(values)
    total = float(weight_E.sum())
    return weight_E / total if total > 0.0 else None


def compute_entropy(shares: Values) -> float | None:
    """Shannon entropy ``H = -sum_e s_e ln s_e`` in nats, in ``[0, ln E]``.

    Args:
        shares: shares or counts, shape ``(E,)``; normalised to sum one.

    Returns:
        The entropy; exactly 0.0 when one expert takes everything; None when nothing was counted.

    Raises:
        ConfigError: negative or non-finite values, or not one value per expert.
    """
    share_E = _sorted_shares(shares)
    return None if share_E is None else _entropy(share_E)


def _entropy(share_E: np.ndarray[Any, Any]) -> float:
    used = share_E[share_E > 0.0]
    return max(0.0, -float((used * np.log(used)).sum()))


def compute_n_effective(entropy: float | None) -> float | None:
    """Effective number of experts ``exp(H)`` of an entropy, as in the original documents.

    Args:
        entropy: Shannon entropy in nats, at least 0; None (nothing was counted) stays None.

    Raises:
        ConfigError: not a finite number of at least 0. For shares or counts there is :func:`effective_experts`.
    """
    if entropy is None:
        return None
    if isinstance(entropy, bool) or not isinstance(entropy, int | float | np.number) or not 0.0 <= entropy < math.inf:
        raise ConfigError(
            f"compute_n_effective takes an entropy in nats, a finite number of at least 0, got {shown(entropy)}; for "
            "shares or counts use effective_experts(shares)"
        )
    return math.exp(entropy)


def effective_experts(shares: Values) -> float | None:
    """Effective number of experts ``exp(H)`` of shares or counts, in ``[1, E]``; None when nothing was counted."""
    entropy = compute_entropy(shares)
    return None if entropy is None else min(float(len(shares)), math.exp(entropy))


def top2_share(shares: Values) -> float | None:
    """Sum of the two largest shares, in ``(0, 1]``; at most ``min(1, 2/k)`` when tokens pick k distinct experts."""
    share_E = _sorted_shares(shares)
    return None if share_E is None else _top2(share_E)


def _top2(share_E: np.ndarray[Any, Any]) -> float:
    return min(1.0, float(share_E[-2:].sum()))


def relative_top2(top2: float, k: int) -> float:
    """Top-2 share relative to its ceiling ``min(1, 2/k)``: 1.0 is total collapse for every k.

    An expert can take at most 1/k of the assignments, so a raw top-2 share never passes 2/k.
    """
    if k < 1:
        raise ConfigError(f"k, the experts per token, is at least 1, got {k}")
    return top2 / min(1.0, 2.0 / k)


def dead_experts(shares: Values) -> int | None:
    """Number of experts with share exactly zero; None when nothing was counted."""
    share_E = _sorted_shares(shares)
    return None if share_E is None else int((share_E == 0.0).sum())


def nearly_dead_count(shares: Values, n_experts: int | None = None) -> int | None:
    """Number of experts with ``0 < share < min(0.01, 0.1/E)``; None when nothing was counted.

    Args:
        shares: shares or counts, shape ``(E,)``.
        n_experts: E for the threshold; by default the length of `shares`.
    """
    share_E = _sorted_shares(shares)
    if share_E is None:
        return None
    threshold = nearly_dead_limit(share_E.size if n_experts is None else n_experts)
    return int(((share_E > 0.0) & (share_E < threshold)).sum())


def nearly_dead_limit(n_experts: int) -> float:
    """The share ``min(0.01, 0.1/E)`` below which a used expert is nearly dead."""
    return min(0.01, 0.1 / n_experts)


def balanced_top2(n_experts: int, k: int) -> float:
    """Relative top-2 share (see :func:`relative_top2`) of a perfectly balanced layer, in ``(0, 1]``.

    Where nearly all experts run for every token (k > 3E/4, or E = 2 with k = 1) it passes 0.75: there the top-2 share
    says little about dominance.
    """
    return relative_top2(min(1.0, 2.0 / n_experts), k)


def max_violation(counts: Values) -> float | None:
    """``max(count) / mean(count) - 1`` (arXiv 2408.15664), 0 when balanced; None when nothing was counted."""
    weight_E = _sorted_weights(counts)
    total = float(weight_E.sum())
    return float(weight_E[-1]) * weight_E.size / total - 1.0 if total > 0.0 else None


def max_violation_ceiling(n_experts: int, k: int) -> float:
    """``E/k - 1``: the max violation when every token picks the same k experts."""
    if not 1 <= k <= n_experts:
        raise ConfigError(f"experts per token must be in [1, {n_experts}] with {n_experts} experts, got {k}")
    return n_experts / k - 1.0


def gini(shares: Values) -> float | None:
    """Gini coefficient ``sum_ij |s_i - s_j| / (2 E sum_i s_i)``, in ``[0, 1 - 1/E]``; None when nothing was counted."""
    share_E = _sorted_shares(shares)
    if share_E is None:
        return None
    return _gini(share_E)


def _gini(share_E: np.ndarray[Any, Any]) -> float:
    size = share_E.size
    rank_E = 2.0 * np.arange(1, size + 1) - size - 1.0  # each sorted value is added once per smaller, minus per larger
    return max(0.0, float((rank_E * share_E).sum()) / size)


def load_cv(counts: Values) -> float | None:
    """Coefficient of variation of the load: population standard deviation / mean; None when nothing was counted."""
    share_E = _sorted_shares(counts)
    return None if share_E is None else _load_cv(share_E)


def _load_cv(share_E: np.ndarray[Any, Any]) -> float:
    relative_E = share_E * share_E.size
    return math.sqrt(float(((relative_E - 1.0) ** 2).mean()))


class Load(NamedTuple):
    """Balance of one layer's counts (docs/concepts.md, "Load"); None where nothing was counted."""

    entropy: float | None
    n_effective: float | None
    top2_share: float | None
    top2_relative: float | None
    dead_experts: int | None
    nearly_dead_count: int | None
    max_violation: float | None
    max_violation_ceiling: float
    gini: float | None
    load_cv: float | None


def load_metrics(counts: Values, k: int, cut: Sequence[int] = ()) -> Load:
    """Every balance metric of one layer, as the functions above give them one by one; sorts the counts once.

    Args:
        counts: assignments per expert, length E.
        k: experts per token.
        cut: experts that are out of the choice: the layer is judged without them.
    """
    if cut:
        counts = np.delete(np.asarray(counts, dtype=np.float64), list(cut))
    weight_E = _sorted_weights(counts)
    size, total = weight_E.size, float(weight_E.sum())
    ceiling = max_violation_ceiling(size, k)
    if total <= 0.0:
        return Load(None, None, None, None, None, None, None, ceiling, None, None)
    share_E = weight_E / total
    entropy, top2 = _entropy(share_E), _top2(share_E)
    dead = int(share_E.searchsorted(0.0, side="right"))
    below = int(share_E.searchsorted(nearly_dead_limit(size), side="left"))
    return Load(
        entropy=entropy,
        n_effective=min(float(size), math.exp(entropy)),
        top2_share=top2,
        top2_relative=relative_top2(top2, k),
        dead_experts=dead,
        nearly_dead_count=max(0, below - dead),
        max_violation=float(weight_E[-1]) * size / total - 1.0,
        max_violation_ceiling=ceiling,
        gini=_gini(share_E),
        load_cv=_load_cv(share_E),
    )


def _float(p_TE: Tensor) -> Tensor:
    import torch

    return p_TE if p_TE.dtype == torch.float64 else p_TE.float()


def js(p_TE: Tensor, q_TE: Tensor) -> Tensor:
    """Jensen-Shannon divergence of each pair of rows.

    Written as ``1/2 sum_e m [(1+u) ln(1+u) + (1-u) ln(1-u)]`` with ``m = (p+q)/2``, ``u = (p-q)/(2m)``: every term
    is >= 0, so two nearly equal distributions do not drown in rounding as ``H(m) - (H(p)+H(q))/2`` does.

    Args:
        p_TE: distributions, shape ``(T, E)``, any floating dtype; rows sum to one.
        q_TE: the same shape.

    Returns:
        Shape ``(T,)``, float32 (float64 for float64 inputs), nats, in ``[0, ln 2]``.
    """
    import torch

    p_TE, q_TE = _float(p_TE), _float(q_TE)
    m_TE = 0.5 * (p_TE + q_TE)
    empty_TE = m_TE == 0.0
    u_TE = (0.5 * (p_TE - q_TE) / m_TE.masked_fill(empty_TE, 1.0)).clamp(-1.0, 1.0)
    bracket_TE = torch.special.xlog1py(1.0 + u_TE, u_TE) + torch.special.xlog1py(1.0 - u_TE, -u_TE)
    js_T: Tensor = 0.5 * (m_TE * bracket_TE.clamp_min(0.0)).sum(-1)
    return js_T


def top1_flip(p_TE: Tensor, q_TE: Tensor) -> Tensor:
    """True where no expert is the most probable one in both rows: the top-1 choice differs, ties resolved alike.

    Args:
        p_TE: distributions, shape ``(T, E)``.
        q_TE: the same shape.

    Returns:
        Shape ``(T,)``, bool.
    """
    import torch

    top_p_TE = p_TE == p_TE.amax(-1, keepdim=True)
    top_q_TE = q_TE == q_TE.amax(-1, keepdim=True)
    return torch.logical_not((top_p_TE & top_q_TE).any(-1))


def compute_js_divergence(p: Tensor, q: Tensor) -> float | None:
    """Mean Jensen-Shannon divergence of the rows of two distributions, in nats. Waits for the device.

    Args:
        p: distributions, shape ``(T, E)``; rows sum to one.
        q: the same shape.

    Returns:
        In ``[0, ln 2]``; None without tokens. See :func:`js` for one value per token.
    """
    return float(js(p, q).double().mean()) if p.numel() else None


def compute_flip_rate(p: Tensor, q: Tensor, top_k: int = 1) -> float | None:
    """Fraction of tokens whose most probable expert differs, in ``[0, 1]``. Waits for the device.

    Args:
        p: distributions, shape ``(T, E)``.
        q: the same shape.
        top_k: experts per token. As in the original, only the first of them is compared.

    Returns:
        The fraction; None without tokens. See :func:`top1_flip` for one value per token.

    Raises:
        ConfigError: `top_k` is not in [1, E].
    """
    if not 1 <= top_k <= p.shape[-1]:
        raise ConfigError(f"experts per token must be in [1, {p.shape[-1]}], got {top_k}")
    return float(top1_flip(p, q).double().mean()) if p.numel() else None


def overlap_only(p_biased_TE: Tensor, p_clean_TE: Tensor) -> Tensor:
    """``sum_e max(p_biased - p_clean, 0)`` per token: the probability mass that the bias moved.

    Args:
        p_biased_TE: distributions with the bias, shape ``(T, E)``.
        p_clean_TE: distributions without it, the same shape.

    Returns:
        Shape ``(T,)``, float32 (float64 for float64 inputs), in ``[0, 1]``.
    """
    return (_float(p_biased_TE) - _float(p_clean_TE)).clamp_min(0.0).sum(-1)


def expert_name(layer_id: int, expert: int) -> str:
    """The name of an expert in records and logs: ``"L3_E7"`` is expert 7 of MoE layer 3, both counted from 0."""
    return f"L{layer_id}_E{expert}"


def expert_of(name: str) -> tuple[int, int]:
    """Layer and index of an :func:`expert_name`.

    Raises:
        ConfigError: it is none.
    """
    found = re.fullmatch(r"L(\d{1,9})_E(\d{1,9})", name, re.ASCII) if isinstance(name, str) else None
    if found is None:
        raise ConfigError(f"an expert is named like 'L3_E7' (layer 3, expert 7), got {shown(name)}")
    return int(found[1]), int(found[2])
