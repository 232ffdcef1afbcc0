"""Trainer's resume drops experts (huggingface/transformers#48805): the fingerprint sees it, the repair is exact."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models import tiny_batch, tiny_model
from torch import Tensor, nn

from chronomoe_hf.checkpoint.fingerprint import compare_fingerprints, fingerprint, repair_weights
from chronomoe_hf.errors import StateCorruptError, StateError, StateMismatchError, StateMissingError

# The families that lose weights, and whether the router is among them (facts of transformers 5.23).
LOSSY = {"mixtral": True, "qwen3_moe": False, "qwen2_moe": False}


def entries(model: nn.Module) -> list[tuple[str, Tensor]]:
    found = [(name, value) for name, value in model.named_parameters() if ".gate.weight" in name or ".experts." in name]
    assert len(found) == 6, "two layers with a router and two stacked expert weights each"
    return found


def load_like_trainer(model: nn.Module, directory: Path) -> list[str]:
    """What `_load_from_checkpoint` does: the file's names, unconverted; missing keys are only a warning."""
    return list(model.load_state_dict(load_file(directory / "model.safetensors"), strict=False).missing_keys)


def assert_same(model: nn.Module, reference: dict[str, Tensor]) -> None:
    live = model.state_dict()
    assert set(live) == set(reference)
    for name, value in reference.items():
        assert live[name].dtype == value.dtype and torch.equal(live[name], value), name


