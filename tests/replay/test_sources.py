"""Every form in which engines hand out routes, and every one that is refused."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
import pytest
import torch

from chronomoe_hf.errors import ReplayError
from chronomoe_hf.replay.layers import ReplayLayer
from chronomoe_hf.replay.sources import Axis, read_routes

# Four decoder layers, the second of which is dense: MoE layers 0, 2 and 3.
MOE = (0, 2, 3)
LAYERS = [ReplayLayer(at, f"model.layers.{decoder}.mlp.gate", 8, 2) for at, decoder in enumerate(MOE)]
AXIS = Axis(LAYERS, LAYERS, 4)
TOKENS = 6
I8 = np.dtype(np.int8)


def chosen(rows: int = TOKENS - 1, k: int = 2, seed: int = 0) -> Any:
    """Ids of three MoE layers, no expert twice."""
    rng = np.random.default_rng(seed)
    return np.argsort(rng.random((rows, 3, 8)), -1)[..., :k]


def all_layers(routes: Any) -> Any:
    """The same on the axis of all decoder layers, 0 in the dense one."""
    out = np.zeros((len(routes), 4, routes.shape[-1]), dtype=routes.dtype)
    out[:, list(MOE)] = routes
    return out


def npy(routes: Any, dtype: str) -> str:
    buffer = io.BytesIO()
    np.save(buffer, routes.astype(dtype))
    return base64.b64encode(buffer.getvalue()).decode()


def raw(routes: Any) -> str:
    return base64.b64encode(routes.astype("<i4").tobytes()).decode()


ROUTES = chosen()
FORMS: dict[str, Any] = {
    "array": ROUTES,
    "tensor": torch.from_numpy(ROUTES),
    "nested lists": ROUTES.tolist(),
    "all layers": all_layers(ROUTES),
    "npy uint8 (vLLM, E <= 256)": npy(all_layers(ROUTES), "uint8"),
    "npy uint16": npy(all_layers(ROUTES), "uint16"),
    "npy int32": npy(ROUTES, "int32"),
    "raw int32 (SGLang)": raw(all_layers(ROUTES)),
    "two parts (vLLM 0.21)": (ROUTES[:2].tolist(), ROUTES[2:].tolist()),
    "two named parts": {"prompt": all_layers(ROUTES)[:2], "completion": all_layers(ROUTES)[2:]},
}


@pytest.mark.parametrize("form", list(FORMS))
def test_every_form_says_the_same(form: str) -> None:
    read = read_routes(FORMS[form], TOKENS, AXIS, I8)
    assert read.invalid is None and read.routes_RLK.dtype == np.int8
    assert (read.routes_RLK == ROUTES).all()


def test_a_row_for_every_token_or_for_all_but_the_last_and_a_prompt_that_was_left_out() -> None:
    assert len(read_routes(chosen(TOKENS), TOKENS, AXIS, I8).routes_RLK) == TOKENS
    part = read_routes(ROUTES[3:], TOKENS, AXIS, I8, start=3)
    assert (part.routes_RLK[:3] == -1).all() and (part.routes_RLK[3:] == ROUTES[3:]).all()


@pytest.mark.parametrize(
    ("payload", "words"),
    [
        (ROUTES[:3], "routes of 3 tokens"),
        (np.concatenate([ROUTES, ROUTES]), "routes of 10 tokens"),
        (chosen(k=3), "name 3 experts a token, this model chooses 2"),
        (np.zeros((5, 5, 2), dtype=int), "the routes have 5 layers, the model 3 \\(moe\\), 4 \\(all\\)"),
        (ROUTES[0], "three axes"),
        ("not base64!", "as text are base64"),
        (base64.b64encode(b"12345").decode(), "int32, got 5 bytes"),
        (raw(ROUTES[:4]), "0 ways fit"),
        (17, "routes are an array"),
        ([[1, 2], [3]], "nested lists of one shape"),
    ],
)
def test_what_does_not_fit_is_refused_with_both_shapes(payload: Any, words: str) -> None:
    with pytest.raises(ReplayError, match=words):
        read_routes(payload, TOKENS, AXIS, I8)


@pytest.mark.parametrize("case", ["zeros", "outside", "twice", "minus"])
def test_rows_that_cannot_be_choices_are_left_out_and_named(case: str) -> None:
    routes = all_layers(ROUTES)
    if case == "zeros":
        routes[2] = 0
    elif case == "outside":
        routes[2, 0, 0] = 8
    elif case == "twice":
        routes[2, 3] = 5
    else:
        routes[2] = -1
    read = read_routes(routes, TOKENS, AXIS, I8)
    assert (read.routes_RLK[2] == -1).all() and (np.delete(read.routes_RLK, 2, 0) == np.delete(ROUTES, 2, 0)).all()
    words = {"zeros": "54730", "outside": "beyond the 8 experts", "twice": "twice"}
    assert (read.invalid is None) == (case == "minus")
    assert read.invalid is None or (words[case] in read.invalid and read.num_invalid == 1)


def test_one_expert_a_token_is_never_taken_for_a_fault() -> None:
    layers = [ReplayLayer(at, f"model.layers.{at}.mlp.gate", 4, 1) for at in range(2)]
    routes = np.zeros((3, 2, 1), dtype=int)
    read = read_routes(routes, 4, Axis(layers, layers, 2), I8)
    assert read.invalid is None and (read.routes_RLK == 0).all()


def test_hash_layers_are_on_the_axis_and_not_compared_and_two_routers_in_a_layer_are_refused() -> None:
    hashed = [ReplayLayer(0, "model.layers.0.mlp.gate", 8, 2, by_token=True), *LAYERS[1:]]
    read = read_routes(ROUTES, TOKENS, Axis(hashed, hashed[1:], 4), I8)
    assert (read.routes_RLK == ROUTES[:, 1:]).all()
    both = [ReplayLayer(at, f"model.layers.0.{name}.router", 8, 2) for at, name in enumerate(("attn", "mlp"))]
    with pytest.raises(ReplayError, match="one decoder layer"):
        read_routes(ROUTES[:, :2], TOKENS, Axis(both, both, 2), I8)


def test_the_axis_can_be_set() -> None:
    with pytest.raises(ReplayError, match=r"replay.layers='moe'"):
        read_routes(all_layers(ROUTES), TOKENS, Axis(LAYERS, LAYERS, 4, "moe"), I8)
