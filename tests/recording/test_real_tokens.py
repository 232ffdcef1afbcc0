"""Which rows are real tokens: masks of every shape, labels of a decoder, positions, and pad tokens."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from support import models as tiny
from support import moe_zoo
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask

import chronomoe_hf
from chronomoe_hf import ChronoConfig, system_of, wrap
from chronomoe_hf.recording.rows import DECODER_LABELS, PadToken, real_tokens

PAD = PadToken(0)
IDS = torch.ones(2, 3, dtype=torch.long)
MASK = torch.tensor([[1, 1, 0], [0, 1, 1]])


def flags(text: str) -> torch.Tensor:
    return torch.tensor([c == "1" for c in text])


def told(named: dict[str, Any], pad: PadToken = PAD) -> torch.Tensor | None:
    """The mask, of arguments that say it all."""
    mask, note = real_tokens(named, pad)
    assert note is None
    return mask


def test_a_two_dimensional_mask_wins() -> None:
    assert torch.equal(told({"input_ids": IDS, "attention_mask": MASK}), flags("110011"))
    wide = torch.cat([torch.zeros(2, 4), MASK], dim=1)
    assert torch.equal(told({"input_ids": IDS, "attention_mask": wide}), flags("110011"))
    assert torch.equal(told({"inputs_embeds": torch.zeros(2, 3, 8), "attention_mask": MASK}), flags("110011"))
    zeros = torch.zeros_like(IDS)
    assert torch.equal(told({"input_ids": zeros, "attention_mask": MASK}), flags("110011")), "also over pad tokens"


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("side", ["left", "right", "none", "both rows"])
@pytest.mark.parametrize("make", [create_causal_mask, create_bidirectional_mask], ids=["causal", "bidirectional"])
def test_a_mask_made_by_the_library_is_reduced_to_the_one_it_was_made_of(
    make: Any, side: str, implementation: str
) -> None:
    """eager: additive floats; sdpa: bool, with the rows of left padding opened to every key."""
    length = 6
    rows = {
        "left": [[0, 0, 1, 1, 1, 1], [1] * 6],
        "right": [[1, 1, 1, 0, 0, 0], [1] * 6],
        "none": [[1] * 6, [1] * 6],
        "both rows": [[0, 0, 0, 0, 1, 1], [1, 1, 1, 1, 1, 0]],
    }[side]
    mask = torch.tensor(rows)
    config = copy.deepcopy(tiny.tiny_config("mixtral"))
    config._attn_implementation = implementation
    arguments: dict[str, Any] = {"config": config, "inputs_embeds": torch.zeros(2, length, 32), "attention_mask": mask}
    if make is create_causal_mask:
        arguments |= {"past_key_values": None, "allow_is_causal_skip": False}
    made = make(**arguments)
    if made is None:
        pytest.skip("the library makes no mask where nothing is padded")
    assert made.dim() == 4 and made.is_floating_point() == (implementation == "eager")
    got = told({"inputs_embeds": torch.zeros(2, length, 32), "attention_mask": made})
    assert torch.equal(got, mask.flatten().bool())
    assert torch.equal(told({"inputs_embeds": torch.zeros(2, length, 8), "attention_mask": made[:, 0]}), got)
    by_kind = {"sliding_attention": made, "full_attention": made}
    assert torch.equal(told({"inputs_embeds": torch.zeros(2, length, 8), "attention_mask": by_kind}), got)


def test_a_mask_of_keys_alone_says_it_too() -> None:
    keys = MASK[:, None, None]
    assert torch.equal(told({"input_ids": IDS, "attention_mask": keys}), flags("110011"))
    additive = torch.zeros(2, 1, 1, 3).masked_fill(keys == 0, torch.finfo(torch.float).min)
    assert torch.equal(told({"input_ids": IDS, "attention_mask": additive}), flags("110011"))


def test_documents_packed_in_a_block_mask_are_all_real() -> None:
    document = torch.tensor([0, 0, 0, 1, 1, 2])
    seen = (document[:, None] == document[None]) & torch.ones(6, 6).tril().bool()
    assert torch.equal(told({"input_ids": torch.ones(2, 6), "attention_mask": seen[None, None]}), flags("1" * 12))


@pytest.mark.parametrize(
    ("mask", "says"),
    [
        (torch.ones(2, 1, 3, 9), r"\(2, 1, 3, 9\)"),
        (MASK[:, :2], r"\(2, 2\)"),
        (torch.ones(4, 3), r"\(4, 3\)"),
        (object(), "object"),
    ],
    ids=["static cache", "too short", "other rows", "unknown type"],
)
def test_a_mask_that_cannot_be_aligned_is_said_to_be_so(mask: Any, says: str) -> None:
    import re

    got, note = real_tokens({"input_ids": IDS, "attention_mask": mask}, PAD)
    assert got is None and note is not None
    assert re.search(f"padding is counted as real tokens.*{says}.*2-D attention_mask", note)


def test_the_labels_of_a_decoder_end_its_rows() -> None:
    labels = torch.tensor([[5, -100, 7, -100], [6, -100, -100, -100]])
    named = {"input_ids": torch.tensor([[0, 5, 0, 7], [0, 6, 0, 0]]), DECODER_LABELS: labels}
    assert torch.equal(told(named), flags("11101000")), "what is left out of the loss inside a row is a token"
    assert torch.equal(told(named | {"attention_mask": torch.ones(2, 4)}), flags("1" * 8)), "a mask wins"
    other = named | {DECODER_LABELS: labels[:, :2]}
    assert torch.equal(told(other, PadToken(0, begins=True)), flags("11111100")), "labels of another length do not fit"


@pytest.mark.parametrize("family", ["switch_transformers", "nllb_moe"])
def test_decoder_padding_is_left_out_as_a_seq2seq_collator_gives_it(family: str) -> None:
    model = tiny.tiny_model(family, expert_capacity=64) if family in tiny.FAMILIES else moe_zoo.build(family).train()
    chronomoe_hf.wrap(model, ChronoConfig.observe(interval=1))
    system = chronomoe_hf.system_of(model)
    labels = torch.full((4, 20), -100)
    labels[0] = 7
    labels[1:, :2] = 7
    batch = {"input_ids": torch.full((4, 5), 9), "attention_mask": torch.ones(4, 5), "labels": labels}
    batch["attention_mask"][0, 3:] = 0

    def tokens(step: int, **more: Any) -> set[int]:
        model(**(batch | more))
        snapshot = system.step(step)
        layers = {("decoder" in layer.layer_name): layer.tokens for layer in snapshot.layers}
        assert layers[False] == 18 and not [note for note in snapshot.notes if "padding" in note]
        return {layer.tokens for layer in snapshot.layers if "decoder" in layer.layer_name}

    assert tokens(1) == {26}
    assert tokens(2, decoder_attention_mask=torch.ones(4, 20)) == {80}, "an explicit mask wins"
    shifted = model.prepare_decoder_input_ids_from_labels(labels) if hasattr(model, "_shift_right") else None
    if shifted is not None:  # label smoothing takes the labels away; the ids then hold one more: the last label
        assert tokens(3, decoder_input_ids=shifted, labels=None) == {20 + 3 * 3}
    assert tokens(4, labels=torch.full((4, 20), 7)) == {80}, "the labels of the last batch are forgotten"
    chronomoe_hf.unwrap(model)
    assert not any("chrono" in key for module in model.modules() for key in module.__dict__)


def test_padding_free_batches_are_read_by_their_positions() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 0, 0]])
    padded = torch.tensor([[5, 6, 7, 8, 9, 3, 3, 3]])
    three = PadToken(3)
    assert torch.equal(told({"input_ids": padded, "position_ids": positions}, three), flags("11111000"))
    # The first trailing zero may be a one-token document: its token id tells.
    document = torch.tensor([[5, 6, 7, 8, 9, 4, 3, 3]])
    assert torch.equal(told({"input_ids": document, "position_ids": positions}, three), flags("11111100"))
    plain = torch.arange(8)[None]
    assert torch.equal(told({"input_ids": padded, "position_ids": plain}, three), flags("11111111"))
    embeds = torch.zeros(1, 8, 4)
    assert torch.equal(told({"inputs_embeds": embeds, "position_ids": positions}, PadToken()), flags("11111000"))


@pytest.mark.parametrize(
    ("pad", "want"),
    [
        (PadToken(0), "001011111100000000"),
        (PadToken(0, ends=True), "001011111110000000"),
        (PadToken(0, begins=True), "011011111100000000"),
        (PadToken(), None),
    ],
    ids=["own token", "also ends texts", "also begins texts", "unknown"],
)
def test_runs_of_the_pad_token_around_a_text_are_padding(pad: PadToken, want: str | None) -> None:
    """Without a mask. A pad token inside a text is part of it."""
    ids = torch.tensor([[0, 0, 5, 0, 6, 7], [5, 6, 7, 8, 0, 0], [0, 0, 0, 0, 0, 0]])
    expected = None if want is None else flags(want.replace("001011", "001111").replace("011011", "011111"))
    got = told({"input_ids": ids}, pad)
    assert got is None if expected is None else torch.equal(got, expected)


def test_the_pad_token_of_a_config() -> None:
    class Config:
        pad_token_id, bos_token_id, eos_token_id = 2, 1, [5, 2]

    assert PadToken.of(Config()) == PadToken(2, begins=False, ends=True)
    assert PadToken.of(tiny.tiny_config("switch_transformers")) == PadToken(0, begins=True, ends=False)
    assert PadToken.of(tiny.tiny_config("mixtral")) == PadToken() == PadToken.of(None)


def test_a_model_without_a_mask_leaves_its_pad_runs_out_and_says_nothing() -> None:
    model = tiny.tiny_model("mixtral", pad_token_id=0)
    chronomoe_hf.wrap(model, ChronoConfig.observe(interval=1))
    batch = tiny.tiny_batch("mixtral", padded=True)
    model(input_ids=batch["input_ids"])
    snapshot = chronomoe_hf.system_of(model).step(1)
    assert [layer.tokens for layer in snapshot.layers] == [58, 58]
    assert not snapshot.notes


def test_padding_that_is_counted_is_named_on_the_layer() -> None:
    model = tiny.tiny_model("mixtral")
    chronomoe_hf.wrap(model, ChronoConfig.observe(interval=1))
    system = chronomoe_hf.system_of(model)
    batch = tiny.tiny_batch("mixtral")
    square = torch.ones(1, 1, 16, 16).tril().bool().expand(4, 1, 16, 16).clone()
    square[0, :, :, 10:] = False
    model(input_ids=batch["input_ids"], attention_mask=square)
    snapshot = system.step(1)
    assert [layer.tokens for layer in snapshot.layers] == [58, 58] and not snapshot.notes
    # Four tokens in the cache: which of the 20 keys the 16 rows are, a 4-D mask does not say.
    past = model(input_ids=batch["input_ids"][:, :4], use_cache=True).past_key_values
    system.step(2)
    mask = torch.ones(4, 1, 16, 20).tril(diagonal=4).bool()
    model(input_ids=batch["input_ids"], attention_mask=mask, past_key_values=past)
    snapshot = system.step(3)
    assert [layer.tokens for layer in snapshot.layers] == [64, 64]
    assert all("padding is counted as real tokens" in " ".join(layer.notes) for layer in snapshot.layers)


# ---- a language model inside one for images -------------------------------------------------------------------------


def vision_model(**text: Any) -> Any:
    fields = {
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 64,
        "moe_intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "pad_token_id": 0,
        "rope_parameters": {"mrope_section": [1, 1, 2], "rope_type": "default", "rope_theta": 1e4},
    }
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
    config = transformers.Qwen3VLMoeConfig(
        text_config={**fields, **text},
        vision_config={**vision, "patch_size": 4, "deepstack_visual_indexes": [0]},
        image_token_id=120,
        video_token_id=121,
        vision_start_token_id=122,
        vision_end_token_id=123,
    )
    torch.manual_seed(0)
    return wrap(transformers.Qwen3VLMoeForConditionalGeneration(config), ChronoConfig.observe(interval=1)).train()


def seen(model: Any, step: int, **batch: Any) -> Any:
    model(**batch)
    return system_of(model).step(step).layers[0]


def padded_rows() -> torch.Tensor:
    ids = torch.randint(4, 100, (2, 16), generator=torch.Generator().manual_seed(0))
    ids[0, 12:], ids[1, 10:] = 0, 0
    return ids


def test_ids_of_the_model_around_tell_the_padding() -> None:
    model, ids = vision_model(), padded_rows()
    assert seen(model, 1, input_ids=ids, attention_mask=(ids != 0).long()).tokens == 22
    assert seen(model, 2, input_ids=ids).tokens == 22
    assert seen(model, 3, input_ids=ids, labels=ids).tokens == 22
    assert seen(model, 4, input_ids=ids[:1]).tokens == 12  # positions that the model makes itself only count up
    model.model(input_ids=ids)  # the model without its head
    assert system_of(model).step(5).layers[0].tokens == 22


@pytest.mark.parametrize("axes", [3, 4])
def test_positions_of_several_axes_mark_the_tail(axes: int) -> None:
    model = vision_model()
    row = torch.cat([padded_rows()[0], torch.zeros(6, dtype=torch.long)])[None]
    flat = torch.cat([torch.arange(8), torch.arange(4), torch.zeros(10, dtype=torch.long)])
    assert seen(model, 1, input_ids=row, position_ids=flat[None]).tokens == 12
    assert seen(model, 2, input_ids=row, position_ids=flat[None, None].expand(axes, 1, -1)).tokens == 12


def test_embeddings_alone_are_named() -> None:
    model, ids = vision_model(), padded_rows()
    embeds = model.get_input_embeddings()(ids).detach()
    layer = seen(model, 1, inputs_embeds=embeds)
    assert layer.tokens == 32 and any("neither ids nor a mask" in note for note in layer.notes)
    masked = seen(vision_model(), 1, inputs_embeds=embeds, attention_mask=(ids != 0).long())
    assert masked.tokens == 22 and not [note for note in masked.notes if "padding" in note]
    unknown = seen(vision_model(pad_token_id=None), 1, inputs_embeds=embeds)
    assert unknown.tokens == 32 and not [note for note in unknown.notes if "padding" in note]
