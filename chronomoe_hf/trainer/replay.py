"""Replay under a Trainer: where its engine hands out routes, its log-probabilities, and what cannot be had together.

Nothing here decides which pass a forward is: ``replay.passes`` knows that from the forward alone. What is replaced:

=======================================  ========================================================================
method                                   why
=======================================  ========================================================================
``model.generate``                       a rollout of Transformers itself is recorded; in evaluation, and where none is
                                         needed, it is of no pass
``rollout_func``                         its ``routed_experts`` (TRL hands further fields to the rewards alone)
``vllm_generation.generate``, and the    routes of a vLLM server (rank 0 gets them; every rank needs them) or of a
client's ``_post`` or ``llm.generate``   colocated engine
``vllm_generation._iter_named_params``   correction biases that are buffers go to the engine with the parameters
``_get_per_token_logps_and_entropies``   log-probabilities of the old-policy and the gradient pass
=======================================  ========================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from chronomoe_hf import distributed
from chronomoe_hf.errors import ConfigError
from chronomoe_hf.system import ChronoSystem
from chronomoe_hf.trainer.hooks import Replaced
from chronomoe_hf.wrapping.owner import find_system

LOGPS = "_get_per_token_logps_and_entropies"
SYNC = "_iter_named_params"


def check_replay(trainer: Trainer, system: ChronoSystem) -> None:
    """Raise ConfigError where a Trainer and the settings of replay cannot be had together; the message says why."""
    config = system.config.replay
    if system.config.replay.on and getattr(trainer.args, "torch_compile", False):
        raise ConfigError(
            "replay cannot tell a compiled graph what to choose, nor see what it chose; set torch_compile=False, or "
            "replay.mode='off' and replay.recompute='off'"
        )
    if config.mode == "off":
        return
    args, name = trainer.args, f"replay.mode={config.mode!r}"
    for flag in ("packing", "padding_free"):
        if getattr(args, flag, False):
            raise ConfigError(f"{name}: rows are looked up from their first token on, and {flag}=True joins them")
    if "AsyncGRPO" in type(trainer).__name__:
        raise ConfigError(f"{name}: AsyncGRPO packs rows and stores shared prefixes once, so its rows are no texts")
    parallel = getattr(trainer.accelerator, "parallelism_config", None)
    split = [kind for kind in ("cp", "sp") if getattr(parallel, f"{kind}_size", 1) > 1]
    if split:
        raise ConfigError(f"{name}: {split[0]}_size > 1 splits the tokens of a row over ranks; use data parallelism")
    if getattr(getattr(system.model, "config", None), "vision_config", None) is not None:
        raise ConfigError(
            f"{name}: {type(system.model).__name__} takes images, and rows with equal token ids can mean different "
            "ones; load its text model (AutoModelForCausalLM), or use replay.mode='off'"
        )
    batched = "use_transformers_continuous_batching", "use_transformers_paged"
    if config.mode != "old" and any(getattr(trainer, each, False) or getattr(args, each, False) for each in batched):
        raise ConfigError(f"{name}: continuous batching packs rows of many prompts; use Transformers' plain generate")
    if config.mode == "rollout":
        _check_engine(trainer, system)


def _check_engine(trainer: Trainer, system: ChronoSystem) -> None:
    """What steers must be known to an engine of its own, else it chooses by other rules than the trainer."""
    if not _own_engine(trainer):
        return
    law = system.config.beta.law
    acting = [f"beta.law={law!r}"] if any(layer.takes_beta for layer in system.layers) and law != "none" else []
    if system.lenses:
        acting.append("lens.enabled=True")
    if acting:
        raise ConfigError(
            f"replay.mode='rollout' with {' and '.join(acting)}: the engine knows nothing of what is added "
            "to routers here and would choose by other rules; use ChronoConfig.observe(replay__mode='rollout')"
        )


def _own_engine(trainer: Trainer) -> bool:
    return bool(getattr(trainer, "use_vllm", False)) or getattr(trainer, "rollout_func", None) is not None


class ReplayHooks:
    """What is replaced on one Trainer for replay; nothing while replay is off and no bias has to be sent.

    Args:
        trainer: the Trainer.
        system: of its model.

    Raises:
        ConfigError: see :func:`check_replay`; or the Trainer has no place where a correction bias could be sent.
    """

    def __init__(self, trainer: Trainer, system: ChronoSystem) -> None:
        check_replay(trainer, system)
        self.trainer = trainer
        self.system = system
        self.replaced = Replaced()
        self._posted: list[dict[str, Any]] = []
        generation = getattr(trainer, "vllm_generation", None)
        if generation is not None and self._biases():
            if not hasattr(generation, SYNC):
                raise ConfigError(
                    "the balance law moves a correction bias that is a buffer, and this TRL has no place where it "
                    f"could be sent to vLLM ({SYNC} is gone): the engine would route by the old one; use observe()"
                )
            self.replaced.replace(generation, SYNC, self._with_biases)
        if system.config.replay.mode == "off":
            return
        self.replaced.replace(trainer, LOGPS, self._logps)
        if generation is not None and system.config.replay.mode == "old":
            return  # the engine's own passes are not seen, and not needed
        if generation is not None:
            self._hook_vllm(generation)
        elif getattr(trainer, "rollout_func", None) is not None and system.config.replay.mode != "old":
            self.replaced.replace(trainer, "rollout_func", self._rollout_func)
        else:
            self.replaced.replace(trainer.model, "generate", self._generate)

    def remove(self) -> None:
        """Put everything back."""
        self.replaced.remove()

    # ---- Transformers' generate ------------------------------------------------------------------------------------

    def _generate(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def generate(*args: Any, **kwargs: Any) -> Any:
            model = self.trainer.model
            if model is None or not model.training or self.system.config.replay.mode == "old":
                with self.system.replay.apart():
                    return original(*args, **kwargs)
            config = kwargs.get("generation_config") or getattr(model, "generation_config", None)
            temperature = kwargs.get("temperature", getattr(config, "temperature", None)) or 1.0
            pad = kwargs.get("pad_token_id", getattr(config, "pad_token_id", None))
            with self.system.replay.rollout(float(temperature), pad if isinstance(pad, int) else None) as tape:
                output = original(*args, **kwargs)
                tokens = output if isinstance(output, Tensor) else getattr(output, "sequences", None)
                tape.end(tokens)
            return output

        return generate

    # ---- engines ---------------------------------------------------------------------------------------------------

    def _rollout_func(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def rollout_func(*args: Any, **kwargs: Any) -> Any:
            output = original(*args, **kwargs)
            rows = len(output["completion_ids"])
            routes, logps = output.get("routed_experts") or [None] * rows, output.get("logprobs") or [None] * rows
            for prompt, completion, route, logp in zip(
                output["prompt_ids"], output["completion_ids"], routes, logps, strict=True
            ):
                self._add(list(prompt), list(completion), route, logp)
            return output

        return rollout_func

    def _add(self, prompt: list[int], completion: list[int], routes: Any, logps: Any) -> None:
        chosen = None if logps is None else [_first(each) for each in logps]
        self.system.replay.add([*prompt, *completion], routes, logps=chosen, prompt=len(prompt))

    def _hook_vllm(self, generation: Any) -> None:
        client, engine = getattr(generation, "vllm_client", None), getattr(generation, "llm", None)
        self.replaced.replace(generation, "generate", self._shared)
        if engine is not None:
            self.replaced.replace(engine, "generate", self._collect_outputs)
        elif client is not None:
            if not hasattr(client, "_post"):
                raise ConfigError(
                    "this TRL's vLLM client has no _post, where the routes of a server could be read; give them with "
                    "system.replay.add(tokens, routes), or use replay.mode='old'"
                )
            self.replaced.replace(client, "_post", self._collect_choices)

    def _collect_choices(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def post(*args: Any, **kwargs: Any) -> Any:
            response = original(*args, **kwargs)
            sent = kwargs.get("json") or {}
            for choice in response.get("choices", ()) if isinstance(response, dict) else ():
                prompt = choice.get("prompt_token_ids") or sent.get("token_ids")
                if prompt is not None and "token_ids" in choice:
                    found = {
                        "prompt": prompt,
                        "completion": choice["token_ids"],
                        "routes": choice.get("routed_experts"),
                    }
                    self._posted.append(found)
            return response

        return post

    def _collect_outputs(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def generate(*args: Any, **kwargs: Any) -> Any:
            outputs = original(*args, **kwargs)
            for output in outputs:
                for one in output.outputs:
                    found = {"prompt": list(output.prompt_token_ids), "completion": list(one.token_ids)}
                    self._posted.append({**found, "routes": getattr(one, "routed_experts", None)})
            return outputs

        return generate

    def _shared(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Around ``vllm_generation.generate``, which runs on every rank; a server's answer is on rank 0 alone."""

        def generate(*args: Any, **kwargs: Any) -> Any:
            self._posted = []
            result = original(*args, **kwargs)
            server = getattr(self.trainer.vllm_generation, "llm", None) is None
            posted = distributed.broadcast_object(self._posted) if server else self._posted
            logps = _logps_of(result)
            for each in posted if isinstance(posted, list) else []:
                key = (tuple(each["prompt"]), tuple(each["completion"]))
                self._add(list(each["prompt"]), list(each["completion"]), each["routes"], logps.get(key))
            self._posted = []
            return result

        return generate

    def _biases(self) -> list[tuple[str, Tensor]]:
        """Correction biases that the balance law moves and that are no parameters: name in the state dict, tensor."""
        found = []
        for layer in self.system.layers:
            if layer.native_bias and not layer.bias_is_parameter:
                place = layer.adapter.native_bias_place(layer.router, layer.parent)
                if place is not None:
                    holder, name = place
                    path = layer.name if holder is layer.router else layer.name.rpartition(".")[0]
                    found.append((f"{path}.{name}", getattr(holder, name)))
        return found

    def _with_biases(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def iter_named_params(*args: Any, **kwargs: Any) -> Iterator[tuple[str, Tensor]]:
            yield from original(*args, **kwargs)
            yield from ((name, bias_E.detach()) for name, bias_E in self._biases())

        return iter_named_params

    # ---- log-probabilities -----------------------------------------------------------------------------------------

    def _logps(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def logps_and_entropies(model: Any, input_ids: Any, attention_mask: Any, *args: Any, **kwargs: Any) -> Any:
            result = original(model, input_ids, attention_mask, *args, **kwargs)
            gradient = torch.is_grad_enabled()
            passes = self.system.replay.passes
            ours = isinstance(model, torch.nn.Module) and find_system(model) is self.system
            if ours and self.system.model.training and (gradient or not passes.adapters.elsewhere):
                values = result[0] if isinstance(result, tuple) else result
                if isinstance(values, Tensor) and values.dim() == 2:  # else a TRL of another shape: no numbers
                    self.system.replay.logps(input_ids, attention_mask, values, gradient)
            return result

        return logps_and_entropies


def _first(value: Any) -> float:
    """The log-probability of the sampled token, where an engine lists several a token; NaN where it has none."""
    one = value[0] if isinstance(value, list | tuple) else value
    return float("nan") if one is None else float(one)


def _logps_of(result: Any) -> dict[tuple[tuple[int, ...], tuple[int, ...]], Any]:
    """(prompt, completion) -> log-probabilities, of this rank's rows."""
    if not (isinstance(result, tuple) and len(result) >= 3 and result[2] is not None):
        return {}
    rows = zip(result[0], result[1], result[2], strict=False)
    return {(tuple(prompt), tuple(completion)): logps for prompt, completion, logps in rows}
