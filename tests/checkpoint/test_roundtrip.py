"""What is written comes back bit for bit; schemas, links, modes, and misuse."""

from __future__ import annotations

import glob
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import tiny_model

import chronomoe_hf
from chronomoe_hf import ChronoConfig, TelemetryWriter
from chronomoe_hf.checkpoint import manifest as migrations
from chronomoe_hf.checkpoint import manifest as state_format
from chronomoe_hf.checkpoint.state_file import (
    MANIFEST_FILE,
    OLD_MANIFEST_FILE,
    OLD_TENSOR_FILE,
    STATE_FOLDER,
    TENSOR_FILE,
    has_state,
    read_manifest,
    read_state,
    write_state,
)
from chronomoe_hf.errors import StateCorruptError, StateError, StateMissingError, StateSchemaError, StateWriteError
from chronomoe_hf.telemetry import read_jsonl

DATA = Path(__file__).resolve().parent.parent / "data"


def test_a_state_comes_back_bit_for_bit(tmp_path, sample_state, step_in) -> None:
    target = tmp_path / "made" / "on" / "demand"
    assert not has_state(target)
    assert write_state(target, *sample_state(3), strict=True) is True
    assert has_state(target)
    assert step_in(target) == 3
    assert sorted(os.listdir(target / STATE_FOLDER)) == [MANIFEST_FILE, TENSOR_FILE]
    assert write_state(target, *sample_state(4), strict=True)
    assert step_in(target) == 4
    assert sorted(os.listdir(target / STATE_FOLDER)) == [MANIFEST_FILE, TENSOR_FILE]


def test_nonfinite_tensors_views_and_shared_memory_survive(tmp_path, sample_state) -> None:
    base = torch.tensor([[float("nan"), float("inf"), -0.0], [1.0, 2.0, -float("inf")]])
    tensors = {"base": base, "row": base[1], "transposed": base.t(), "grad": base.clone().requires_grad_()}
    assert write_state(tmp_path, tensors, sample_state(1)[1], strict=True)
    loaded, _ = read_state(tmp_path)
    for name, value in tensors.items():
        same = loaded[name].view(torch.int32), value.detach().contiguous().view(torch.int32)
        assert torch.equal(*same), name


def test_the_same_state_gives_the_same_bytes(tmp_path, sample_state) -> None:
    for name in ("a", "b"):
        assert write_state(tmp_path / name, *sample_state(5), strict=True)
    for file in (MANIFEST_FILE, TENSOR_FILE):
        same = [(tmp_path / name / STATE_FOLDER / file).read_bytes() for name in ("a", "b")]
        assert same[0] == same[1]


def test_the_manifest_is_json_that_other_tools_read(tmp_path, sample_state) -> None:
    assert write_state(tmp_path, *sample_state(5), strict=True)
    plain = json.loads((tmp_path / STATE_FOLDER / MANIFEST_FILE).read_text(encoding="utf-8"))
    assert plain["schema_version"] == 3
    assert plain["step"] == 5
    assert plain["files"][TENSOR_FILE]["size"] == (tmp_path / STATE_FOLDER / TENSOR_FILE).stat().st_size
    assert plain["tensors"]["half"] == ["BF16", [3, 5]]
    assert plain["versions"]["torch"] == torch.__version__
    assert list(plain)[-1] == "manifest_sha256"
    assert read_manifest(tmp_path) == plain


def test_a_state_that_was_read_can_be_written_again(tmp_path, sample_state, step_in) -> None:
    assert write_state(tmp_path, *sample_state(5), strict=True)
    assert write_state(tmp_path / "copy", *read_state(tmp_path), strict=True)
    assert step_in(tmp_path / "copy") == 5


def test_file_modes_follow_the_umask(tmp_path, sample_state, forked) -> None:
    def save() -> int:
        os.umask(0o027)
        return 0 if write_state(tmp_path, *sample_state(1)) else 1

    assert forked(save) == 0
    for file in (MANIFEST_FILE, TENSOR_FILE):
        assert (tmp_path / STATE_FOLDER / file).stat().st_mode & 0o777 == 0o640


