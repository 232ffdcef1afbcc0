"""Real text, a tokenizer, and a small pretrained mixture-of-experts model, from nothing but Python's own files.

Prose is the language reference shipped as `pydoc_data.topics`, code is the standard library's own sources. Both are in
every CPython, so the job needs no download. `pretrain_base` trains once on prose and keeps the result in a cache
directory whose name is a hash of everything that went in (model, training, text, library versions).

Legend: E experts, k experts per token.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import shutil
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
import tokenizers
import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Trainer, TrainingArguments
from transformers.models.deepseek_v3 import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.models.mixtral import MixtralConfig, MixtralForCausalLM
from transformers.models.qwen3_moe import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.switch_transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

PAD, BOS, EOS = "<pad>", "<s>", "</s>"
ARCHITECTURES = ("mixtral", "qwen3_moe", "switch_transformers")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSize:
    """Shape of a small model.

    Args:
        layers: transformer blocks (Switch: encoder and decoder blocks in all, half of them sparse).
        hidden: hidden size D.
        intermediate: hidden size of one expert.
        heads: attention heads, also key-value heads.
        experts: E in every MoE layer.
        top_k: k (Switch always uses 1).
        vocab: tokenizer entries, special ones included.
        length: tokens in a block.
    """

    layers: int = 4
    hidden: int = 128
    intermediate: int = 128
    heads: int = 4
    experts: int = 8
    top_k: int = 2
    vocab: int = 2048
    length: int = 128


SIZES = {
    "e8k2": ModelSize(),
    "e32k4": ModelSize(intermediate=64, experts=32, top_k=4),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """How a model is trained: AdamW, linear decay after a short warm-up, `batch` packed blocks a step."""

    steps: int = 300
    batch: int = 16
    learning_rate: float = 1e-3
    warmup_steps: int = 20
    aux_loss: float = 0.02
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class TextDomain:
    """Packed blocks of one domain: `train` and held-out `valid`, columns as `blocks` makes them."""

    train: datasets.Dataset
    valid: datasets.Dataset


# ------------------------------------------------------------------------------------------------------------ text


def load_text(domain: str, *, max_chars: int = 2_000_000) -> datasets.DatasetDict:
    """The documents of a domain, split by document: every tenth one is held out.

    Args:
        domain: ``"prose"`` (language reference topics), ``"code"`` (top-level modules of the standard library) or
            ``"tables"`` (its modules of character encodings: one narrow kind of code).
        max_chars: stop after this many characters.

    Returns:
        DatasetDict with ``train`` and ``valid``, columns ``name`` and ``text``.

    Raises:
        ValueError: unknown domain.
    """
    readers = {"prose": _prose, "code": _code, "tables": _tables}
    if domain not in readers:
        raise ValueError(f"no domain {domain!r}; known: {', '.join(readers)}")
    # Ordered by a hash of the name, so that neighbours in the alphabet fall on both sides.
    documents = sorted(readers[domain](), key=lambda item: hashlib.sha256(item[0].encode()).hexdigest())
    taken: list[tuple[str, str]] = []
    total = 0
    for name, text in documents:
        if total >= max_chars:
            break
        taken.append((name, text))
        total += len(text)
    return datasets.DatasetDict(
        train=_documents([pair for index, pair in enumerate(taken) if index % 10 != 9]),
        valid=_documents([pair for index, pair in enumerate(taken) if index % 10 == 9]),
    )


def _documents(pairs: list[tuple[str, str]]) -> datasets.Dataset:
    string = datasets.Value("string")
    columns = {"name": [name for name, _ in pairs], "text": [text for _, text in pairs]}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(name=string, text=string))


def _prose() -> Iterator[tuple[str, str]]:
    from pydoc_data.topics import topics

    yield from topics.items()


def _code() -> Iterator[tuple[str, str]]:
    for path in Path(sysconfig.get_paths()["stdlib"]).glob("*.py"):
        yield path.name, path.read_text(encoding="utf-8", errors="replace")


def _tables() -> Iterator[tuple[str, str]]:
    for path in Path(sysconfig.get_paths()["stdlib"]).glob("encodings/*.py"):
        yield path.name, path.read_text(encoding="utf-8", errors="replace")


def text_digest(texts: Iterable[str]) -> str:
    """SHA-256 over the texts: two Python versions ship different words, and their caches must differ."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode())
        digest.update(b"\0")
    return digest.hexdigest()


