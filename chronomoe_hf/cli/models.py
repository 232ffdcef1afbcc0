"""What the commands share that load a model: the model, its tokenizer, its directory, and texts for it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from chronomoe_hf.errors import DataError, WrapError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ModelArgument = Annotated[str, typer.Argument(help="Directory that save_pretrained wrote, or a Hub name.")]
PlanOption = Annotated[Path, typer.Option("--plan", help="Plan file, from `chronomoe plan`.")]
DeviceOption = Annotated[str | None, typer.Option("--device-map", help='"auto" spreads the model over the devices.')]
DtypeOption = Annotated[str, typer.Option("--dtype", help="auto (as saved), bfloat16, float16 or float32.")]
TokenizerOption = Annotated[str | None, typer.Option("--tokenizer", help="Where the tokenizer is, if not in MODEL.")]
ColumnOption = Annotated[str, typer.Option("--column", help="Column of the text in tables and JSONL.")]
LengthOption = Annotated[int, typer.Option("--length", min=2, help="Most tokens of a sequence.")]
BatchOption = Annotated[int, typer.Option("--batch-size", min=1, help="Sequences in a forward.")]
ProgressOption = Annotated[bool, typer.Option("--progress/--no-progress", help="Show a progress bar.")]

DTYPES = ("auto", "bfloat16", "float16", "float32")


def load_model(name: str, dtype: str = "auto", device_map: str | None = None) -> PreTrainedModel:
    """The model, in evaluation mode, by the class that its config names.

    Raises:
        WrapError: no such model, or weights of it are missing.
    """
    import torch
    import transformers

    from chronomoe_hf.wrapping.support import load_config

    if dtype not in DTYPES:
        raise typer.BadParameter(f"{dtype!r} is none of {', '.join(DTYPES)}", param_hint="--dtype")
    config = load_config(name)
    known = [getattr(transformers, each, None) for each in config.architectures or []]
    builder: Any = next((each for each in known if each is not None), transformers.AutoModelForCausalLM)
    options: dict[str, Any] = {"dtype": "auto" if dtype == "auto" else getattr(torch, dtype)}
    if device_map is not None:
        options["device_map"] = device_map
    try:
        model, info = builder.from_pretrained(name, output_loading_info=True, use_safetensors=True, **options)
    except (OSError, ValueError, RuntimeError, MemoryError) as error:
        if isinstance(error, MemoryError) or "mmap" in str(error) or "allocate memory" in str(error):
            raise WrapError(
                f"{name} does not fit into the memory that this process may take ({_first(error)}); load it in parts "
                "with --device-map, or export with --check shapes, which loads no model"
            ) from error
        raise WrapError(f"{name} does not load: {_first(error)}") from error
    missing = sorted(map(str, info["missing_keys"]))
    if missing:
        raise WrapError(f"{len(missing)} weights of {name} are missing (first: {missing[0]}); is it whole?")
    loaded: PreTrainedModel = model.eval()
    return loaded


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a model.

    Raises:
        DataError: there is none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"no tokenizer can be loaded from {name}: {str(error).strip().splitlines()[0]}; name one with --tokenizer"
        ) from error


def quiet(progress: bool) -> None:
    """No advice of Transformers between our lines, and no bars where none are wanted."""
    import transformers

    from chronomoe_hf.cli.inspect import quiet as no_advice

    no_advice()
    if not progress:
        transformers.logging.disable_progress_bar()
        from datasets import disable_progress_bars

        disable_progress_bars()


def local_directory(name: str) -> Path:
    """The directory of a model; a Hub name is downloaded first (weights in safetensors, config, tokenizer).

    Raises:
        WrapError: there is no such model.
    """
    path = Path(name)
    if path.is_dir():
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.md", "*.tiktoken", "LICENSE*"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (OSError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise WrapError(f"{name} is neither a directory nor a model that can be fetched: {_first(error)}") from error


def steering_note(name: str, loaded: bool) -> str | None:
    """What to say of a state in the model's directory that steers; None where there is none."""
    from chronomoe_hf.checkpoint.store import steering

    found = steering(name) if Path(name).is_dir() else None
    if found is None:
        return None
    if loaded:
        return f"measured with the steering that lies in {name}: {found}"
    return (
        f"the routing of {name} was governed: its folder chronomoe holds {found}; it is not loaded here (--state does)"
    )


def _first(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def experts(values: list[str] | None, option: str) -> list[tuple[int, int]]:
    """``LAYER:EXPERT`` as pairs of numbers."""
    pairs = []
    for value in values or []:
        layer, _, expert = value.partition(":")
        if not (layer.isdecimal() and expert.isdecimal()):
            raise typer.BadParameter(f"{value!r} is not LAYER:EXPERT, as in 3:17", param_hint=option)
        pairs.append((int(layer), int(expert)))
    return pairs