def test_missing_state_is_its_own_error(tmp_path, sample_state) -> None:
    for directory in (tmp_path, tmp_path / "absent", Path("/dev/null/x")):
        with pytest.raises(StateMissingError, match=r"state\.json does not exist"):
            read_state(directory)
    with pytest.raises(FileNotFoundError):
        read_state(tmp_path)
    assert write_state(tmp_path, *sample_state(1), strict=True)
    (tmp_path / STATE_FOLDER / TENSOR_FILE).unlink()
    with pytest.raises(StateCorruptError, match=r"state\.tensors does not exist"):
        read_state(tmp_path)


def test_a_tensor_file_without_manifest_was_never_committed(tmp_path, sample_state) -> None:
    assert write_state(tmp_path, *sample_state(1), strict=True)
    (tmp_path / STATE_FOLDER / MANIFEST_FILE).unlink()
    assert not has_state(tmp_path)
    with pytest.raises(StateMissingError):
        read_state(tmp_path)


@pytest.mark.parametrize(
    ("tensors", "change", "message"),
    [
        ({}, {"step": -1}, "step must be"),
        ({}, {"step": True}, "step must be"),
        ({}, {"layers": None}, "layers must be a list"),
        ({}, {"layers": [{"name": "a", "router_class": "R", "num_experts": 4}]}, "top_k"),
        ({}, {"controller": {"debt": float("nan")}}, "not JSON compliant"),
        ({}, {"controller": {3: 1.0}}, "keys must be strings, got 3"),
        ({}, {"controller": {"tensor": torch.zeros(1)}}, "not JSON serializable"),
        ({"z": torch.zeros(2, dtype=torch.complex64)}, {}, "dtype 'C64'"),
        ({"m": torch.zeros(2, device="meta")}, {}, "meta"),
        ({3: torch.zeros(2)}, {}, "TypeError"),
    ],
)
def test_what_could_not_be_read_back_is_not_written(tmp_path, sample_state, step_in, tensors, change, message) -> None:
    good, meta = sample_state(1)
    assert write_state(tmp_path, good, meta, strict=True)
    assert write_state(tmp_path, tensors, {**meta, **change}) is False
    with pytest.raises(StateWriteError, match=message):
        write_state(tmp_path, tensors, {**meta, **change}, strict=True)
    assert step_in(tmp_path) == 1


# ---------------------------------------------------------------------------------------------------- schemas


@pytest.mark.parametrize("schema", ["state_v1", "state_v2"])
def test_golden_files_of_every_schema_load(schema) -> None:
    """state_v1 was written by chronomoe_hf 0.1.0, with its two files beside the weights."""
    tensors, meta = read_state(DATA / schema)
    assert meta["step"] == 1200
    assert meta["config"] == {"interval": 100}
    assert meta["controller"] == {"pressure": [0.125, 0.0]}
    assert meta["layers"] == [
        {"name": "model.layers.0.mlp.gate", "router_class": "MixtralTopKRouter", "num_experts": 4, "top_k": 2},
        {"name": "model.layers.1.mlp.gate", "router_class": "MixtralTopKRouter", "num_experts": 8, "top_k": 2},
    ]
    assert meta["fingerprint"] == {"model.layers.0.mlp.gate.weight": "float32 4x8 " + "0f" * 32}
    assert set(tensors) == {"beta.0", "beta.1", "tokens"}
    assert torch.equal(tensors["beta.0"], torch.tensor([-0.25, 0.25, 0.125, -0.125]))
    assert torch.equal(tensors["beta.1"], torch.tensor([0.5] * 8, dtype=torch.bfloat16))
    assert torch.equal(tensors["tokens"], torch.tensor([[2**40, 1], [2, 3]]))


def as_schema_1(directory: Path, state: Any) -> None:
    """Write a state as schema 1 did: under the old names, beside the weights."""
    assert write_state(directory, *state, strict=True)
    folder = directory / STATE_FOLDER
    manifest = read_manifest(directory)
    del manifest["manifest_sha256"]
    manifest["files"] = {OLD_TENSOR_FILE: manifest["files"][TENSOR_FILE]}
    manifest["schema_version"] = 1
    (directory / OLD_MANIFEST_FILE).write_bytes(state_format.render_manifest(manifest))
    (folder / TENSOR_FILE).rename(directory / OLD_TENSOR_FILE)
    (folder / MANIFEST_FILE).unlink()
    folder.rmdir()


