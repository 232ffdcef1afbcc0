"""The two lines that a run prints by itself: what is watched when it is attached, and the verdict when it is over."""

from __future__ import annotations

import logging
import shlex
import sys
from pathlib import Path

from transformers import Trainer

from chronomoe_hf import distributed
from chronomoe_hf.report import judge_directory
from chronomoe_hf.system import WINDOWS_OF_A_RUN, ChronoSystem

logger = logging.getLogger("chronomoe_hf")


def say(line: str) -> None:
    """One line for a person, on the main process: in the log where that takes INFO, else on stderr.

    ``logging.getLogger("chronomoe_hf").setLevel(logging.WARNING)`` keeps it quiet.
    """
    if not distributed.is_main():
        return
    if logger.isEnabledFor(logging.INFO):
        logger.info("%s", line)
    elif logger.level == logging.NOTSET:
        print(f"chronomoe_hf: {line}", file=sys.stderr)


def say_attached(trainer: Trainer, system: ChronoSystem) -> None:
    """Layers and experts, what acts, when the first numbers come, and the command that shows them."""
    sizes = sorted({layer.num_experts for layer in system.layers})
    experts = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    where = system.config.telemetry.output_dir or trainer.args.output_dir
    line = f"{len(system.layers)} MoE layers of {experts} experts are watched; {_acting(system)}; "
    line += f"first numbers {_first(trainer, system)}"
    if system.config.telemetry.jsonl:
        line += f"; watch with: chronomoe tail {shlex.quote(str(where))} --follow"
    say(line)


def _acting(system: ChronoSystem) -> str:
    config = system.config
    acts = {"coherence": "a routing bias by coherence", "balance": "a balancing bias"}.get(config.beta.law)
    parts = [acts] if acts else []
    parts += ["a lens on the router input"] if config.lens.enabled and config.control.enabled else []
    parts += ["idle experts are rewritten at the start"] if config.lifecycle.revive.at == "start" else []
    return f"what may act: {', '.join(parts)}" if parts else "nothing acts on the routing"


def _first(trainer: Trainer, system: ChronoSystem) -> str:
    if system.config.interval is not None:
        return f"at step {system.config.interval}"
    if trainer.args.max_steps > 0:
        system.fit_interval(trainer.args.max_steps)
        return f"at step {system.interval}"
    return f"after {100 // WINDOWS_OF_A_RUN} % of the run, at step 100 at the latest"


def say_verdict(output_dir: Path) -> None:
    """The verdict of the run that has just ended, and the command for its page. Never raises."""
    if not distributed.is_main():
        return
    try:
        verdict = judge_directory(output_dir)
    except Exception:
        logger.debug("no verdict on %s", output_dir, exc_info=True)
        return
    say(f"{verdict.sentence} The page: chronomoe report {shlex.quote(str(output_dir))}")
