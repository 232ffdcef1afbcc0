"""What wrapping would cost large models on many GPUs, computed from counted units. Nothing here is measured.

Launches of a forward are those of `shapes.json`, counted at the widths and depth of these models: a small shape's
launches a layer times their layers would be too few, since fewer layers of a wide model share a launch.

Legend: L MoE layers, E experts, D hidden size, N GPUs.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from chronomoe_hf.recording.columns import Row

GPUS = (8, 64, 512, 2048)
TOKENS = (1024, 8192)
PRESETS = {"observe": "observe", "protect": "protect, lens open", "balance": "balance"}


@dataclass(frozen=True)
class Model:
    """Published sizes; `active` parameters of a token."""

    name: str
    layers: int
    experts: int
    top_k: int
    hidden: int
    active: float
    native_bias: bool = False
    counted_as: str = ""
    """Name in shapes.json; its own, by default."""


MODELS = (
    Model("Mixtral-8x22B", 56, 8, 2, 6144, 39e9),
    Model("Qwen3-235B-A22B", 94, 128, 8, 4096, 22e9),
    Model("DeepSeek-V3", 58, 256, 8, 7168, 37e9, native_bias=True, counted_as="DeepSeek-V3's widths"),
)


@dataclass(frozen=True)
class Assumed:
    """What the table takes for granted."""

    launch_us: float = 5.0  # host time of a launch, none of it hidden behind the device's work
    hop_us: float = 20.0  # latency of an all-reduce per doubling of the number of GPUs
    bandwidth_gb_s: float = 50.0  # of a GPU to others
    peak_tflops: float = 989.0  # dense bf16 of an H100
    utilisation: float = 0.4  # share of the peak that training reaches


def reduced_bytes(layers: int, experts: int) -> int:
    """Bytes of the one all-reduce of `system.step`: L rows of fp64 numbers, and three more."""
    return 8 * (layers * Row(experts).size + 3)


def window_bytes(layers: int, experts: int, hidden: int, lens: bool) -> list[int]:
    """Bytes of the collectives of a step that closes a window: the same, with the lens's 2 D + 4 sums a layer where it
    may act; a checksum; the decisions."""
    first = reduced_bytes(layers, experts) + (8 * layers * (2 * hidden + 4) if lens else 0)
    return [first, 64, 8 * (2 * layers + 1)]


def step_seconds(model: Model, tokens: int, assumed: Assumed) -> float:
    """6 FLOPs per active parameter and token, every GPU its own tokens."""
    return 6 * model.active * tokens / (assumed.utilisation * assumed.peak_tflops * 1e12)


def reduce_seconds(size: int, gpus: int, assumed: Assumed) -> float:
    """Latency by doublings, and a ring's 2 (N - 1) / N of the bytes."""
    sent = 2 * (gpus - 1) / gpus * size
    return assumed.hop_us * 1e-6 * math.log2(gpus) + sent / (assumed.bandwidth_gb_s * 1e9)


LENS_BACKWARD = 4  # launches a layer where a lens is open


def launches(shapes: list[dict[str, Any]], run: dict[str, Any], model: Model, preset: str, tokens: int) -> int:
    """Launches that a step of one micro-batch adds: forward and backward, and `system.step` between windows.

    Args:
        shapes: rows of shapes.json.
        run: one run of launches.json, for what `system.step` launches, which no shape changes.
        model: at its widths and depth.
        preset: of PRESETS.
        tokens: of the micro-batch.
    """
    step = unit_row(run, preset, model.native_bias)
    # A balance in the router's own bias chooses nothing again: its forward is that of `observe`.
    case = PRESETS["observe" if preset == "balance" and model.native_bias else preset]
    name = (model.counted_as or model.name) + ("" if tokens == TOKENS[0] else f", T {tokens}")
    forward = next((row["launches"] for row in shapes if row["model"] == name and row["case"] == case), None)
    if forward is None:
        raise ValueError(f"shapes.json has no row for {name!r}, {case!r}: run benchmarks/shapes/run.py --parts counts")
    backward = LENS_BACKWARD * model.layers if "lens open" in case else 0
    return round(forward + backward + step["step_per_layer"] * model.layers + step["step_fixed"])


def unit_row(run: dict[str, Any], preset: str, native_bias: bool) -> dict[str, Any]:
    """The row of launches.json for a preset; the native-bias table for `balance` on such a model."""
    wanted = PRESETS[preset]
    for part in run.values():
        for row in part["rows"]:
            native = "native bias" in row["case"]
            if row["case"].split(" (")[0] == wanted and native == (native_bias and preset == "balance"):
                return row  # type: ignore[no-any-return]
    raise ValueError(f"launches.json has no row for {wanted!r}")


def state_bytes(fit: dict[str, float], model: Model) -> float:
    """Bytes of every tensor that wrapping adds, by the fit of `state` in cost.json."""
    a_layer = fit["per_expert"] * model.experts + fit["per_width"] * model.hidden + fit["per_layer"]
    return fit["fixed"] + model.layers * a_layer


def table(
    shapes: list[dict[str, Any]],
    run: dict[str, Any],
    state: dict[str, dict[str, float]],
    assumed: Assumed = Assumed(),
) -> dict[str, Any]:
    """Every model and preset: units, and the share of a step by tokens and number of GPUs.

    Args:
        shapes: rows of shapes.json.
        run: one run of launches.json.
        state: fits of the state's size by preset.
        assumed: assumptions.
    """
    rows = []
    for model in MODELS:
        for preset in PRESETS:
            added = {tokens: launches(shapes, run, model, preset, tokens) for tokens in TOKENS}
            size = reduced_bytes(model.layers, model.experts)
            host = {tokens: number * assumed.launch_us * 1e-6 for tokens, number in added.items()}
            shares = {
                str(tokens): {
                    str(gpus): round(
                        (host[tokens] + reduce_seconds(size, gpus, assumed)) / step_seconds(model, tokens, assumed), 6
                    )
                    for gpus in GPUS
                }
                for tokens in TOKENS
            }
            rows.append(
                {
                    "model": model.name,
                    "preset": preset,
                    "state_mb": round(state_bytes(state[preset], model) / 1e6, 2),
                    "launches": {str(tokens): number for tokens, number in added.items()},
                    "host_ms": {str(tokens): round(1000 * seconds, 2) for tokens, seconds in host.items()},
                    "reduced_kb": round(size / 1e3, 1),
                    "reduce_ms": {str(n): round(1000 * reduce_seconds(size, n, assumed), 3) for n in GPUS},
                    "share": shares,
                }
            )
    steps = {m.name: {str(t): round(step_seconds(m, t, assumed), 3) for t in TOKENS} for m in MODELS}
    return {"assumed": asdict(assumed), "models": [asdict(m) for m in MODELS], "step_s": steps, "rows": rows}