def test_a_state_beside_the_weights_gives_way_to_the_new_folder(tmp_path, sample_state, step_in) -> None:
    as_schema_1(tmp_path, sample_state(3))
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / f".{OLD_TENSOR_FILE}.tmp.7").touch()
    assert has_state(tmp_path) and step_in(tmp_path) == 3
    assert write_state(tmp_path, *sample_state(4), strict=True)
    assert step_in(tmp_path) == 4
    assert sorted(os.listdir(tmp_path)) == [STATE_FOLDER, "model.safetensors"]


def test_a_crash_while_an_old_state_gives_way(tmp_path, sample_state, step_in, forked) -> None:
    """Killed before any rename or removal: the old state or the new one, whole."""
    seen = []
    for stop in range(1, 8):
        directory = tmp_path / str(stop)
        as_schema_1(directory, sample_state(3))

        def save(stop: int = stop, directory: Path = directory) -> int:
            left = [stop]

            def counted(call):
                def run(*args, **kwargs):
                    left[0] -= 1
                    if left[0] == 0:
                        os._exit(77)
                    return call(*args, **kwargs)

                return run

            os.replace, os.unlink = counted(os.replace), counted(os.unlink)
            return 0 if write_state(directory, *sample_state(4), strict=True) else 1

        assert forked(save) in (0, 77)
        seen.append(step_in(directory))
        assert write_state(directory, *sample_state(5), strict=True)
        assert os.listdir(directory) == [STATE_FOLDER], "what the crash left was not cleaned up"
    assert seen == sorted(seen) and set(seen) == {3, 4}, seen


def test_records_of_a_run_share_the_folder(tmp_path, sample_state, step_in) -> None:
    writer = TelemetryWriter("a-run", tmp_path)
    writer.write("alerts", {"step": 1})
    assert write_state(tmp_path, *sample_state(1), strict=True)
    assert write_state(tmp_path, *sample_state(2), strict=True)
    writer.write("alerts", {"step": 2})
    writer.close()
    records, broken = read_jsonl(tmp_path / STATE_FOLDER / "alerts.jsonl")
    assert [record["step"] for record in records] == [1, 2] and not broken
    assert step_in(tmp_path) == 2