def build_tokenizer(texts: Iterable[str], vocab: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of `vocab` entries trained on `texts`; the same texts give the same tokenizer."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, bos_token=BOS, eos_token=EOS)


def blocks(
    documents: datasets.Dataset, tokenizer: PreTrainedTokenizerFast, length: int, *, seq2seq: bool = False
) -> datasets.Dataset:
    """Packed blocks: documents joined by the end-of-sequence token and cut, the short tail dropped.

    Args:
        documents: column ``text``.
        tokenizer: from `build_tokenizer`.
        length: tokens in a block.
        seq2seq: read the first half of a block, write the second.

    Returns:
        Columns ``input_ids`` and ``labels``: [length] each, or [length / 2] each with `seq2seq`.
    """
    stream: list[int] = []
    for text in documents["text"]:
        stream.extend(tokenizer(text)["input_ids"])
        stream.append(tokenizer.eos_token_id)
    cuts = [stream[start : start + length] for start in range(0, len(stream) - length + 1, length)]
    half = length // 2
    rows = {
        "input_ids": [cut[:half] if seq2seq else cut for cut in cuts],
        "labels": [cut[half:] if seq2seq else cut for cut in cuts],
    }
    return datasets.Dataset.from_dict(rows)


def load_domain(
    domain: str, tokenizer: PreTrainedTokenizerFast, size: ModelSize, arch: str, *, max_chars: int = 2_000_000
) -> TextDomain:
    """`load_text` and `blocks` together, in the layout that `arch` trains on."""
    documents = load_text(domain, max_chars=max_chars)
    seq2seq = arch == "switch_transformers"
    parts = {name: blocks(documents[name], tokenizer, size.length, seq2seq=seq2seq) for name in ("train", "valid")}
    return TextDomain(**parts)


# ----------------------------------------------------------------------------------------------------------- model


def build_model(arch: str, size: ModelSize, *, aux_loss: float = 0.02, seed: int = 0) -> PreTrainedModel:
    """A fresh model of `arch`; the auxiliary loss is on (Transformers adds it while `output_router_logits` is set)."""
    common: dict[str, Any] = {
        "vocab_size": size.vocab,
        "num_hidden_layers": size.layers,
        "hidden_size": size.hidden,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.heads,
        "head_dim": size.hidden // size.heads,
        "max_position_embeddings": 4 * size.length,
        "num_experts_per_tok": size.top_k,
        "output_router_logits": True,
        "router_aux_loss_coef": aux_loss,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(seed)
    if arch == "mixtral":
        return MixtralForCausalLM(
            MixtralConfig(**common, intermediate_size=size.intermediate, num_local_experts=size.experts)
        )
    if arch == "qwen3_moe":
        return Qwen3MoeForCausalLM(
            Qwen3MoeConfig(
                **common, moe_intermediate_size=size.intermediate, num_experts=size.experts, norm_topk_prob=True
            )
        )
    if arch == "deepseek_v3":
        return DeepseekV3ForCausalLM(_deepseek_config(size, common))
    if arch == "switch_transformers":
        return SwitchTransformersForConditionalGeneration(_switch_config(size, aux_loss))
    raise ValueError(f"no architecture {arch!r}; known: {', '.join(ARCHITECTURES)}")


def _deepseek_config(size: ModelSize, common: dict[str, Any]) -> DeepseekV3Config:
    """Sigmoid routing in four groups of which two may be chosen from, one shared expert, every block sparse."""
    head = size.hidden // size.heads
    fields = {name: value for name, value in common.items() if not name.startswith(("output_router", "router_aux"))}
    return DeepseekV3Config(
        **{**fields, "head_dim": head // 2},
        moe_intermediate_size=size.intermediate,
        n_routed_experts=size.experts,
        n_shared_experts=1,
        n_group=4,
        topk_group=2,
        norm_topk_prob=True,
        routed_scaling_factor=1.0,
        first_k_dense_replace=0,
        q_lora_rank=None,
        kv_lora_rank=size.hidden // 4,
        qk_nope_head_dim=head // 2,
        qk_rope_head_dim=head // 2,
        v_head_dim=head,
    )


def _switch_config(size: ModelSize, aux_loss: float) -> SwitchTransformersConfig:
    """Half of the blocks sparse; an expert may take 1.5 times its fair share of a sequence, the rest is dropped."""
    return SwitchTransformersConfig(
        vocab_size=size.vocab,
        d_model=size.hidden,
        d_kv=size.hidden // size.heads,
        d_ff=size.intermediate,
        num_heads=size.heads,
        num_layers=size.layers,
        num_decoder_layers=size.layers,
        num_sparse_encoder_layers=size.layers // 2,
        num_sparse_decoder_layers=size.layers // 2,
        num_experts=size.experts,
        expert_capacity=max(1, round(1.5 * size.length / 2 / size.experts)),
        dropout_rate=0.0,
        router_aux_loss_coef=aux_loss,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=2,
    )


def training_arguments(training: Training, output_dir: str | Path, **overrides: Any) -> TrainingArguments:
    """Trainer's arguments for `training`; nothing is saved on the way and no reporter is on unless overridden."""
    arguments: dict[str, Any] = {
        "output_dir": str(output_dir),
        "max_steps": training.steps,
        "per_device_train_batch_size": training.batch,
        "per_device_eval_batch_size": 2 * training.batch,
        "learning_rate": training.learning_rate,
        "warmup_steps": training.warmup_steps,
        "weight_decay": 0.01,
        "lr_scheduler_type": "linear",
        "logging_steps": 50,
        "save_strategy": "no",
        "report_to": "none",
        "seed": training.seed,
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    return TrainingArguments(**{**arguments, **overrides})


# ----------------------------------------------------------------------------------------------------------- cache


def cache_root() -> Path:
    """Where pretrained models are kept: ``$XDG_CACHE_HOME/chronomoe_hf``, or ``.cache`` beside this project."""
    base = os.environ.get("XDG_CACHE_HOME")
    return Path(base) / "chronomoe_hf" if base else Path(__file__).resolve().parent.parent / ".cache"


def cache_key(arch: str, size: ModelSize, training: Training, digest: str) -> str:
    """A name for the result of `pretrain_base`: 16 hex digits over everything that decides it."""
    recipe = {
        "arch": arch,
        "size": dataclasses.asdict(size),
        "training": dataclasses.asdict(training),
        "text": digest,
        "versions": [torch.__version__, transformers.__version__, tokenizers.__version__, platform.python_version()],
    }
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]


def pretrain_base(
    arch: str = "mixtral",
    size: ModelSize = SIZES["e8k2"],
    training: Training = Training(),
    *,
    domain: str = "prose",
    root: Path | None = None,
) -> Path:
    """Train `arch` on `domain`, or return the directory where the same training was left before.

    The tokenizer reads both domains, so that code is not spelled in bytes later.

    Args:
        arch: one of `ARCHITECTURES`.
        size: shape of the model.
        training: optimizer steps and their settings.
        domain: what it is trained on.
        root: cache directory, `cache_root()` if None.

    Returns:
        A directory for ``from_pretrained`` (model and tokenizer).
    """
    texts = [*load_text("prose")["train"]["text"], *load_text("code", max_chars=500_000)["train"]["text"]]
    documents = load_text(domain)["train"]["text"]
    key = cache_key(arch, size, training, text_digest([domain, *texts, *documents]))
    final = (root or cache_root()) / f"{arch}-{domain}-{key}"
    if (final / "config.json").is_file():
        return final
    final.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{final.name}-", dir=final.parent))
    try:
        tokenizer = build_tokenizer(texts, size.vocab)
        text = load_domain(domain, tokenizer, size, arch)
        model = build_model(arch, size, aux_loss=training.aux_loss, seed=training.seed)
        trainer = Trainer(model, training_arguments(training, scratch / "run"), train_dataset=text.train)
        trainer.train()
        model.save_pretrained(scratch / "model")
        tokenizer.save_pretrained(scratch / "model")
        # A rename is atomic: a run that is stopped half-way leaves no cache entry that looks finished.
        if not final.exists():
            (scratch / "model").rename(final)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return final
