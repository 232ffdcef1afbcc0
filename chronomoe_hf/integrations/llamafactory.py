"""LLaMA-Factory: ``python -m chronomoe_hf.integrations.llamafactory train.yaml --chronomoe observe``.

LLaMA-Factory has no key in its YAML for callbacks, so this calls its ``run_exp`` with ours. With several processes:
``torchrun --nproc_per_node 2 -m chronomoe_hf.integrations.llamafactory train.yaml``. (``chronomoe run --
llamafactory-cli train train.yaml`` does the same by the environment.)

Nothing of LLaMA-Factory is imported before :func:`main` runs.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from chronomoe_hf.errors import ChronoError, ConfigError
from chronomoe_hf.integrations.settings import read_settings

_OPTION = "--chronomoe"
_USAGE = (
    "usage: python -m chronomoe_hf.integrations.llamafactory TRAIN.yaml [--chronomoe PRESET|CONFIG] [key=value ...]"
)


def run_exp(args: dict[str, Any] | None = None, chronomoe: Any = "observe", callbacks: Sequence[Any] = ()) -> None:
    """LLaMA-Factory's ``run_exp`` with a ChronoCallback.

    Args:
        args: as LLaMA-Factory takes them; None = it reads ``sys.argv``.
        chronomoe: as ``read_settings`` takes it.
        callbacks: more of them.

    Raises:
        ConfigError: `chronomoe` names no settings, or LLaMA-Factory is not installed.
    """
    config = read_settings(chronomoe, _OPTION)
    try:
        from llamafactory.train.tuner import run_exp as native
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "llamafactory":
            raise
        raise ConfigError("llamafactory is not installed in this environment; docs/integration.md says how") from None
    from chronomoe_hf.trainer.callback import ChronoCallback

    ours = [] if config is None else [ChronoCallback(config)]
    native(args=args, callbacks=[*ours, *callbacks])


def main(argv: list[str] | None = None) -> int:
    """The command: LLaMA-Factory's own arguments and ``--chronomoe``."""
    rest = list(sys.argv[1:] if argv is None else argv)
    settings = "observe"
    if _OPTION in rest:
        at = rest.index(_OPTION)
        if at + 1 == len(rest):
            print(f"{_OPTION} takes the name of a preset or a config; {_USAGE}", file=sys.stderr)
            return 2
        settings = rest[at + 1]
        del rest[at : at + 2]
    if not rest or rest[0] in ("-h", "--help"):
        print(_USAGE)
        return 0 if rest else 2
    if not Path(rest[0]).is_file():
        print(f"error: {rest[0]} is not a file; {_USAGE}", file=sys.stderr)
        return 1
    sys.argv = [sys.argv[0], *rest]  # LLaMA-Factory reads it itself
    try:
        run_exp(chronomoe=settings)
    except ChronoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