def serving_weights(folder: Path) -> list[str]:
    """What vLLM loads where there is no index: every ``*.safetensors`` (filter_duplicate_safetensors_files)."""
    found = glob.glob(str(folder / "*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        named = {str(folder / name) for name in json.loads(index.read_text())["weight_map"].values()}
        found = [path for path in found if path in named]
    return sorted(os.path.basename(path) for path in found)


def test_serving_engines_see_only_weights(tmp_path) -> None:
    model = chronomoe_hf.wrap(tiny_model("mixtral"), ChronoConfig.balance(interval=1))
    model.save_pretrained(tmp_path / "one")
    assert has_state(tmp_path / "one") and serving_weights(tmp_path / "one") == ["model.safetensors"]
    model.save_pretrained(tmp_path / "many", max_shard_size="40KB")
    names = serving_weights(tmp_path / "many")
    assert has_state(tmp_path / "many") and len(names) > 2 and all(name.startswith("model-") for name in names)


def reseal(directory: Path, **change: object) -> None:
    """Change manifest entries and seal it again, as a foreign writer would."""
    manifest = read_manifest(directory)
    del manifest["manifest_sha256"]
    (directory / STATE_FOLDER / MANIFEST_FILE).write_bytes(state_format.render_manifest({**manifest, **change}))


def test_newer_schema_is_refused_newer_minor_warns(tmp_path, sample_state, step_in, caplog) -> None:
    assert write_state(tmp_path, *sample_state(1), strict=True)
    reseal(tmp_path, schema_minor=9, invented_later={"x": 1})
    assert step_in(tmp_path) == 1
    assert "schema 3.9, newer than 3.0" in caplog.text
    reseal(tmp_path, schema_version=4, chronomoe_version="9.9", files="may mean anything now")
    with pytest.raises(StateSchemaError, match=r"schema version 4.*reads up to 3.*install chronomoe_hf '9\.9'"):
        read_state(tmp_path)


def test_older_schemas_go_through_every_migration(tmp_path, sample_state, monkeypatch) -> None:
    assert write_state(tmp_path, *sample_state(1), strict=True)
    monkeypatch.setattr(migrations, "STATE_SCHEMA", 5)
    monkeypatch.setattr(state_format, "STATE_SCHEMA", 5)
    with pytest.raises(StateSchemaError, match="schema version 3, which cannot be migrated"):
        read_state(tmp_path)
    trail = []

    def step(tensors, meta):
        trail.append(meta["schema_version"])
        return {**tensors, f"added_{len(trail)}": torch.zeros(1)}, {**meta, "trail": list(trail)}

    monkeypatch.setattr(migrations, "MIGRATIONS", {3: step, 4: step})
    tensors, meta = read_state(tmp_path)
    assert meta["trail"] == [3, 4] and meta["schema_version"] == 5
    assert {"added_1", "added_2"} <= set(tensors)


# ------------------------------------------------------------------------------------------------------ links


def test_links_out_of_the_directory_are_refused(tmp_path, sample_state) -> None:
    assert write_state(tmp_path / "other", *sample_state(1), strict=True)
    for file in (MANIFEST_FILE, TENSOR_FILE):
        here = tmp_path / f"links_{file}"
        (here / STATE_FOLDER).mkdir(parents=True)
        for name in (MANIFEST_FILE, TENSOR_FILE):
            (here / STATE_FOLDER / name).write_bytes((tmp_path / "other" / STATE_FOLDER / name).read_bytes())
        (here / STATE_FOLDER / file).unlink()
        (here / STATE_FOLDER / file).symlink_to(tmp_path / "other" / STATE_FOLDER / file)
        with pytest.raises(StateCorruptError, match="link out of its directory"):
            read_state(here)
    loop = tmp_path / "loop"
    (loop / STATE_FOLDER).mkdir(parents=True)
    (loop / STATE_FOLDER / MANIFEST_FILE).symlink_to(loop / STATE_FOLDER / MANIFEST_FILE)
    with pytest.raises(StateError, match="cannot be read"):
        read_state(loop)


def test_the_links_of_a_hub_cache_snapshot_are_followed(tmp_path, sample_state, step_in) -> None:
    repository = tmp_path / "models--me--moe"
    snapshot, blobs = repository / "snapshots" / "c0ffee", repository / "blobs"
    blobs.mkdir(parents=True)
    assert write_state(tmp_path / "source", *sample_state(6), strict=True)
    for directory, up in ((snapshot, "../../.."), (snapshot / "checkpoint-6", "../../../..")):
        (directory / STATE_FOLDER).mkdir(parents=True)
        for name in (MANIFEST_FILE, TENSOR_FILE):
            (blobs / f"hash_of_{name}").write_bytes((tmp_path / "source" / STATE_FOLDER / name).read_bytes())
            (directory / STATE_FOLDER / name).symlink_to(f"{up}/blobs/hash_of_{name}")
        assert step_in(directory) == 6


def test_writing_replaces_a_link_instead_of_following_it(tmp_path, sample_state, step_in) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    here = tmp_path / "here"
    (here / STATE_FOLDER).mkdir(parents=True)
    for name in (MANIFEST_FILE, TENSOR_FILE):
        (here / STATE_FOLDER / name).symlink_to(victim)
    assert write_state(here, *sample_state(2), strict=True)
    assert victim.read_text() == "precious"
    assert step_in(here) == 2


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs FIFOs")
def test_a_fifo_is_refused_without_hanging(tmp_path, forked) -> None:
    (tmp_path / STATE_FOLDER).mkdir()
    os.mkfifo(tmp_path / STATE_FOLDER / MANIFEST_FILE)

    def read() -> int:
        signal.alarm(30)  # ends the child if opening waits for a writer
        try:
            read_state(tmp_path)
        except StateCorruptError as error:
            return 0 if "is not a regular file" in str(error) else 1
        return 2

    assert forked(read) == 0
