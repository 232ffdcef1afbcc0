"""What each alert and each state of a run means, where it comes from, and what to do: one row each, in one table.

The report's verdict, docs/alerts.md and nothing else say these things; a test compares the docs with this table and
evaluates every config line.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["act", "watch", "fine"]
LEVELS: tuple[Level, ...] = ("act", "watch", "fine")  # worst first


@dataclass(frozen=True)
class Rule:
    """One row.

    Args:
        level: ``"act"`` (do something now), ``"watch"`` (look again after some windows) or ``"fine"``.
        title: in a few words, for the verdict.
        meaning: what it says about the run.
        cause: where it usually comes from.
        advice: what to do next.
        config: the line to write, an expression on the names of ``chronomoe_hf.config``; empty where no setting helps.
    """

    level: Level
    title: str
    meaning: str
    cause: str
    advice: str
    config: str = ""


ALERTS: dict[str, Rule] = {
    "PRE_COLLAPSE": Rule(
        "act",
        "routing is concentrating",
        "For three windows or more a layer has used fewer than 60 % of its experts effectively, or two experts have "
        "taken more than 75 % of what they can take, and it is worse than at the baseline beyond chance. "
        "The same level without that movement is AS_IT_CAME below.",
        "A high learning rate, a switched-off auxiliary loss, or data that became narrower.",
        "Resume from the last checkpoint before the alert with a selection bias that evens the load; it can cost a "
        "little loss, so compare. A lower learning rate slows the movement down instead; lowered for the router alone "
        "it may change nothing, because what the router reads moves too.",
        "ChronoConfig.balance()",
    ),
    "COLLAPSE_CONFIRMED": Rule(
        "act",
        "a layer has collapsed",
        "For five windows or more a layer has had dead experts and two experts have taken more than 85 % of what they "
        "can take, and it is worse than at the baseline.",
        "PRE_COLLAPSE that went on. Dead experts get no gradient, so they do not come back by themselves.",
        "Resume from the last checkpoint before the alert with balancing on; going on from here trains a smaller model "
        "than the one you loaded.",
        "ChronoConfig.balance()",
    ),
    "DRIFT": Rule(
        "watch",
        "routing has moved away from this run's start",
        "For three windows or more the effective number of experts has been below 80 % of the run's baseline, by more "
        "than chance explains.",
        "The data changed (a new domain or language), or the router is still adapting to the task.",
        "Look at the evaluation loss beside it: if it falls, this is specialisation and nothing needs doing. If it "
        "rises, resume from a checkpoint before it with balancing on.",
        "ChronoConfig.balance()",
    ),
    "NOT_OBSERVED": Rule(
        "act",
        "a layer was not seen",
        "The router of a wrapped layer was not called in a window, so there are no numbers about it.",
        "Another model object is being trained than the one that was wrapped, a kernel replaces the whole block "
        "(use_kernels), an adapter copied the router after wrap(), or no batch reached the layer.",
        "Wrap the model that trains, after adapters have been added, and before Trainer is built; `chronomoe inspect` "
        "lists the layers that can be seen.",
    ),
    "NON_FINITE": Rule(
        "act",
        "NaN or infinite router logits",
        "Some tokens had NaN or infinite router logits. They are left out of every statistic, not out of training.",
        "Overflow in fp16, a diverging loss, or broken input rows.",
        "Train in bf16 or lower the learning rate; find the batch at the step named in the alert. Resume from a "
        "checkpoint before it: weights may already be NaN.",
    ),
    "RESUME_MISMATCH": Rule(
        "act",
        "resumed weights were not those of the checkpoint",
        "When training resumed, router or expert weights differed from the fingerprint saved in the checkpoint.",
        "Trainer of Transformers 5 does not restore the fused experts of many families on resume.",
        "The default repairs the weights from the checkpoint's files and says so. If this alert is still in force, "
        "stop: load the model with from_pretrained(checkpoint) and resume again.",
        'ChronoConfig(checkpoint=CheckpointConfig(repair="repair"))',
    ),
    "ROUTING_MISMATCH": Rule(
        "act",
        "rollout and trainer choose other experts, and it shows",
        "For two windows or more, two passes of the same tokens chose other experts and the k3 KL between them was "
        "above the limit: the importance ratio is then not of the policy that sampled.",
        "An engine with other kernels or another precision, an engine with older weights than the trainer (a weight "
        "sync that is missing: mismatch and k3 then grow from window to window), or several optimizer steps on one "
        "batch.",
        "Make sure that the engine gets the weights after every optimizer step. Repeat the recorded choices: those of "
        "the old-policy pass where only the weights move, those of the engine where the engine differs. On-policy, an "
        "importance correction alone may be enough: measure both.",
        'ChronoConfig.observe(replay__mode="rollout")',
    ),
    "REPLAY_UNCOVERED": Rule(
        "watch",
        "many tokens have no recorded choice",
        "Fewer tokens than min_coverage of the passes that need a record had one; the others chose for themselves.",
        "Texts that were edited after the rollout, an engine that hands out a part, or records that went because of "
        "max_bytes. The alert says which.",
        "Keep what is trained on equal to what was sampled; raise max_bytes if records were dropped.",
        "ChronoConfig.observe(replay=ReplayConfig(max_bytes=8 * 2**30))",
    ),
    "REPLAY_INVALID": Rule(
        "act",
        "an engine's routes cannot be choices",
        "Routes of an engine were missing, all zero, out of range or of other tokens, and were not repeated.",
        "A kernel that does not report its routes (vLLM issue 54730), a cache that loses them, another model.",
        "Start vLLM with --enable-return-routed-experts --moe-backend triton and prefix caching on; check that engine "
        "and trainer hold the same checkpoint.",
    ),
    "REPLAY_IDLE": Rule(
        "act",
        "replay is on and repeats nothing",
        "No gradient pass found a recorded choice, or none was seen at all (a compiled model).",
        "TRL runs no old-policy pass where every batch is used for one optimizer step; or an engine is silent.",
        "Follow the alert: num_iterations=2 or a larger steps_per_generation for mode old, routes for mode rollout.",
    ),
    "RECORDING_FAILED": Rule(
        "watch",
        "recording failed in a layer",
        "A part of chronomoe_hf raised an error in a layer's forward. Recording is off there from that step on; the "
        "model and its training are not affected.",
        "A fault of chronomoe_hf, or a module that it does not know (a kernel, a quantised weight). The alert names "
        "the error; the log of the process has the traceback.",
        "Please report it with the traceback. Numbers of other layers hold; numbers of this one end at that step.",
    ),
}

STATES: dict[str, Rule] = {
    "DIED": Rule(
        "act",
        "experts died in this run",
        "Experts that worked at the baseline have had no token for three windows or more, in which the baseline's "
        "share would have brought them at least 100.",
        "Routing that concentrates. An expert without tokens gets no gradient, so it does not come back by itself.",
        "Resume from the last checkpoint before they fell silent with balancing on.",
        "ChronoConfig.balance()",
    ),
    "UNFOLDED": Rule(
        "watch",
        "other software routes this model differently",
        "The routing bias of this run has no place in the weights of this family: without chronomoe_hf, in a plain "
        "server for example, some tokens go to other experts than those that the weights were trained for. Above 10 % "
        "of a layer's tokens the row is red and the run is at least 'watch'; it is never 'act' for this alone. At a "
        "learning rate of 0 no weight was trained for any routing, so nothing depends on it.",
        "A preset that moves a bias, on a family without a bias of its own.",
        "Keep the model wrapped where it is used, `wrap(model, state=checkpoint)`, or train the last part of the run "
        "without steering.",
        "ChronoConfig.observe()",
    ),
    "EMPTY": Rule(
        "watch",
        "no window yet",
        "The run has not closed a telemetry window, so there is nothing to judge.",
        "The run was killed before its first window closed, or `interval` is larger than the run is long.",
        "Leave `interval` out: a window is then a twentieth of the run.",
        "ChronoConfig(interval=None)",
    ),
    "ONE_WINDOW": Rule(
        "watch",
        "one window: no alert can be raised",
        "The run closed one window, which is its baseline: nothing can have changed since then, and an alert needs at "
        "least three windows.",
        "`interval` is as large as the run is long, or the run has just begun.",
        "Leave `interval` out: a window is then a twentieth of the run.",
        "ChronoConfig(interval=None)",
    ),
    "INSUFFICIENT": Rule(
        "watch",
        "too little evidence",
        "No window held enough assignments per expert to judge these layers; they raise no alert.",
        "Small batches, short windows, or many experts.",
        "Close windows less often, so that each holds more tokens.",
        "ChronoConfig(interval=500)",
    ),
    "CEILING": Rule(
        "watch",
        "the load moved towards its worst case",
        "In some layer the busiest expert gets more than three quarters of what it can get at most (E/k - 1), and more "
        "than at the baseline.",
        "A few experts serve nearly every token.",
        "Balance the load; on more than one GPU this layer also decides how long a step takes.",
        "ChronoConfig.balance()",
    ),
    "AS_IT_CAME": Rule(
        "fine",
        "part of the experts does the work, as the model came",
        "Below a level that an alert names (60 % of the experts in effective use, two experts with more than 75 % of "
        "what they can take), and so it was at the baseline: training has not changed that.",
        "The model was trained on more kinds of text than this data holds, or it was never balanced.",
        "Nothing. If you want a smaller model for this data, `chronomoe plan` says which experts it would keep.",
    ),
    "DEAD": Rule(
        "fine",
        "experts without a token",
        "Some experts have received no token; in a run, they had none or hardly one at the baseline already.",
        "The model came with them, or this data does not reach them.",
        "Nothing, or a smaller model: `chronomoe plan` drops them first, and `chronomoe measure` says what that costs.",
    ),
    "HARM_BACKOFF": Rule(
        "fine",
        "the lens was taken back",
        "The controller opened a lens, the routing got more concentrated after it, and the lens was closed again.",
        "The layer concentrates for a reason that moving the router's input does not reach.",
        "Use balancing for this model; the lens is not the right tool for it.",
        "ChronoConfig.balance()",
    ),
    "LENS_UNFIT": Rule(
        "fine",
        "the router input was left alone",
        "The controller wanted to act in some layers, but moving their router's input would have moved tokens "
        "unevenly: nothing was done there.",
        "The router's inputs have no common direction that a low-rank shift could use.",
        "Nothing where the layer is as it came. Balancing needs no such direction.",
        "ChronoConfig.balance()",
    ),
    "IDLE": Rule(
        "fine",
        "experts with little to do from beginning to end",
        "Some experts got less than half their fair share of the tokens in the first window and in the last.",
        "Fewer experts per token than in pretraining, or text unlike that of pretraining: the router does not ask for "
        "them, and an expert learns only from the tokens that it gets.",
        "Where all weights are trained, start once more with `revive` and compare the loss: it makes idle experts "
        "copies of busy ones before the first step. It writes weights, and gained in most of the settings that were "
        "measured, not in all (Governance in the docs).",
        "ChronoConfig.revive()",
    ),
    "IDLE_ADAPTER": Rule(
        "fine",
        "experts with little to do from beginning to end",
        "Some experts got less than half their fair share of the tokens in the first window and in the last.",
        "Text unlike that of pretraining: the router does not ask for them.",
        "Nothing, while an adapter trains: the weights of experts stay as they are. A selection bias would move the "
        "load to them, at the price of some loss.",
        "ChronoConfig.balance()",
    ),
    "OBSERVED_ONLY": Rule(
        "fine",
        "watched, not governed",
        "Nothing acted on the routing: outputs are those of the model without chronomoe_hf.",
        "The preset `observe`, or a governing preset that had no reason to act.",
        "Nothing. To let the library act, choose a preset that does.",
        "ChronoConfig.protect()",
    ),
    "GOVERNED": Rule(
        "fine",
        "the routing was governed",
        "A bias or a lens acted on the routing in this run.",
        "The preset.",
        "Keep the `chronomoe` folder with the checkpoint. Before serving elsewhere, fold what folds into the weights: "
        "`unwrap(model, fold=True)` says how much the routing differs without it.",
    ),
    "PROFILE": Rule(
        "fine",
        "a profile: sums over all its text",
        "Text went through the model in evaluation mode. Nothing was trained, so there is nothing to alert about.",
        "`chronomoe profile`.",
        "`chronomoe plan` makes a smaller model for this text. After training, profile again and set the two side by "
        "side with `chronomoe report AFTER --against BEFORE`.",
    ),
    "REVIVED": Rule(
        "fine",
        "idle experts were rewritten",
        "Before the first step, idle experts became copies of busy ones.",
        "The preset `revive`, which says so in its name.",
        "Compare the loss with a run under `observe`. If some idle again, look at the load.",
        "ChronoConfig.revive()",
    ),
    "CLEARED": Rule(
        "fine",
        "alerts that are over",
        "Alerts were raised in this run and cleared again.",
        "A change of data or of the learning rate, or the governor's doing.",
        "Look at the timeline for what happened beside them.",
    ),
    "CANDIDATES": Rule(
        "fine",
        "experts that could go",
        "The dry run holds a confirmed case against some experts. No weight was touched.",
        "Few tokens in the whole run, or outputs that agree little with the rest of the layer.",
        "Measure before believing: plan a cut and look at the loss on held-out text. phi and token counts are "
        "evidence; the loss decides.",
    ),
    "BROKEN_RECORDS": Rule(
        "watch",
        "records were skipped",
        "Some lines of the record files could not be read and were left out.",
        "A process killed while writing leaves one half line; more than one or two mean a full disk or damaged files.",
        "`chronomoe validate` names every one.",
    ),
    "NEWER_RECORDS": Rule(
        "watch",
        "records of a newer version",
        "A newer chronomoe_hf has written these records. What this version knows of them is shown, no more.",
        "The run was made with another version than the one that reads it.",
        "Read it with the version that wrote it, or a later one: `pip install -U chronomoe_hf`.",
    ),
    "HEALTHY": Rule(
        "fine",
        "the routing is healthy",
        "No layer has become more concentrated than at the baseline, and no expert has died.",
        "Training does not concentrate the routing.",
        "Nothing.",
    ),
}

# Why a lens stayed closed, in words.
REASONS = {
    "no_pressure": "the layer was balanced enough",
    "harm_backoff": "opening it had made things worse",
    "insufficient_evidence": "the window held too few tokens",
    "lens_unsupported": "this router takes no lens",
    "lens_unfit": "moving the router input would have scattered the tokens",
}
