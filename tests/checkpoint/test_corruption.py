"""Damaged and hostile files end in a typed error: nothing is executed, nothing large is built, nothing torn is read."""

from __future__ import annotations

import json
import pickle
import random
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chronomoe_hf.checkpoint import manifest as state_format
from chronomoe_hf.checkpoint.manifest import header_table, parse_manifest, render_manifest
from chronomoe_hf.checkpoint.state_file import (
    MANIFEST_FILE,
    STATE_FOLDER,
    TENSOR_FILE,
    read_manifest,
    read_state,
    write_state,
)
from chronomoe_hf.errors import StateCorruptError, StateError, StateSchemaError

FILES = (TENSOR_FILE, MANIFEST_FILE)


@pytest.fixture
def saved(tmp_path, sample_state) -> Path:
    assert write_state(tmp_path / "saved", *sample_state(9), strict=True)
    return tmp_path / "saved"


def forge(directory: Path, payload: bytes | None = None, **change: Any) -> None:
    """What an attacker can do: any manifest and any tensor bytes, with every checksum right."""
    import hashlib

    manifest = read_manifest(directory)
    del manifest["manifest_sha256"]
    if payload is not None:
        (directory / STATE_FOLDER / TENSOR_FILE).write_bytes(payload)
        manifest["files"] = {TENSOR_FILE: {"sha256": hashlib.sha256(payload).hexdigest(), "size": len(payload)}}
    (directory / STATE_FOLDER / MANIFEST_FILE).write_bytes(render_manifest({**manifest, **change}))


# ------------------------------------------------------------------------------------------------------ damage


@pytest.mark.parametrize("name", FILES)
def test_truncation_at_every_byte(saved, name, step_in) -> None:
    whole = (saved / STATE_FOLDER / name).read_bytes()
    assert len(whole) > 500
    for length in range(len(whole)):
        (saved / STATE_FOLDER / name).write_bytes(whole[:length])
        with pytest.raises(StateCorruptError) as caught:
            read_state(saved)
        assert name in str(caught.value) and f"{length} bytes" in str(caught.value)
    (saved / STATE_FOLDER / name).write_bytes(whole)
    assert step_in(saved) == 9


def test_three_thousand_single_bit_flips(saved, step_in) -> None:
    rng = random.Random(0)
    originals = {name: (saved / STATE_FOLDER / name).read_bytes() for name in FILES}
    total = sum(map(len, originals.values()))
    hit = dict.fromkeys(FILES, 0)
    for place in sorted(rng.randrange(total * 8) for _ in range(3000)):
        name = TENSOR_FILE if place < len(originals[TENSOR_FILE]) * 8 else MANIFEST_FILE
        place -= 0 if name == TENSOR_FILE else len(originals[TENSOR_FILE]) * 8
        if name == MANIFEST_FILE and not hit[name]:
            (saved / STATE_FOLDER / TENSOR_FILE).write_bytes(originals[TENSOR_FILE])
        damaged = bytearray(originals[name])
        damaged[place // 8] ^= 1 << place % 8
        (saved / STATE_FOLDER / name).write_bytes(damaged)
        with pytest.raises(StateCorruptError, match=name):
            read_state(saved)
        hit[name] += 1
    assert sum(hit.values()) == 3000 and min(hit.values()) > 300
    (saved / STATE_FOLDER / MANIFEST_FILE).write_bytes(originals[MANIFEST_FILE])
    assert step_in(saved) == 9


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "change",
    [
        lambda data: b"",
        lambda data: data + b"\n",
        lambda data: b"\xef\xbb\xbf" + data,
        lambda data: data.replace(b"\n", b"\r\n") + b"\r\n",
        lambda data: data[:-64] + bytes(64),
        lambda data: bytes(len(data)),
        lambda data: b"<!DOCTYPE html><title>404</title>",
        lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12\n",
    ],
)
def test_other_damage(saved, name, change) -> None:
    (saved / STATE_FOLDER / name).write_bytes(change((saved / STATE_FOLDER / name).read_bytes()))
    with pytest.raises(StateCorruptError, match="older checkpoint"):
        read_state(saved)


def test_files_of_two_checkpoints_are_not_mixed(saved, tmp_path, sample_state) -> None:
    assert write_state(tmp_path / "later", *sample_state(10), strict=True)
    shutil.copy(tmp_path / "later" / STATE_FOLDER / TENSOR_FILE, saved / STATE_FOLDER / TENSOR_FILE)
    with pytest.raises(StateCorruptError, match="torn or altered"):
        read_state(saved)


# ----------------------------------------------------------------------------------------------------- forgery


