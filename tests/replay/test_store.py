"""Records by content: the longest common prefix, sources apart, the oldest first out."""

from __future__ import annotations

import numpy as np
import pytest

from chronomoe_hf.replay.store import Record, ReplayStore, common_prefix, smallest_dtype

L, K = 3, 2


def record(tokens: list[int], mark: int = 0, rows: int | None = None) -> Record:
    num = len(tokens) if rows is None else rows
    routes = np.full((num, L, K), mark, dtype=np.int8)
    return Record(np.array(tokens, dtype=np.int64), routes, None, 2)


def found(store: ReplayStore, tokens: list[int], source: str = "rollout") -> tuple[int, int] | None:
    """(mark of the record, routed tokens)."""
    match = store.find(source, np.array(tokens, dtype=np.int64))  # type: ignore[arg-type]
    assert match is None or match.record.routes_NLK is not None
    return None if match is None else (int(match.record.routes_NLK[0, 0, 0]), match.routed)  # type: ignore[index]


def test_the_six_cases_of_a_row() -> None:
    store = ReplayStore(1 << 20)
    prompt = [7, 8]
    store.add("rollout", record([*prompt, 1, 2, 3], 1, rows=4))
    store.add("rollout", record([*prompt, 1, 5, 6], 2, rows=4))
    store.add("rollout", record([*prompt, 1, 2, 3, 40, 41, 9, 9], 3, rows=8))
    assert found(store, [*prompt, 1, 2, 3]) == (1, 4), "the row itself: all but its last token"
    assert found(store, [*prompt, 1, 5, 6]) == (2, 4), "a sibling of the same prompt"
    assert found(store, [*prompt, 1, 2, 3, 40, 41, 9, 9]) == (3, 8), "a second turn after a tool"
    assert found(store, [*prompt, 1, 5]) == (2, 4), "truncated by the trainer"
    assert found(store, [*prompt, 1, 2, 3, 40, 99]) == (3, 6), "a tool result that was edited"
    assert found(store, [*prompt, 1, 9, 9, 9]) in ((1, 3), (2, 3), (3, 3)), "an edit in the middle"
    assert found(store, [5, 5, 5]) is None, "an unknown prompt"


def test_the_longest_prefix_among_many_rows_is_found() -> None:
    """Against a search through all rows."""
    rng = np.random.default_rng(0)
    store, rows = ReplayStore(1 << 30), []
    for mark in range(200):
        row = rng.integers(0, 3, size=int(rng.integers(1, 12))).tolist()
        rows.append(row)
        store.add("rollout", record(row, mark % 100))
    for _ in range(300):
        wanted = rng.integers(0, 3, size=int(rng.integers(1, 12)))
        best = max(common_prefix(np.array(row), wanted) for row in rows)
        match = store.find("rollout", wanted.astype(np.int64))
        assert (0 if match is None else match.length) == best


def test_what_the_old_pass_chose_never_takes_the_place_of_what_the_engine_chose() -> None:
    store = ReplayStore(1 << 20)
    store.add("rollout", record([1, 2, 3], 1))
    store.add("old", record([1, 2, 3], 2))
    assert found(store, [1, 2, 3]) == (1, 3)
    assert found(store, [1, 2, 3], "old") == (2, 3)
    store.clear("old")
    assert found(store, [1, 2, 3], "old") is None and store.count("rollout") == 1


def test_a_newer_record_of_the_same_tokens_replaces_choices_and_keeps_what_it_does_not_have() -> None:
    store = ReplayStore(1 << 20)
    tokens = np.array([1, 2, 3], dtype=np.int64)
    store.add("old", record([1, 2, 3], 1))
    store.add("old", Record(tokens, None, np.array([0.0, -1.0, -2.0], dtype=np.float32)))
    match = store.find("old", tokens)
    assert match is not None and match.routed == 3 and match.record.logps_N is not None and match.record.prompt == 2
    store.add("old", record([1, 2, 3], 5))
    assert found(store, [1, 2, 3], "old") == (5, 3) and len(store) == 1


def test_the_oldest_goes_first_and_the_bytes_are_those_of_the_records() -> None:
    one = record([1, 2, 3])
    store = ReplayStore(3 * one.nbytes)
    for start in range(5):
        store.add("rollout", record([start, 2, 3], start))
        assert store.nbytes == sum(r.nbytes for r in store._records.values()) <= store.max_bytes
    assert (len(store), store.dropped) == (3, 2)
    assert found(store, [0, 2, 3]) is None and found(store, [4, 2, 3]) == (4, 3)
    store.add("rollout", record(list(range(1000))))
    assert len(store) == 0, "a record larger than the limit is not kept"


@pytest.mark.parametrize(("experts", "name"), [(8, "int8"), (128, "int8"), (129, "int16"), (512, "int16")])
def test_ids_are_kept_in_the_smallest_type_that_holds_them_and_minus_one(experts: int, name: str) -> None:
    dtype = smallest_dtype(experts)
    assert dtype.name == name
    assert np.array([-1, experts - 1]).astype(dtype).tolist() == [-1, experts - 1]
