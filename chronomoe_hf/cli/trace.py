"""``chronomoe trace``: one text through a checkpoint, token by token. The one command that writes text into a page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from chronomoe_hf.cli import models
from chronomoe_hf.cli.output import JsonOption, print_json
from chronomoe_hf.errors import DataError

if TYPE_CHECKING:
    from chronomoe_hf.tracing import Trace


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(trace)


def trace(
    model: models.ModelArgument,
    text: Annotated[list[str] | None, typer.Option("--text", help="The text itself; may be repeated.")] = None,
    file: Annotated[
        list[Path] | None, typer.Option("--file", help="A text file, or a table (.jsonl .parquet ...) of them.")
    ] = None,
    against: Annotated[str | None, typer.Option("--against", help="A second model, given the same tokens.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The page (.html) or every number (.json).")] = Path(
        "trace.html"
    ),
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Most tokens in all.")] = 2000,
    length: models.LengthOption = 1024,
    batch_size: models.BatchOption = 4,
    packed: Annotated[
        bool, typer.Option("--packed", help="Texts behind each other in a row, as when packing.")
    ] = False,
    column: models.ColumnOption = "text",
    device_map: models.DeviceOption = None,
    dtype: models.DtypeOption = "auto",
    tokenizer: models.TokenizerOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show which experts of MODEL handle which word of a text. The page holds the text; no other does."""
    if output.suffix.lower() not in (".html", ".json"):
        raise typer.BadParameter(f"{output} is neither .html nor .json", param_hint="--output")
    texts = [*(text or []), *_from_files(file or [], column)]
    if not texts:
        raise typer.BadParameter("give a text, or a file with --file", param_hint="--text")
    models.quiet(progress=False)
    reader = models.load_tokenizer(tokenizer or model)
    options: dict[str, Any] = {"tokens": tokens, "length": length, "batch_size": batch_size, "packed": packed}
    found = _one(model, reader, texts, options, dtype, device_map)
    if against is not None:  # one model in memory at a time
        found = found.beside(_one(against, reader, texts, options, dtype, device_map))
    path = found.save(output)
    if as_json:
        print_json(_summary(found, path))
        return
    for at, layer in enumerate(found.layers):
        changed = found.changed(at)
        if changed is not None:
            print(f"layer {layer.layer_id}: {100 * changed:.1f} % of the tokens have another first expert")
    print(path)


def _one(
    name: str, reader: Any, texts: list[Any], options: dict[str, Any], dtype: str, device_map: str | None
) -> Trace:
    from chronomoe_hf.tracing import trace as run

    return run(models.load_model(name, dtype, device_map), reader, texts, model_name=name, **options)


def _from_files(files: list[Path], column: str) -> list[Any]:
    """Texts of files, read before any model is loaded; tables give a text or a conversation a row."""
    from chronomoe_hf.profiling.data import FORMATS, Domain, raw_documents

    out: list[Any] = []
    for path in files:
        if not path.is_file():
            raise DataError(f"there is no file {path}")
        if FORMATS.get(path.suffix.lower(), "text") == "text":
            try:
                out.append(path.read_text(encoding="utf-8"))
            except UnicodeDecodeError as error:
                raise DataError(f"{path} is not UTF-8 text: {error}") from error
        else:
            out += raw_documents(Domain("file", path, column))
    return out


def _summary(found: Trace, path: Path) -> dict[str, Any]:
    return {
        "trace": str(path),
        "bytes": path.stat().st_size,
        "tokens": len(found.ids),
        "layers": [
            {
                "layer_id": layer.layer_id,
                "experts_in_front": len(set(layer.first_T.tolist()) - {-1}),
                "changed": found.changed(at),
            }
            for at, layer in enumerate(found.layers)
        ],
    }