SHA = "0" * 64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"files": {"../../etc/passwd": {"sha256": SHA, "size": 10}}}, "files must list exactly"),
        ({"files": {"/etc/passwd": {"sha256": SHA, "size": 10}}}, "files must list exactly"),
        ({"files": {TENSOR_FILE: {"sha256": SHA, "size": 10}, "x.pkl": {}}}, "files must list exactly"),
        ({"files": {}}, "files must list exactly"),
        ({"files": [TENSOR_FILE]}, "files must list exactly"),
        ({"files": {TENSOR_FILE: {"sha256": SHA, "size": 10 * 2**30}}}, "at most"),
        ({"files": {TENSOR_FILE: {"sha256": SHA, "size": 10**400}}}, "must give sha256 and size"),
        ({"files": {TENSOR_FILE: {"sha256": SHA, "size": -1}}}, "must give sha256 and size"),
        ({"files": {TENSOR_FILE: {"sha256": SHA, "size": 3.5}}}, "must give sha256 and size"),
        ({"files": {TENSOR_FILE: {"sha256": SHA, "size": True}}}, "must give sha256 and size"),
        ({"files": {TENSOR_FILE: {"sha256": SHA, "size": 0}}}, "0 bytes"),
        ({"files": {TENSOR_FILE: {"sha256": 7, "size": 10}}}, "must give sha256 and size"),
        ({"files": {TENSOR_FILE: None}}, "must give sha256 and size"),
        ({"tensors": []}, "tensors must be a table"),
        ({"tensors": {}}, "holds other tensors"),
        ({"step": "9"}, "step must be"),
        ({"step": 10**30}, "step must be"),
        ({"step": None}, "step must be"),
        ({"layers": 10**9}, "layers must be a list"),
        ({"layers": [[]]}, r"layers\[0\] must give name"),
        ({"layers": [{"name": "a", "router_class": "R", "num_experts": "4", "top_k": 2}]}, "num_experts"),
        ({"layers": [{"name": "a", "router_class": "R", "num_experts": 4, "top_k": 2}] * 2}, "same name"),
        ({"config": []}, "config must be dict"),
        ({"world_size": True}, "world_size must be int"),
        ({"fingerprint": {"a": 1}}, "fingerprint values"),
        ({"schema_version": 0}, "schema_version"),
        ({"schema_version": True}, "schema_version"),
        ({"schema_version": "1"}, "schema_version"),
        ({"schema_version": None}, "schema_version"),
        ({"schema_minor": "0"}, "schema_minor"),
    ],
)
def test_hostile_manifests(saved, change, message) -> None:
    forge(saved, **change)
    with pytest.raises(StateCorruptError, match=message):
        read_state(saved)


def seal(body: bytes) -> bytes:
    """Any bytes with a valid last entry (the definition: the sha256 of what stands before it)."""
    import hashlib

    return body + b',\n  "manifest_sha256": "' + hashlib.sha256(body).hexdigest().encode() + b'"\n}\n'


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b'{"a": NaN',
        b'{"schema_version": 1, "schema_version": 2',
        b'{"a": ' + b"[" * 200_000,
        b'{"a": ' + b'{"a":' * 200_000,
        b'{"a": ' + b"9" * 100_000,
        b'["a"',
        '{"a": 1'.encode("utf-16"),
    ],
    ids=range(10),
)
def test_sealed_bytes_that_are_not_a_manifest(saved, body) -> None:
    (saved / STATE_FOLDER / MANIFEST_FILE).write_bytes(seal(body))
    with pytest.raises(StateCorruptError, match="is not JSON"):
        read_state(saved)


def test_messages_carry_no_control_characters(saved) -> None:
    forge(saved, files={"\x1b[31m\n</script>": {}}, step=1)
    with pytest.raises(StateCorruptError) as caught:
        read_state(saved)
    assert str(caught.value).isprintable() and "\\x1b" in str(caught.value)


def test_a_huge_sparse_file_is_refused_by_its_size(saved) -> None:
    for size in (2**30, 2**43):
        for name in FILES:
            original = (saved / STATE_FOLDER / name).read_bytes()
            try:
                with open(saved / STATE_FOLDER / name, "r+b") as file:
                    file.truncate(size)
            except OSError:
                pytest.skip("the file system has no sparse files of this size")
            tracemalloc.start()
            with pytest.raises(StateCorruptError, match=rf"{name} has {size} bytes"):
                read_state(saved)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak < 2**20, "it must be refused before anything of its size is allocated"
            (saved / STATE_FOLDER / name).write_bytes(original)


