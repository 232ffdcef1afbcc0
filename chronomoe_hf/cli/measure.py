"""``chronomoe measure``: what a plan costs on held-out text, before anything is cut."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from chronomoe_hf.cli import models
from chronomoe_hf.cli.output import JsonOption, console, print_json

if TYPE_CHECKING:
    from rich.console import Console

    from chronomoe_hf.lifecycle import Effect, MaskEffect


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(measure)


def measure(
    model: models.ModelArgument,
    plan: models.PlanOption,
    data: Annotated[str, typer.Option("--data", help="Held-out text: a file or a Hub name.")],
    tokens: Annotated[int, typer.Option("--tokens", min=2, help="Most tokens to read.")] = 32_768,
    state: Annotated[
        bool, typer.Option("--state/--no-state", help="Load the steering that lies in MODEL, and measure with it.")
    ] = False,
    controls: Annotated[int, typer.Option("--controls", min=0, help="Random plans to compare with.")] = 5,
    worst: Annotated[bool, typer.Option("--worst/--no-worst", help="Also the plan that drops the best.")] = True,
    leave_one_out: Annotated[
        list[str] | None, typer.Option("--leave-one-out", help="LAYER:EXPERT to measure alone; may be repeated.")
    ] = None,
    length: models.LengthOption = 512,
    batch_size: models.BatchOption = 8,
    column: models.ColumnOption = "text",
    device_map: models.DeviceOption = None,
    dtype: models.DtypeOption = "auto",
    tokenizer: models.TokenizerOption = None,
    progress: models.ProgressOption = True,
    as_json: JsonOption = False,
) -> None:
    """Compare MODEL with itself under the plan's mask: rise of the loss, against random plans and the worst one."""
    models.quiet(progress and not as_json)
    from chronomoe_hf import lifecycle
    from chronomoe_hf.profiling import text_batches

    made = lifecycle.PrunePlan.load(plan)
    alone = models.experts(leave_one_out, "--leave-one-out")
    loaded = models.load_model(model, dtype, device_map)
    batches = text_batches(
        loaded,
        models.load_tokenizer(tokenizer or model),
        data,
        tokens=tokens,
        length=length,
        batch_size=batch_size,
        column=column,
    )
    steered = models.steering_note(model, loaded=state)
    if state:
        from chronomoe_hf.api import wrap

        wrap(loaded, state=models.local_directory(model)).eval()
    effect = lifecycle.measure(loaded, made, batches, controls=controls, worst=worst, leave_one_out=alone)
    if as_json:
        print_json({**effect.to_record(), "steering": steered, "state_loaded": state})
        return
    screen = console()
    if steered is not None:
        screen.print(steered, soft_wrap=True)
    print_effect(effect, screen)


def print_effect(effect: Effect, screen: Console) -> None:
    """A line per set of dropped experts."""
    screen.print(
        f"{effect.num_kept} experts a layer stay; {effect.tokens} tokens in {effect.sequences} sequences; "
        f"full loss {effect.loss:.4f}"
    )
    screen.print(f"{'dropped':<20} {'loss':>9} {'error':>8} {'KL':>8} {'overlap':>8} {'same experts':>13}")
    _line(screen, f"plan ({effect.rank})", effect.plan)
    for number, each in enumerate(effect.random, start=1):
        _line(screen, f"random {number}", each)
    if effect.worst is not None:
        _line(screen, "worst", effect.worst)
    for (layer, expert), each in effect.leave_one_out.items():
        _line(screen, f"expert {layer}:{expert}", each)
    random = effect.random_delta_loss
    if random is not None:
        better = "less" if effect.plan.delta_loss < random else "not less"
        screen.print(f"the plan costs {effect.plan.delta_loss:+.4f} nats, {better} than chance ({random:+.4f})")


def _line(screen: Console, name: str, each: MaskEffect) -> None:
    error = "-" if each.delta_loss_error is None else f"{each.delta_loss_error:.4f}"
    screen.print(
        f"{name[:20]:<20} {each.delta_loss:>+9.4f} {error:>8} {each.kl:>8.4f} {each.overlap:>8.4f} "
        f"{each.expert_overlap:>13.4f}"
    )