def differing(model: nn.Module, reference: dict[str, Tensor]) -> list[str]:
    return sorted(name for name, value in model.state_dict().items() if not torch.equal(value, reference[name]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", LOSSY)
def test_the_loss_is_seen_and_repaired(tmp_path, family, dtype) -> None:
    trained = tiny_model(family, seed=1, dtype=dtype)
    trained.save_pretrained(tmp_path)
    saved, truth = fingerprint(entries(trained)), copy.deepcopy(trained.state_dict())

    resumed = tiny_model(family, seed=2, dtype=dtype)
    missing = load_like_trainer(resumed, tmp_path)
    assert missing, "this transformers converts names on resume: the repair can be retired"
    wrong = differing(resumed, truth)
    assert wrong and any("experts" in name for name in wrong)
    assert any("gate.weight" in name for name in wrong) is LOSSY[family]
    seen = compare_fingerprints(saved, fingerprint(entries(resumed)))
    assert seen == [name for name in wrong if name in saved] and len(seen) >= 4

    pointers = {name: value.data_ptr() for name, value in resumed.state_dict().items()}
    assert repair_weights(resumed, tmp_path) == wrong
    assert_same(resumed, truth)
    assert compare_fingerprints(saved, fingerprint(entries(resumed))) == []
    after = {name: value.data_ptr() for name, value in resumed.state_dict().items()}
    assert after == pointers, "in place: the optimizer holds these very parameters"
    assert repair_weights(resumed, tmp_path) == [], "nothing left to do"

    batch = tiny_batch(family)
    trained.eval(), resumed.eval()
    assert torch.equal(trained(**batch).logits, resumed(**batch).logits)


def drop_queries(directory: Path) -> list[str]:
    """Take two tensors out of the checkpoint; from_pretrained fills them with noise. Returns their names."""
    tensors = load_file(directory / "model.safetensors")
    lacking = [name for name in tensors if name.endswith("q_proj.weight")]
    assert len(lacking) == 2
    kept = {name: value for name, value in tensors.items() if name not in lacking}
    save_file(kept, directory / "model.safetensors", metadata={"format": "pt"})
    return lacking


def test_random_numbers_and_config_are_left_alone(tmp_path) -> None:
    tiny_model("mixtral", seed=1).save_pretrained(tmp_path)
    drop_queries(tmp_path)
    model = tiny_model("mixtral", seed=2)
    config, training = copy.deepcopy(model.config.to_dict()), model.training
    torch.manual_seed(5)
    expected = torch.rand(4)
    torch.manual_seed(5)
    assert repair_weights(model, tmp_path)
    assert torch.equal(torch.rand(4), expected)
    assert model.config.to_dict() == config and model.training == training
    assert torch.get_default_dtype() == torch.float32


def test_fp32_routers_in_a_bf16_model_keep_their_precision(tmp_path) -> None:
    trained = tiny_model("mixtral", seed=1, dtype=torch.bfloat16)
    for module in trained.modules():
        if type(module).__name__ == "MixtralTopKRouter":
            module.weight.data = torch.randn(module.weight.shape)
    trained.save_pretrained(tmp_path)
    truth = copy.deepcopy(trained.state_dict())
    assert sum(value.dtype == torch.float32 for value in truth.values()) == 2
    resumed = copy.deepcopy(trained)
    with torch.no_grad():
        for parameter in resumed.parameters():
            parameter.add_(1)
    assert repair_weights(resumed, tmp_path)
    assert_same(resumed, truth)


def test_what_the_checkpoint_lacks_is_not_replaced_by_noise(tmp_path) -> None:
    tiny_model("mixtral", seed=1).save_pretrained(tmp_path)
    lacking = drop_queries(tmp_path)
    model = tiny_model("mixtral", seed=2)
    before = copy.deepcopy(model.state_dict())
    repaired = repair_weights(model, tmp_path)
    assert repaired and not set(repaired) & set(lacking)
    for name in lacking:
        assert torch.equal(model.state_dict()[name], before[name])


def test_compiled_and_tied_models_are_reached(tmp_path) -> None:
    trained = tiny_model("qwen3_moe", seed=1, tie_word_embeddings=True)
    trained.save_pretrained(tmp_path)
    model = tiny_model("qwen3_moe", seed=2, tie_word_embeddings=True)
    assert repair_weights(torch.compile(model), tmp_path)
    assert_same(model, trained.state_dict())
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_adapters_are_left_out(tmp_path) -> None:
    peft = pytest.importorskip("peft")
    tiny_model("mixtral", seed=1).save_pretrained(tmp_path)
    model = peft.get_peft_model(tiny_model("mixtral", seed=2), peft.LoraConfig(target_modules=["q_proj"]))
    before = copy.deepcopy(model.state_dict())
    assert repair_weights(model, tmp_path) == []
    assert_same(model, before)


def test_unusable_checkpoints_are_typed_errors_and_change_nothing(tmp_path) -> None:
    model = tiny_model("mixtral", seed=2)
    before = copy.deepcopy(model.state_dict())
    (tmp_path / "empty").mkdir()
    for directory in (tmp_path / "absent", tmp_path / "empty"):
        with pytest.raises(StateMissingError, match=r"no model\.safetensors.*from_pretrained"):
            repair_weights(model, directory)
    torch.save(model.state_dict(), tmp_path / "empty" / "pytorch_model.bin")  # a pickle
    (tmp_path / "empty" / "chronomoe.safetensors").write_bytes(b"not weights")
    with pytest.raises(StateMissingError):
        repair_weights(model, tmp_path / "empty")
    tiny_model("mixtral", seed=1, num_local_experts=4).save_pretrained(tmp_path / "four")
    with pytest.raises(StateMismatchError, match="cannot be loaded into MixtralForCausalLM"):
        repair_weights(model, tmp_path / "four")
    tiny_model("mixtral", seed=1).save_pretrained(tmp_path / "torn")
    whole = (tmp_path / "torn" / "model.safetensors").read_bytes()
    (tmp_path / "torn" / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(StateCorruptError, match="damaged"):
        repair_weights(model, tmp_path / "torn")
    assert_same(model, before)


def test_weights_that_are_not_whole_here_are_refused(tmp_path) -> None:
    import torch.distributed as dist
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    model = tiny_model("mixtral", seed=2)
    model.save_pretrained(tmp_path)
    router = next(module for module in model.modules() if type(module).__name__ == "MixtralTopKRouter")
    weight = router.weight
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        router.weight = nn.Parameter(distribute_tensor(weight.detach(), mesh, [Shard(0)]))
        assert fingerprint([("w", router.weight)]) == {"w": "sharded"}
        with pytest.raises(StateError, match="FSDP and DeepSpeed"):
            repair_weights(model, tmp_path)
    finally:
        dist.destroy_process_group()
    partitioned = nn.Parameter(torch.empty(0))
    partitioned.ds_shape = weight.shape  # type: ignore[attr-defined]  # as DeepSpeed ZeRO-3 leaves it
    for parameter in (partitioned, nn.Parameter(torch.empty(8, 32, device="meta"))):
        router.weight = parameter
        assert fingerprint([("w", router.weight)]) == {"w": "sharded"}
        with pytest.raises(StateError, match="are not whole on this process"):
            repair_weights(model, tmp_path)
    with pytest.raises(StateError, match="Linear is not a transformers PreTrainedModel"):
        repair_weights(nn.Linear(2, 2), tmp_path)