def container(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype: Any = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (container({str(i): entry(shape=[0], offsets=[0, 0]) for i in range(100_000)}), "claims a header of"),
        (container({str(i): entry(shape=[0], offsets=[0, 0]) for i in range(30_000)}), "30000 entries"),
        ((2**63).to_bytes(8, "little") + b"{}", "claims a header of"),
        ((3).to_bytes(8, "little") + b"{}", "claims a header of"),
        (container({"a": entry(shape=[2**40], offsets=[0, 2**42])}, bytes(4)), "cover 4398046511104 bytes"),
        (container({"a": entry(shape=[2**40] * 3, offsets=[0, 4])}, bytes(4)), "4 bytes for F32"),
        (container({"a": entry(shape=[1] * 4000)}, bytes(4)), "has shape"),
        (container({"a": entry(), "b": entry(offsets=[2, 6])}, bytes(6)), "begins at byte 2"),
        (container({"a": entry(), "b": entry(offsets=[8, 12])}, bytes(12)), "begins at byte 8"),
        (container({"a": entry()}, bytes(8)), "8 follow the header"),
        (container({"a": entry(offsets=[4, 0])}, bytes(4)), "bytes for F32"),
        (container({"a": entry(shape=[-1, -1])}, bytes(4)), "has shape"),
        (container({"a": entry(shape=[1.0])}, bytes(4)), "has shape"),
        (container({"a": entry(shape="1")}, bytes(4)), "has shape"),
        (container({"a": entry(dtype="F8_E4M3")}, bytes(4)), "has dtype"),
        (container({"a": entry(dtype=["F32"])}, bytes(4)), "has dtype"),
        (container({"a": {**entry(), "more": 1}}, bytes(4)), "must give dtype"),
        (container({"a": 3}), "must give dtype"),
        (container([]), "not a table"),
        (container(b"[" * 100_000), "bad safetensors header"),
        (container(b'{"a":1,"a":1}'), "twice"),
        (container(b"\xff{}"), "bad safetensors header"),
    ],
    ids=lambda value: value.replace(" ", "_") if isinstance(value, str) else "",
)
def test_hostile_tensor_files(saved, payload, message) -> None:
    forge(saved, payload)
    with pytest.raises(StateCorruptError, match=message):
        read_state(saved)


def test_a_consistent_forgery_is_only_data(saved) -> None:
    """The gate is not an alarm on everything: a well-formed foreign file loads, as plain tensors."""
    forge(saved, container({"a": entry()}, bytes(4)), tensors={"a": ["F32", [1]]})
    assert torch.equal(read_state(saved)[0]["a"], torch.zeros(1))


class Payload:
    """Unpickling it would create `canary`."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.canary,))


@pytest.mark.parametrize("forged", [False, True])
@pytest.mark.parametrize("writer", ["pickle", "torch"])
def test_a_renamed_pickle_is_not_executed(saved, tmp_path, forged, writer) -> None:
    canary, evil = tmp_path / "canary", tmp_path / "evil.pkl"
    if writer == "pickle":
        evil.write_bytes(pickle.dumps(Payload(canary)))
        pickle.loads(evil.read_bytes())
    else:
        torch.save({"beta": Payload(canary)}, evil)
        torch.load(evil, weights_only=False)
    assert canary.exists(), "the payload works"
    canary.unlink()
    if forged:
        forge(saved, evil.read_bytes())
    else:
        shutil.copy(evil, saved / STATE_FOLDER / TENSOR_FILE)
    with pytest.raises(StateCorruptError):
        read_state(saved)
    shutil.copy(evil, saved / STATE_FOLDER / MANIFEST_FILE)
    with pytest.raises(StateCorruptError):
        read_state(saved)
    assert not canary.exists()


# ----------------------------------------------------------------------------------------------------- fuzzing

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
KEYS = ["schema_version", "schema_minor", "files", "tensors", "layers", "step", "config", "fingerprint", "world_size"]
FUZZ = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@FUZZ
@given(st.binary(max_size=300), st.booleans())
def test_fuzz_manifest_bytes(data: bytes, sealed: bool) -> None:
    with pytest.raises(StateError):
        parse_manifest(seal(data) if sealed else data, "fuzz")


@FUZZ
@given(st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=8), JSON, max_size=10), st.booleans(), st.data())
def test_fuzz_manifest_entries(changes: dict[str, Any], keep_schema: bool, data: st.DataObject) -> None:
    """A valid manifest with arbitrary entries replaced: parsed, or refused with a typed error, nothing else."""
    layer = {"name": "a", "router_class": "R", "num_experts": 4, "top_k": 2}
    record = {"sha256": SHA, "size": 100}
    valid = {"schema_version": 1, "files": {TENSOR_FILE: record}, "tensors": {}, "layers": [layer], "step": 1}
    if keep_schema:
        changes.pop("schema_version", None)
    if data.draw(st.booleans()):
        layer[data.draw(st.sampled_from(sorted(layer)))] = data.draw(JSON)
    if data.draw(st.booleans()):
        record[data.draw(st.sampled_from(sorted(record)))] = data.draw(JSON)
    manifest = {**valid, **changes}
    manifest.pop("manifest_sha256", None)
    try:
        parsed = parse_manifest(render_manifest(manifest), "fuzz")
    except (StateCorruptError, StateSchemaError) as error:
        assert str(error).isprintable()
        return
    del parsed["manifest_sha256"]
    assert parsed == manifest
    assert state_format.manifest_problem(parsed) is None


@FUZZ
@given(st.dictionaries(st.text(max_size=8), JSON, max_size=4) | JSON, st.binary(max_size=16))
def test_fuzz_tensor_headers(header: Any, data: bytes) -> None:
    payload = container(header, data)
    try:
        table = header_table(payload, "fuzz")
    except StateCorruptError:
        return
    assert set(table) == set(header) - {"__metadata__"} and not (data and not table)
