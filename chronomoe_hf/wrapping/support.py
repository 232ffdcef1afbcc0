"""What is supported where: the table of one model's layers, read off its config, and the table of all families.

A model is built on the meta device, so neither its weights nor the memory for them are needed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from chronomoe_hf.errors import NoMoELayersError, UnsupportedArchitectureError, WrapError
from chronomoe_hf.patches import Adapter, all_adapters, refused_classes
from chronomoe_hf.patches.registry import CAPABILITIES
from chronomoe_hf.patches.rules import ScoreTopK, TopKSquash
from chronomoe_hf.recording.experts import reading_mode
from chronomoe_hf.wrapping.discovery import FoundLayer, RefusedLayer, find_layers

# Tried in this order where the config does not name its own class.
AUTO_CLASSES = (
    "AutoModelForCausalLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForImageTextToText",
    "AutoModelForMultimodalLM",
    "AutoModelForTokenClassification",
    "AutoModel",
)
YES = "yes"
MAX_NAME = 1024  # characters of a directory or Hub name


@dataclass(frozen=True)
class LayerSupport:
    """One MoE layer of a model.

    Args:
        name: path of the router.
        router_class, family, rule: what routes, and how.
        num_experts, top_k: E and k.
        native_bias: whether the model brings a balancing bias of its own.
        capabilities: capability -> ``"yes"`` (coherence: how outputs are read).
        refused: capability -> why not.
    """

    name: str
    router_class: str
    family: str
    rule: str
    num_experts: int
    top_k: int
    native_bias: bool
    capabilities: dict[str, str]
    refused: dict[str, str]


@dataclass(frozen=True)
class ModelSupport:
    """All MoE layers of a model: `layers` can be wrapped, `refused` cannot."""

    model_class: str
    model_type: str
    layers: list[LayerSupport]
    refused: list[RefusedLayer]

    def to_record(self) -> dict[str, Any]:
        """JSON-ready mapping."""
        return asdict(self)


def inspect_model(model_or_path: str) -> ModelSupport:
    """What chronomoe_hf can do with a model, from its config alone.

    Args:
        model_or_path: local directory (or config.json), or a Hub name (then the config is fetched).

    Raises:
        WrapError: there is no config, Transformers does not know its type, or no class can be built from it.
        NoMoELayersError: the model has no MoE layer.
        UnsupportedArchitectureError: it has, but none that can be wrapped.
    """
    config = load_config(model_or_path)
    model = build_on_meta(config)
    found, refused = find_layers(model)
    if not found and not refused:
        raise NoMoELayersError(
            f"{type(model).__name__} ({config.model_type}) has no MoE layer that chronomoe_hf knows; "
            "`chronomoe support` lists the families it does"
        )
    if not found:
        reasons = "\n  ".join(map(str, refused))
        raise UnsupportedArchitectureError(f"no MoE layer of {type(model).__name__} can be wrapped:\n  {reasons}")
    return ModelSupport(type(model).__name__, config.model_type, [_layer_support(layer) for layer in found], refused)


def load_config(model_or_path: str) -> PreTrainedConfig:
    """The config of a local directory or a Hub name.

    Raises:
        WrapError: there is none, or Transformers does not know its type.
    """
    named = isinstance(model_or_path, str) and model_or_path.strip() and len(model_or_path) <= MAX_NAME
    if not named or not model_or_path.isprintable():
        raise WrapError(f"a model is named by a directory or a Hub name of 1 to {MAX_NAME} printable characters")
    path = Path(model_or_path)
    if path.is_dir() and (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
        raise WrapError(
            f"{path} holds an adapter, no model: merge it into its base model first "
            "(AutoPeftModelForCausalLM.from_pretrained(directory).merge_and_unload().save_pretrained(new_directory)), "
            "and give that directory"
        )
    if path.is_dir() and not (path / "config.json").is_file():
        raise WrapError(
            f"{path} has no config.json; give the directory that save_pretrained wrote (for a run, its checkpoint-N "
            "or final model), or a Hub name"
        )
    try:
        # Code that a config points to is never run: the models that can be wrapped are those of Transformers itself.
        config: PreTrainedConfig = AutoConfig.from_pretrained(model_or_path, trust_remote_code=False)
    except Exception as error:  # config.json is a stranger's file: every class of error is met in its parsing
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise WrapError(
            f"no config can be read from {model_or_path!r}: {first} (transformers {transformers.__version__}; a model "
            "type it does not know needs a newer one, a Hub name needs the network)"
        ) from error
    return config


def build_on_meta(config: PreTrainedConfig) -> nn.Module:
    """The model of `config` without storage: the class that the config names, else the first Auto class that fits.

    Raises:
        WrapError: none fits.
    """
    failures = []
    for name in [*_model_classes(config), *AUTO_CLASSES]:
        make = _builder(name, config)
        if make is None:
            continue
        try:
            with torch.device("meta"):
                model: nn.Module = make(config)
            return model
        except Exception as error:  # numbers of a stranger's config.json end in any error when a model is built of them
            failures.append(f"{name}: {str(error)[:500] or type(error).__name__}")
    tried = "; ".join(failures) or "no Auto class lists it"
    raise WrapError(f"no model can be built from a {type(config).__name__} ({config.model_type}): {tried}")


def _model_classes(config: PreTrainedConfig) -> list[str]:
    """The class names that the config lists; what else stands there is not looked at."""
    named = config.architectures if isinstance(config.architectures, list | tuple) else []
    return [name for name in named if isinstance(name, str) and name.isidentifier() and name not in AUTO_CLASSES]


def _builder(name: str, config: PreTrainedConfig) -> Callable[[PreTrainedConfig], nn.Module] | None:
    """What makes a model of `config`: a model class of Transformers for such a config, or a listed Auto class."""
    try:
        found = getattr(transformers, name, None)
    except (ImportError, RuntimeError):  # the class needs a library that is not installed
        return None
    mapping = getattr(found, "_model_mapping", ())
    if name in AUTO_CLASSES and found is not None and type(config) in mapping:
        # False, not None: None asks at the terminal whether code that came with the weights may run.
        return functools.partial(found.from_config, trust_remote_code=False)
    if isinstance(found, type) and issubclass(found, PreTrainedModel):
        of: type | None = getattr(found, "config_class", None)
        return found if of is not None and isinstance(config, of) else None
    return None


def _require_possible(layer: FoundLayer, num_experts: int, top_k: int) -> None:
    if not 1 <= top_k <= num_experts:
        raise WrapError(
            f"{layer.name}: the config asks for {top_k} of {num_experts} experts per token; it must be between 1 and "
            "the number of experts"
        )


def _layer_support(layer: FoundLayer) -> LayerSupport:
    adapter = layer.adapter
    adapter.bind(layer.router, layer.parent)
    refused = {name: reason for name in CAPABILITIES if (reason := adapter.refused(name)) is not None}
    if layer.unreadable is not None:
        refused["coherence"] = layer.unreadable
    capabilities = {name: YES for name in CAPABILITIES if name not in refused}
    top_k = adapter.top_k(layer.router)
    _require_possible(layer, adapter.num_experts(layer.router), top_k)
    if "coherence" in capabilities:
        assert layer.experts is not None
        capabilities["coherence"] = reading_mode(layer.experts, adapter.experts_call, top_k)
    return LayerSupport(
        name=layer.name,
        router_class=adapter.router_class,
        family=adapter.family,
        rule=describe_rule(adapter),
        num_experts=adapter.num_experts(layer.router),
        top_k=top_k,
        native_bias=adapter.native_bias(layer.router, layer.parent) is not None,
        capabilities=capabilities,
        refused=refused,
    )


# ---- all families --------------------------------------------------------------------------------------------------


def describe_rule(adapter: Adapter) -> str:
    """The choice rule of a router in a few words, in the order in which it is computed."""
    rule = adapter.rule
    if isinstance(rule, ScoreTopK):
        score = "own score" if rule.score.startswith("@") else rule.score.removesuffix("32")
        bias = " + bias" if has_native_bias(adapter) else ""
        group = ", group limit" if rule.group is not None else ""
        return f"{score}{bias}{group}, top-k"
    if isinstance(rule, TopKSquash):
        bias = " (logits + bias)" if has_native_bias(adapter) else ""
        squash = "softmax or sigmoid" if rule.squash.startswith("@") else rule.squash
        return f"top-k{bias}, {squash}"
    return type(rule).__name__.removesuffix("Rule").lower()


def has_native_bias(adapter: Adapter) -> bool:
    """Whether routers of this class may carry a balancing bias of their own."""
    return adapter.bias_at is not None or adapter.bias_arg is not None


def support_rows() -> list[dict[str, Any]]:
    """Every adapter and every refused class as plain data, in the order of the table; a refusal is its reason."""
    rows: list[dict[str, Any]] = [
        {
            "family": adapter.family,
            "router": adapter.router_class,
            "rule": describe_rule(adapter),
            "native_bias": has_native_bias(adapter),
            "refused": {name: reason for name in CAPABILITIES if (reason := adapter.refused(name)) is not None},
        }
        for adapter in sorted(all_adapters(), key=lambda a: (a.family, a.router_class))
    ]
    for module, class_name, reason in refused_classes():
        refused = dict.fromkeys(CAPABILITIES, reason)
        row = {"family": module.split(".")[2], "router": class_name, "rule": None, "native_bias": None}
        rows.append({**row, "refused": refused})
    return rows


def support_table() -> str:
    """The Markdown table of every adapter, reasons below it; docs/families.md holds it between markers."""
    columns = ("family", "router", "rule", "native bias", *CAPABILITIES)
    notes: list[str] = []
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    for row in support_rows():
        known = row["rule"] is not None
        cells = [row["family"], f"`{row['router']}`", row["rule"] if known else "-"]
        cells.append(YES if row["native_bias"] else "-")
        cells += [_cell(row["refused"].get(name), notes) for name in CAPABILITIES]
        lines.append("| " + " | ".join(cells) + " |")
    legend = [f"<sup>{number}</sup> {note}" for number, note in enumerate(notes, start=1)]
    return "\n".join([*lines, "", "<br>\n".join(legend)]) + "\n"


def _cell(reason: str | None, notes: list[str]) -> str:
    if reason is None:
        return YES
    if reason not in notes:
        notes.append(reason)
    return f"no<sup>{notes.index(reason) + 1}</sup>"
