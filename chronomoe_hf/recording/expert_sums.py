"""What every expert's rows of a reading add up to: as matrix products on a device, in order on a CPU.

Arguments of both, and what is left out of them, are worked out by ``sums.output_sums``: `gain_GSK` makes a row an
unweighted output (None: it is one), `own_GSK` makes it the expert's weighted part (None: it is that), `alone` asks for
the leave-one-out reference. `value_VGSK` holds numbers of every slot that are added up beside its row.

Shape suffixes: G layers of a chunk, S tokens read, K experts per token, A = S * K, E experts, D width of an output, F
columns of coefficients, B bins, N = G * A rows, V numbers of a slot.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor


class PerExpert(NamedTuple):
    """Sums of one reading, all fp32.

    Args:
        output_GED: of unweighted outputs.
        reference_GED: of the references.
        rows_GE: rows that count.
        value_VGE: of the numbers that came with the rows.
    """

    output_GED: Tensor
    reference_GED: Tensor
    rows_GE: Tensor
    value_VGE: Tensor


def products(
    rows_GSKD: Tensor,
    hit_GAE: Tensor,
    gain_GSK: Tensor | None,
    own_GSK: Tensor | None,
    value_VGSK: Tensor,
    alone: bool,
) -> PerExpert:
    """Sums per expert, those of rows as one matrix product with coefficients.

    An output's coefficient is 1 (or 1 / weight) at its own expert; in the leave-one-out reference of expert e it is its
    weight where another slot of its token is e. Their difference is thus never taken, and nothing cancels.
    """
    num_groups, num_tokens, num_k, width = rows_GSKD.shape
    dtype, num_experts = rows_GSKD.dtype, hit_GAE.shape[-1]
    value_VGE = (hit_GAE * value_VGSK.flatten(2)[..., None]).sum(2)  # first: it needs room, and gives it back
    if gain_GSK is None:
        output_GAE = hit_GAE.to(dtype)
    else:
        output_GAE = (hit_GAE * gain_GSK.flatten(1)[..., None]).to(dtype)
    if alone:
        assert own_GSK is not None
        hit_GSKE = hit_GAE.view(num_groups, num_tokens, num_k, num_experts)
        elsewhere_GSKE = hit_GSKE.any(2, keepdim=True) ^ hit_GSKE
        other_GAF = (elsewhere_GSKE * own_GSK[..., None]).to(dtype).flatten(1, 2)
    elif own_GSK is None:
        other_GAF = torch.ones_like(output_GAE[..., :1])
    else:
        other_GAF = own_GSK.flatten(1)[..., None].to(dtype)
    product_GFD = product32(torch.cat([output_GAE, other_GAF], dim=-1).mT, rows_GSKD.flatten(1, 2))
    output_GED, other_GFD = product_GFD.split([num_experts, other_GAF.shape[-1]], dim=1)
    reference_GED = other_GFD.expand(num_groups, num_experts, width)
    return PerExpert(output_GED, reference_GED, hit_GAE.sum(1, dtype=torch.float32), value_VGE)


def in_order(
    rows_GSKD: Tensor,
    index_GSK: Tensor,
    valid_GSK: Tensor,
    gain_GSK: Tensor | None,
    own_GSK: Tensor | None,
    value_VGSK: Tensor,
    num_experts: int,
    alone: bool,
) -> PerExpert:
    """The same sums on a CPU, where adding 2 D numbers a row beats multiplying it with 2 E coefficients.

    Rows are sorted by expert, those that do not count last, and each expert's rows are added in order. `rows_GSKD` may
    be overwritten.
    """
    num_groups, num_tokens, num_k, width = rows_GSKD.shape
    bins = num_experts + 1
    bin_GSK = index_GSK.masked_fill(~(valid_GSK & (index_GSK < num_experts)), num_experts)
    first_G = torch.arange(num_groups, device=index_GSK.device) * bins
    bin_N, order_N = torch.sort((bin_GSK + first_G[:, None, None]).flatten(), stable=True)
    start_B = torch.searchsorted(bin_N, torch.arange(num_groups * bins, device=bin_N.device))

    def per_expert(value_ND: Tensor, weight_N: Tensor | None = None) -> Tensor:
        sums_BD = torch.nn.functional.embedding_bag(order_N, value_ND, start_B, mode="sum", per_sample_weights=weight_N)
        return sums_BD.view(num_groups, bins, -1)[:, :num_experts]

    y_GSKD = rows_GSKD.float()
    y_ND = y_GSKD.view(-1, width)
    output_GED = per_expert(y_ND, None if gain_GSK is None else gain_GSK.flatten()[order_N])
    value_VGE = per_expert(value_VGSK.flatten(1).T.contiguous()).movedim(-1, 0)
    end_B = torch.cat([start_B[1:], start_B.new_full((1,), bin_N.shape[0])])
    rows_GE = (end_B - start_B).float().view(num_groups, bins)[:, :num_experts]
    if own_GSK is None:
        mixture_GSD = y_GSKD.sum(2)
    else:
        mixture_XD = torch.bmm(own_GSK.view(-1, 1, num_k), y_GSKD.view(-1, num_k, width))
        mixture_GSD = mixture_XD.view(num_groups, num_tokens, width)
    if not alone:
        return PerExpert(output_GED, mixture_GSD.sum(1, keepdim=True).expand_as(output_GED), rows_GE, value_VGE)
    assert own_GSK is not None
    out = None if torch.compiler.is_compiling() else y_GSKD  # a fresh buffer of this size costs more than the sum
    rest_GSKD = torch.addcmul(mixture_GSD[:, :, None], own_GSK[..., None], y_GSKD, value=-1.0, out=out)
    return PerExpert(output_GED, per_expert(rest_GSKD.view(-1, width)), rows_GE, value_VGE)


def product32(left_GEA: Tensor, right_GAD: Tensor) -> Tensor:
    """Batched matrix product, summed and returned in fp32; low-precision operands stay as they are where they may."""
    if left_GEA.dtype == torch.float32:
        return torch.bmm(left_GEA, right_GAD)
    compiling = torch.compiler.is_compiling()  # the compiler fuses the conversions, and cannot trace the question
    if not compiling and left_GEA.dtype != torch.float64 and _wide_products(left_GEA.device, left_GEA.dtype):
        return torch.bmm(left_GEA, right_GAD, out_dtype=torch.float32)
    return torch.bmm(left_GEA.float(), right_GAD.float())


@functools.cache
def _wide_products(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this device multiplies low-precision matrices into an fp32 result."""
    one = torch.ones(1, 16, 16, dtype=dtype, device=device)
    try:
        return torch.bmm(one, one, out_dtype=torch.float32).dtype == torch.float32
    except (RuntimeError, NotImplementedError, TypeError):
        return False
