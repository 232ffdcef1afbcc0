"""The lens: exact folding, the promise of the least-squares basis, refusals, state."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chronomoe_hf.errors import ConfigError, StateMismatchError
from chronomoe_hf.lens import lens as lens_module
from chronomoe_hf.lens.basis import (
    basis_problem,
    carried,
    least_squares_basis,
    router_basis,
    row_norm_ratio,
    steering_target,
)
from chronomoe_hf.lens.lens import ChronoLens, IdentityLens, fold_weight

SHAPES = [(8, 32), (64, 128), (128, 160)]  # (E, D)


def collapsed_share(n_experts: int) -> list[float]:
    """Two experts take 90 %, one is dead, the others share the rest."""
    return [0.5, 0.4, 0.0] + [0.1 / (n_experts - 3)] * (n_experts - 3)


def open_lens(rank: int, n_experts: int, d_model: int, scale: float) -> tuple[ChronoLens, torch.Tensor, torch.Tensor]:
    lens = ChronoLens(d_model=d_model, rank=rank)
    lens.set_basis(torch.randn(d_model, rank) / d_model, torch.randn(rank, d_model))
    lens.set_scale(scale)
    return lens, torch.randn(n_experts, d_model), torch.randn(50, d_model)


def test_target_by_hand():
    # E = 4: 1 - 4 share = (-1, -0.6, 0.6, 1) after the clip (the first would be -1.2), mean 0.
    assert steering_target([0.55, 0.40, 0.05 / 2, 0.05 / 2]).tolist() == pytest.approx(
        [value - (-1 - 0.6 + 0.9 + 0.9) / 4 for value in (-1, -0.6, 0.9, 0.9)], abs=1e-12
    )
    assert steering_target([0.25] * 4).tolist() == [0.0] * 4
    # Total collapse of E = 8: clip gives -1 and seven times 1; the mean is 0.75.
    assert steering_target([1.0] + [0.0] * 7).tolist() == pytest.approx([-1.75] + [0.25] * 7)


@pytest.mark.parametrize(("n_experts", "d_model"), SHAPES)
@pytest.mark.parametrize("rank", [1, 8])
def test_three_forms_of_the_lens_agree(n_experts, d_model, rank):
    """Steering the input, shifting the logits and folding into the weight are one and the same."""
    lens, weight, x = open_lens(rank, n_experts, d_model, 0.37)
    plain = x @ weight.T
    steered = lens(x) @ weight.T
    assert (steered - plain).abs().max() > 0.05, "bad test setup: the lens does nothing"
    tolerance = 1e-5 * steered.abs().max()
    torch.testing.assert_close(plain + lens.logit_shift(x, weight), steered, atol=tolerance, rtol=0)
    torch.testing.assert_close(x @ fold_weight(weight, lens.V, lens.U, lens.scale).T, steered, atol=tolerance, rtol=0)


def test_fold_against_the_definition_element_by_element():
    weight, V, U = torch.randn(3, 4), torch.randn(4, 2), torch.randn(2, 4)
    got = fold_weight(weight, V, U, 0.3).tolist()
    w, v, u = weight.tolist(), V.tolist(), U.tolist()
    for e in range(3):
        for d in range(4):
            inner = sum(sum(w[e][j] * u[r][j] for j in range(4)) * v[d][r] for r in range(2))
            assert got[e][d] == pytest.approx(w[e][d] + 0.3 * inner, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fold_keeps_the_dtype_and_scale_zero_is_exact(dtype):
    weight = torch.randn(8, 16).to(dtype)
    V, U = torch.randn(16, 1), torch.randn(1, 16)
    closed = fold_weight(weight, V, U, 0.0)
    assert torch.equal(closed, weight)
    assert closed.data_ptr() != weight.data_ptr()
    folded = fold_weight(weight, V, U, 0.5)
    assert folded.dtype == dtype
    assert not torch.equal(folded, weight)


@pytest.mark.parametrize(("n_experts", "d_model"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_least_squares_moves_the_mean_token_by_exactly_the_target(n_experts, d_model, dtype):
    weight = (torch.randn(n_experts, d_model) * 0.02).to(dtype)
    mu = torch.randn(d_model) + 0.5
    share, logit_std = collapsed_share(n_experts), 1.7
    lens = ChronoLens(d_model=d_model, rank=4)
    assert lens.aim(mu, weight, share, logit_std) is None
    expected = [value * logit_std for value in steering_target(share).tolist()]
    assert max(expected) - min(expected) > 1.0
    for scale in (1.0, 0.35):
        lens.set_scale(scale)
        moved = (lens.logit_shift(mu[None], weight))[0].tolist()
        assert moved == pytest.approx([scale * value for value in expected], abs=1e-4)
    # Through the input, as the router sees it.
    lens.set_scale(1.0)
    steered = (lens(mu) - mu) @ weight.float().T
    assert steered.tolist() == pytest.approx(expected, abs=1e-3)


def test_u_is_the_pseudo_inverse_solution_of_smallest_norm():
    weight, mu, share = torch.randn(8, 32), torch.randn(32), collapsed_share(8)
    V, U = least_squares_basis(mu, weight, share, 2.0)
    expected = torch.linalg.pinv(weight.double()) @ (steering_target(share) * 2.0)
    torch.testing.assert_close(U[0].double(), expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(V[:, 0], mu / mu.dot(mu), atol=1e-7, rtol=1e-5)
    assert float(mu @ V) == pytest.approx(1.0, abs=1e-6)


def test_the_scaled_basis_moves_each_expert_by_its_own_spread():
    weight = torch.randn(8, 32) * torch.tensor([0.1, 0.2, 0.5, 1.0, 1.0, 1.0, 2.0, 3.0])[:, None]
    mu, share, logit_std = torch.randn(32), collapsed_share(8), 1.3
    mean = [sum(row[d] for row in weight.tolist()) / 8 for d in range(32)]
    norm = [math.sqrt(sum((w - m) ** 2 for w, m in zip(row, mean, strict=True))) for row in weight.tolist()]
    rms = math.sqrt(sum(n * n for n in norm) / 8)
    assert row_norm_ratio(weight).tolist() == pytest.approx([n / rms for n in norm], rel=1e-6)
    target = [t * logit_std * n / rms for t, n in zip(steering_target(share).tolist(), norm, strict=True)]
    lens = ChronoLens(32)
    lens.aim(mu, weight, share, logit_std, "scaled")
    lens.set_scale(1.0)
    expected = [t - sum(target) / 8 for t in target]
    assert lens.logit_shift(mu[None], weight)[0].tolist() == pytest.approx(expected, abs=1e-4)
    assert row_norm_ratio(torch.ones(4, 8)).tolist() == [1.0] * 4


def test_zero_centred_router_rows_still_reach_the_target():
    """Rank E - 1, but the missing direction (all logits up) is not part of a zero-centred target."""
    weight = torch.randn(8, 32)
    weight = weight - weight.mean(0)
    mu, share = torch.randn(32), collapsed_share(8)
    _, U = least_squares_basis(mu, weight, share, 1.0)
    assert (U @ weight.T)[0].tolist() == pytest.approx(steering_target(share).tolist(), abs=1e-5)


def test_more_experts_than_dimensions_gets_the_closest_shift():
    weight, mu, share = torch.randn(64, 16), torch.randn(16), collapsed_share(64)
    _, U = least_squares_basis(mu, weight, share, 1.0)
    residual = steering_target(share) - (weight.double() @ U[0].double())
    assert residual.norm() > 0.1, "bad test setup: an exact solution exists"
    # The normal equations: what is left is orthogonal to every reachable shift.
    assert (weight.double().T @ residual).abs().max() < 1e-4


@pytest.mark.parametrize("basis", ["scaled", "least_squares", "router"])
def test_carry_mixes_what_the_lens_did_with_what_it_should_do(basis):
    """New shift of the mean token = carry * old shift + (1 - carry) * fresh shift, for a mean that has moved."""
    weight, mu, moved_mu = torch.randn(8, 32), torch.randn(32) + 0.5, torch.randn(32) + 0.5
    first, second = collapsed_share(8), collapsed_share(8)[::-1]
    lens, fresh = ChronoLens(32), ChronoLens(32)
    lens.aim(mu, weight, first, 1.3, basis)
    fresh.aim(moved_mu, weight, second, 1.3, basis)
    lens.set_scale(1.0)
    fresh.set_scale(1.0)
    old_shift = lens.logit_shift(moved_mu[None], weight)
    lens.aim(moved_mu, weight, second, 1.3, basis, carry=0.7)
    expected = 0.7 * old_shift + 0.3 * fresh.logit_shift(moved_mu[None], weight)
    assert (old_shift - expected).abs().max() > 0.05, "bad test setup"
    torch.testing.assert_close(lens.logit_shift(moved_mu[None], weight), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("old", "new", "memory", "share"),
    [(0.0, 0.5, 0.99, 0.0), (0.5, 0.5, 0.0, 0.0), (1.0, 2.0, 0.9, 0.45), (1.0, 0.9, 0.9, 1.0), (1.0, 0.2, 0.9, 1.0)],
)
def test_what_is_carried_makes_scale_times_basis_a_leaky_sum(old, new, memory, share):
    assert carried(old, new, memory) == pytest.approx(share, abs=1e-12)


def closed_loop(memory: float, scale: float, gain: float, rounds: int = 40) -> list[float]:
    """Neff/E of a fixed skewed population, top-1, steered by shares that were measured under the lens."""
    generator = torch.Generator().manual_seed(0)
    noise, mu = torch.randn(4000, 64, generator=generator), torch.full((64,), 2.0)
    x, weight = mu + noise - noise.mean(0), torch.randn(8, 64, generator=generator) / 8
    weight = weight - torch.outer(weight @ mu, mu) / mu.dot(mu)
    weight = weight + torch.outer(torch.tensor([2.0, 1.5, 0.5, 0.0, 0.0, -0.5, -1.5, -2.0]), mu) / mu.dot(mu)
    lens, seen, integral = ChronoLens(64), [], 0.0
    for _ in range(rounds):
        chosen = (x @ weight.T + lens.logit_shift(x, weight)).argmax(-1)
        share = torch.bincount(chosen, minlength=8).double() / len(x)
        seen.append(float(torch.exp(-torch.special.xlogy(share, share).sum())) / 8)
        integral = min(scale, 0.99 * integral + min(0.2, gain * max(0.0, 0.7 - seen[-1]))) if gain else scale
        if integral > 0.0:
            lens.aim(mu, weight, share.tolist(), 1.0, carry=carried(lens.scale, integral, memory))
        lens.set_scale(integral)
    return seen


def test_a_lens_with_memory_holds_a_floor_that_one_without_cannot():
    small, large = closed_loop(0.0, 0.5, 0.0), closed_loop(0.0, 2.0, 0.0)
    held = closed_loop(0.9, 2.0, 1.0)
    assert held[0] == small[0] == large[0] < 0.5, "bad test setup: not collapsed"
    assert max(small[10:]) < 0.6, "a small scale settles half-way"
    swing = [abs(b - a) for a, b in itertools.pairwise(large[10:])]
    assert min(large[10:]) < 0.6 and max(swing) > 0.05, "a large scale swings"
    assert min(held[10:]) > 0.6
    assert max(abs(b - a) for a, b in itertools.pairwise(held[20:])) < 0.02


def test_lens_is_token_dependent_through_the_mean_direction():
    weight, mu = torch.randn(8, 32), torch.randn(32)
    lens = ChronoLens(32)
    lens.aim(mu, weight, collapsed_share(8), 1.0)
    lens.set_scale(0.5)
    orthogonal = torch.randn(32)
    orthogonal -= mu * (orthogonal @ mu) / (mu @ mu)
    shift = lens.logit_shift(torch.stack([mu, 2 * mu, orthogonal]), weight)
    torch.testing.assert_close(shift[1], 2 * shift[0], atol=1e-5, rtol=1e-5)
    assert shift[2].abs().max() < 1e-5
    assert shift[0].abs().max() > 0.1


@pytest.mark.parametrize("basis", ["scaled", "least_squares", "router"])
def test_any_reader_is_scaled_to_read_one_for_the_mean_token(basis):
    mu, weight = torch.randn(16), torch.randn(8, 16)
    direction = mu + 0.5 * torch.randn(16, generator=torch.Generator().manual_seed(3))
    lens = ChronoLens(16)
    assert lens.aim(mu, weight, collapsed_share(8), 1.3, basis, reader_D=direction) is None
    assert float(mu @ lens.V[:, 0]) == pytest.approx(1.0, abs=1e-5)
    cosine = torch.cosine_similarity(lens.V[:, 0], direction, dim=0)
    assert float(cosine) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("reader", ["zero", "opposite", "nan"])
def test_a_reader_that_reads_nothing_gives_way_to_the_mean(reader):
    mu, weight = torch.randn(6), torch.randn(4, 6)
    direction = {"zero": torch.zeros(6), "opposite": -mu, "nan": torch.full((6,), torch.nan)}[reader]
    lens, plain = ChronoLens(6), ChronoLens(6)
    lens.aim(mu, weight, collapsed_share(4), 1.0, reader_D=direction)
    plain.aim(mu, weight, collapsed_share(4), 1.0)
    assert torch.equal(lens.V, plain.V) and torch.equal(lens.U, plain.U)


def test_router_basis_is_the_unit_vector_of_the_original():
    weight = torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]])
    mu = torch.tensor([0.0, 0.0, 2.0])
    V, U = router_basis(mu, weight, [0.75, 0.25])
    # (1/2 - 3/4) W_0 + (1/2 - 1/4) W_1 = (-0.25, 0.5, 0), norm sqrt(0.3125)
    assert U[0].tolist() == pytest.approx([-0.25 / math.sqrt(0.3125), 0.5 / math.sqrt(0.3125), 0.0])
    assert V[:, 0].tolist() == pytest.approx([0.0, 0.0, 0.5])
    lens = ChronoLens(3)
    assert lens.aim(mu, weight, [0.75, 0.25], 1.0, basis="router") is None
    lens.set_scale(1.0)
    moved = lens.logit_shift(mu[None], weight)[0]
    assert moved[0] < 0 < moved[1], "away from the busy expert, towards the idle one"


@pytest.mark.parametrize("basis", ["least_squares", "router"])
def test_a_balanced_layer_gets_no_direction(basis):
    weight, mu = torch.randn(8, 32), torch.randn(32)
    lens = ChronoLens(32)
    lens.aim(mu, weight, [0.125] * 8, 1.0, basis=basis)
    lens.set_scale(0.5)
    assert float(lens.U.norm()) == 0.0
    x = torch.randn(5, 32)
    assert torch.equal(lens(x), x)


@pytest.mark.parametrize("basis", ["least_squares", "router"])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"mu_D": torch.zeros(16)}, "mean router input is zero"),
        ({"mu_D": torch.full((16,), math.nan)}, "mean router input has non-finite"),
        ({"weight_ED": torch.full((8, 16), math.inf)}, "router weight has non-finite"),
        ({"logit_std": 0.0}, "logit standard deviation"),
        ({"logit_std": math.nan}, "logit standard deviation"),
        ({"share_E": [math.nan] * 8}, "shares"),
    ],
)
def test_degenerate_inputs_close_the_lens_and_say_why(basis, change, reason):
    good = {"mu_D": torch.randn(16), "weight_ED": torch.randn(8, 16), "share_E": collapsed_share(8), "logit_std": 1.0}
    lens = ChronoLens(16)
    assert lens.aim(**good, basis=basis) is None
    assert float(lens.U.norm()) > 0
    note = lens.aim(**{**good, **change}, basis=basis)
    assert note is not None
    assert reason in note
    assert lens.note == note
    assert basis_problem(**{**good, **change}) == note
    lens.set_scale(0.5)
    x = torch.randn(5, 16)
    assert torch.equal(lens(x), x)
    assert lens.norms() == {"v_norm": 0.0, "u_norm": 0.0}


def test_tiny_means_do_not_underflow():
    mu = torch.randn(16, dtype=torch.float64) * 1e-18
    V, _ = least_squares_basis(mu, torch.randn(8, 16), collapsed_share(8), 1.0)
    assert float(mu @ V[:, 0].double()) == pytest.approx(1.0, abs=1e-5)


@given(st.permutations(list(range(8))), st.integers(0, 1000))
@settings(deadline=None, max_examples=30)
def test_renaming_the_experts_renames_the_shift(order, seed):
    generator = torch.Generator().manual_seed(seed)
    weight, mu = torch.randn(8, 32, generator=generator), torch.randn(32, generator=generator)
    share = torch.rand(8, generator=generator, dtype=torch.float64)
    share = share / share.sum()
    _, U = least_squares_basis(mu, weight, share, 1.0)
    _, U_renamed = least_squares_basis(mu, weight[order], share[order], 1.0)
    torch.testing.assert_close(U_renamed, U, atol=1e-4, rtol=1e-4)


def test_closed_lens_returns_the_very_tensor_and_a_zero_shift():
    lens, weight, x = open_lens(2, 8, 16, 0.0)
    assert lens(x) is x
    assert torch.equal(lens.logit_shift(x, weight), torch.zeros(50, 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_math_is_fp32_also_under_autocast_and_keeps_shape_and_dtype(dtype):
    lens, weight, _ = open_lens(2, 8, 16, 0.4)
    x = torch.randn(3, 5, 16).to(dtype)
    expected = (x.float() + 0.4 * x.float() @ lens.V @ lens.U).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, shift = lens(x), lens.logit_shift(x[0], weight)
    assert got.dtype == dtype
    assert shift.dtype == torch.float32
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5)
    torch.testing.assert_close(shift, 0.4 * (x[0].float() @ lens.V) @ (lens.U @ weight.T), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("train_router", [False, True])
def test_gradients_reach_the_input_and_the_router_only_if_asked(train_router):
    lens, weight, x = open_lens(1, 8, 16, 0.4)
    lens.train_router = train_router
    weight.requires_grad_()
    x.requires_grad_()
    lens.logit_shift(x, weight).square().sum().backward()
    assert (weight.grad is not None) is train_router
    assert weight.grad is None or weight.grad.abs().sum() > 0
    # d/dx of |s (x V)(U W^T)|^2 = 2 s^2 |U W^T|^2 (x V) V^T
    want = 2 * 0.4**2 * (lens.U @ weight.detach().T).square().sum() * (x.detach() @ lens.V) @ lens.V.T
    torch.testing.assert_close(x.grad, want, atol=1e-5, rtol=1e-4)
    assert not lens.V.requires_grad
    assert not lens.U.requires_grad


def test_a_lower_rank_basis_is_padded_and_replaces_the_old_one():
    lens = ChronoLens(d_model=6, rank=3)
    pointers = lens.V.data_ptr(), lens.U.data_ptr(), lens.scale_t.data_ptr()
    lens.set_basis(torch.ones(6, 3), torch.ones(3, 6))
    lens.set_basis(2 * torch.ones(6, 1), 3 * torch.ones(1, 6))
    lens.set_scale(0.5)
    assert lens.V.tolist() == [[2.0, 0.0, 0.0]] * 6
    assert lens.U.tolist() == [[3.0] * 6, [0.0] * 6, [0.0] * 6]
    assert pointers == (lens.V.data_ptr(), lens.U.data_ptr(), lens.scale_t.data_ptr()), "updates are in place"
    assert lens.norms() == pytest.approx({"v_norm": math.sqrt(24), "u_norm": math.sqrt(54)})


def test_state_returns_bit_for_bit():
    lens, weight, x = open_lens(3, 8, 16, 0.1 + 0.2)
    other = ChronoLens(16, 3)
    other.load_state_dict(copy.deepcopy(lens.state_dict()))
    assert torch.equal(other.V, lens.V)
    assert torch.equal(other.U, lens.U)
    assert other.scale == lens.scale == 0.1 + 0.2
    assert torch.equal(other.scale_t, lens.scale_t)
    assert torch.equal(other.logit_shift(x, weight), lens.logit_shift(x, weight))
    lens.state_dict()["V"].zero_()
    assert float(lens.V.norm()) > 0, "a state dict is a copy"


def test_foreign_state_and_bad_values_are_refused():
    lens = ChronoLens(16, 2, layer_id=7)
    with pytest.raises(StateMismatchError, match="layer 7"):
        lens.load_state_dict(ChronoLens(16, 3).state_dict())
    with pytest.raises(StateMismatchError):
        lens.load_state_dict({})
    with pytest.raises(ConfigError, match=r"\(16, r\)"):
        lens.set_basis(torch.zeros(16, 3), torch.zeros(3, 16))
    for scale in (-0.1, math.nan, math.inf):
        with pytest.raises(ConfigError, match="scale"):
            lens.set_scale(scale)
    for arguments in ({"d_model": 0}, {"d_model": 4, "rank": 0}):
        with pytest.raises(ConfigError):
            ChronoLens(**arguments)


def test_identity_lens_does_nothing_and_has_the_same_surface():
    lens, x, weight = IdentityLens(3, reason="not linear"), torch.randn(5, 16), torch.randn(8, 16)
    lens.set_scale(0.5)
    lens.set_basis(torch.ones(16, 1), torch.ones(1, 16))
    assert lens(x) is x
    assert torch.equal(lens.logit_shift(x, weight), torch.zeros(5, 8))
    assert (lens.scale, lens.s, lens.norms()) == (0.0, 0.0, {"v_norm": 0.0, "u_norm": 0.0})
    assert lens.aim(x[0], weight, [0.125] * 8, 1.0) == "not linear"
    lens.load_state_dict(lens.state_dict())
    with pytest.raises(StateMismatchError, match="layer 3"):
        lens.load_state_dict(ChronoLens(16).state_dict())
    public = {name for name in vars(ChronoLens) if not name.startswith("_")}
    assert public <= {name for name in dir(IdentityLens) if not name.startswith("_")}


def test_a_lens_is_no_module():
    for lens in (ChronoLens(4), IdentityLens()):
        assert not isinstance(lens, torch.nn.Module)
    assert lens_module.ChronoLens.supported is True
    assert lens_module.IdentityLens.supported is False


@pytest.mark.parametrize("rows", ["independent", "nearly dependent", "twice the same", "more than the width"])
def test_the_basis_is_that_of_the_pseudo_inverse_whichever_way_it_is_solved(rows: str) -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(40 if rows == "more than the width" else 16, 32, generator=generator, dtype=torch.float64)
    if rows == "nearly dependent":
        weight[3] = weight[2] + 1e-7 * weight[4]
    elif rows == "twice the same":
        weight[3] = weight[2]
    mu = torch.randn(32, generator=generator, dtype=torch.float64)
    share = torch.rand(len(weight), generator=generator, dtype=torch.float64)
    share = share / share.sum()
    if rows in ("twice the same", "nearly dependent"):
        share[3] = share[2] = share[2:4].mean()  # the same target for the same row
    _, U = least_squares_basis(mu, weight, share, 1.5)
    wanted = torch.linalg.pinv(weight, rtol=1e-6) @ (steering_target(share) * 1.5)
    torch.testing.assert_close(U[0].double(), wanted, rtol=1e-5, atol=1e-7)
