"""Saving is interrupted everywhere: by SIGKILL at random, at every call, by failing calls, by a full disk."""

from __future__ import annotations

import os
import random
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from chronomoe_hf.checkpoint import state_file as checkpoint
from chronomoe_hf.checkpoint.state_file import (
    MANIFEST_FILE,
    PREVIOUS_SUFFIX,
    STATE_FOLDER,
    TENSOR_FILE,
    read_state,
    write_state,
)
from chronomoe_hf.errors import StateError, StateMissingError, StateWriteError

CALLS = ("open", "write", "fsync", "replace", "unlink", "listdir")
COMMITTED = [MANIFEST_FILE, TENSOR_FILE]


def wrap_calls(action: Callable[[int, str, tuple[Any, ...]], None]) -> Callable[[], None]:
    """Call `action(number, name, arguments)` before each os call of CALLS; returns the undo."""
    originals = {name: getattr(os, name) for name in CALLS}
    count = 0

    def make(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            action(count, name, args)
            return originals[name](*args, **kwargs)

        return call

    for name in CALLS:
        setattr(os, name, make(name))

    def undo() -> None:
        for name, original in originals.items():
            setattr(os, name, original)

    return undo


def count_calls(directory: Path, state: Any) -> int:
    seen: list[str] = []
    undo = wrap_calls(lambda number, name, args: seen.append(name))
    try:
        assert write_state(directory, *state)
    finally:
        undo()
    assert seen.count("replace") >= 2 and seen.count("fsync") >= 4 and "write" in seen, seen
    return len(seen)


# --------------------------------------------------------------------------------------------- random SIGKILLs


def kill_while_saving(directory: Path, sample_state, delay: float, first: int) -> None:
    """Fork a process that saves `first`, `first` + 1, ...; kill it `delay` seconds after its first save began."""
    ready, started = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(ready)
            os.write(started, b"x")
            step = first
            while True:
                if not write_state(directory, *sample_state(step)):
                    os._exit(3)
                step += 1
        finally:
            os._exit(4)
    os.close(started)
    assert os.read(ready, 1) == b"x"
    os.close(ready)
    time.sleep(delay)
    os.kill(pid, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("kills", [40, pytest.param(300, marks=pytest.mark.slow)])
def test_sigkill_at_random_leaves_a_whole_state(tmp_path, sample_state, step_in, kills) -> None:
    rng = random.Random(kills)
    assert write_state(tmp_path, *sample_state(0), strict=True)
    begin = time.perf_counter()
    for _ in range(5):
        assert write_state(tmp_path, *sample_state(0), strict=True)
    one_save = (time.perf_counter() - begin) / 5
    held, mid_save, progress = 0, 0, 0
    for _ in range(kills):
        kill_while_saving(tmp_path, sample_state, rng.uniform(0, 4 * one_save), held + 1)
        mid_save += sorted(os.listdir(tmp_path / STATE_FOLDER)) != COMMITTED
        now = step_in(tmp_path)
        assert now >= held, "an older state came back"
        progress += now > held
        held = now
    # Guards against a vacuous run only: how many kills hit a save depends on how busy the machine is.
    assert mid_save > 1, "hardly any kill hit a save in progress"
    assert progress > 1, "hardly any save was completed"
    assert write_state(tmp_path, *sample_state(held + 1), strict=True)
    assert sorted(os.listdir(tmp_path / STATE_FOLDER)) == COMMITTED, "leftovers of killed saves were not cleaned up"


# --------------------------------------------------------------------------------------- exit at every call


def save_until(directory: Path, state: Any, stop: int) -> int:
    """Save, but leave without any clean-up before os call number `stop`; a write stops half-way."""
    half_write = os.write

    def action(number: int, name: str, args: tuple[Any, ...]) -> None:
        if number == stop:
            if name == "write":
                half_write(args[0], bytes(args[1])[: len(args[1]) // 2])
            os._exit(77)

    wrap_calls(action)
    return 0 if write_state(directory, *state) else 1


def test_a_crash_at_any_call_of_an_overwrite(tmp_path, sample_state, step_in, forked) -> None:
    assert write_state(tmp_path / "count", *sample_state(0), strict=True)
    held = []
    for stop in range(1, count_calls(tmp_path / "count", sample_state(2)) + 2):
        directory = tmp_path / str(stop)
        assert write_state(directory, *sample_state(1), strict=True)
        assert forked(lambda d=directory, n=stop: save_until(d, sample_state(2), n)) in (0, 77)
        held.append(step_in(directory))
    assert held == sorted(held) and set(held) == {1, 2}, held


class Gone(BaseException):
    """Raised by every call from some point on: what a killed process did not do, nobody does."""


def test_a_crash_at_any_call_of_two_saves_in_a_row(tmp_path, sample_state, step_in, monkeypatch) -> None:
    """The second crash meets whatever the first one left: the case in which a naive backup loses the only state."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # counted as a call; the order on the disk is not tested
    assert write_state(tmp_path / "count", *sample_state(0), strict=True)
    total = count_calls(tmp_path / "count", sample_state(1)) + 4  # the second save also removes what is stale

    def crash(directory: Path, step: int, stop: int) -> None:
        def action(number: int, name: str, args: tuple[Any, ...]) -> None:
            if number >= stop:
                raise Gone

        undo = wrap_calls(action)
        try:
            write_state(directory, *sample_state(step))
        except Gone:
            pass
        finally:
            undo()

    outcomes = set()
    through_previous = 0
    for first in range(1, total):
        for second in range(1, total):
            directory = tmp_path / f"{first}_{second}"
            assert write_state(directory, *sample_state(1), strict=True)
            crash(directory, 2, first)
            middle = step_in(directory)
            crash(directory, 3, second)
            outcomes.add((middle, step_in(directory)))
            through_previous += (directory / STATE_FOLDER / (TENSOR_FILE + PREVIOUS_SUFFIX)).exists()
            assert write_state(directory, *sample_state(4), strict=True)
            assert step_in(directory) == 4
            assert sorted(os.listdir(directory / STATE_FOLDER)) == COMMITTED
    assert outcomes == {(1, 1), (1, 3), (2, 2), (2, 3)}
    assert through_previous > 10, "the window between the two renames was not hit"


def test_a_crash_during_the_first_save_leaves_no_state_or_the_new_one(tmp_path, sample_state, step_in, forked) -> None:
    seen = set()
    for stop in range(1, count_calls(tmp_path / "count", sample_state(1)) + 2):
        directory = tmp_path / str(stop)
        forked(lambda d=directory, n=stop: save_until(d, sample_state(1), n))
        try:
            seen.add(step_in(directory))
        except StateMissingError:
            seen.add(None)
    assert seen == {None, 1}


# ------------------------------------------------------------------------------------------------ failing calls


@pytest.mark.parametrize("strict", [False, True])
def test_any_failing_call_keeps_a_whole_state(tmp_path, sample_state, step_in, strict, caplog) -> None:
    assert write_state(tmp_path / "count", *sample_state(0), strict=True)
    total = count_calls(tmp_path / "count", sample_state(1))
    failed = 0
    for number in range(1, total + 1):
        directory = tmp_path / str(number)
        assert write_state(directory, *sample_state(1), strict=True)
        calls: list[str] = []

        def fail(count: int, name: str, args: tuple[Any, ...], number: int = number, calls: list[str] = calls) -> None:
            calls.append(name)
            if count == number:
                raise OSError(5, "Input/output error")

        undo = wrap_calls(fail)
        caplog.clear()
        try:
            written = write_state(directory, *sample_state(2), strict=strict)
        except StateWriteError as error:
            assert strict and str(directory) in str(error) and "Input/output error" in str(error)
            written = False
        finally:
            undo()
        held = step_in(directory)
        failed += not written
        if written:
            assert held == 2
        else:
            assert strict or "could not be written" in caplog.text
            # The new state may be there only if what failed was the sync after the commit.
            assert held == 1 or calls[number - 1] in ("open", "fsync")
            leftovers = [name for name in os.listdir(directory / STATE_FOLDER) if name.startswith(".")]
            assert not leftovers or calls[number - 1] == "unlink"
        assert write_state(directory, *sample_state(3), strict=True)
        assert step_in(directory) == 3 and sorted(os.listdir(directory / STATE_FOLDER)) == COMMITTED
    assert failed >= 8


def test_every_call_failing_from_the_nth_on(tmp_path, sample_state, step_in) -> None:
    """Not even the clean-up works: a disk that is gone."""
    assert write_state(tmp_path / "count", *sample_state(0), strict=True)
    for number in range(1, count_calls(tmp_path / "count", sample_state(1)) + 1):
        directory = tmp_path / str(number)
        assert write_state(directory, *sample_state(1), strict=True)

        def fail(count: int, name: str, args: tuple[Any, ...], number: int = number) -> None:
            if count >= number:
                raise OSError(5, "Input/output error")

        undo = wrap_calls(fail)
        try:
            write_state(directory, *sample_state(2))
        finally:
            undo()
        assert step_in(directory) in (1, 2)
        assert write_state(directory, *sample_state(3), strict=True)
        assert step_in(directory) == 3 and sorted(os.listdir(directory / STATE_FOLDER)) == COMMITTED


@pytest.mark.parametrize("room", [0, 1, 500, 1500])
def test_a_full_disk_leaves_the_old_state(tmp_path, sample_state, step_in, forked, room) -> None:
    assert write_state(tmp_path, *sample_state(1), strict=True)
    assert min((tmp_path / STATE_FOLDER / name).stat().st_size for name in COMMITTED) > 500
    assert max((tmp_path / STATE_FOLDER / name).stat().st_size for name in COMMITTED) > 1500

    def save() -> int:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
        if write_state(tmp_path, *sample_state(2)):
            return 1
        try:
            write_state(tmp_path, *sample_state(2), strict=True)
        except StateWriteError:
            return 0
        return 2

    assert forked(save) == 0
    assert sorted(os.listdir(tmp_path / STATE_FOLDER)) == COMMITTED
    assert step_in(tmp_path) == 1


def test_a_place_that_cannot_hold_a_directory(tmp_path, sample_state, caplog) -> None:
    (tmp_path / "file").write_text("in the way")
    assert write_state(tmp_path / "file" / "below", *sample_state(1)) is False
    assert "could not be written" in caplog.text and "training goes on" in caplog.text
    with pytest.raises(StateWriteError, match="NotADirectoryError"):
        write_state(tmp_path / "file" / "below", *sample_state(1), strict=True)
    assert (tmp_path / "file").read_text() == "in the way"


def test_partial_writes_are_continued(tmp_path, sample_state, step_in, monkeypatch) -> None:
    whole, sizes = os.write, []

    def dribble(handle: int, data: Any) -> int:
        sizes.append(min(len(data), 7))
        return whole(handle, bytes(data)[:7])

    monkeypatch.setattr(os, "write", dribble)
    assert write_state(tmp_path, *sample_state(8), strict=True)
    monkeypatch.undo()
    assert len(sizes) > 100
    assert step_in(tmp_path) == 8


def test_an_interrupt_cleans_up_and_passes_through(tmp_path, sample_state, step_in, monkeypatch) -> None:
    assert write_state(tmp_path, *sample_state(1), strict=True)
    replace = os.replace

    def interrupt(source: Any, target: Any) -> None:
        if Path(target).name == MANIFEST_FILE:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_state(tmp_path, *sample_state(2))
    monkeypatch.undo()
    assert sorted(os.listdir(tmp_path / STATE_FOLDER)) == COMMITTED
    assert step_in(tmp_path) == 1


def test_a_damaged_old_state_does_not_stop_a_new_one(tmp_path, sample_state, step_in) -> None:
    for name in COMMITTED:
        assert write_state(tmp_path, *sample_state(1), strict=True)
        (tmp_path / STATE_FOLDER / name).write_bytes(b"damaged")
        with pytest.raises(StateError):
            read_state(tmp_path)
        assert write_state(tmp_path, *sample_state(2), strict=True)
        assert step_in(tmp_path) == 2 and sorted(os.listdir(tmp_path / STATE_FOLDER)) == COMMITTED


def test_only_our_own_stale_files_are_removed(tmp_path, sample_state) -> None:
    keep = [".state.safetensors.tmp.backup", "x.state.json.tmp.1", "model.safetensors", ".state.json.tmp.", "a.jsonl"]
    (tmp_path / STATE_FOLDER).mkdir()
    for name in [*keep, ".state.json.tmp.1", ".state.safetensors.tmp.99999"]:
        (tmp_path / STATE_FOLDER / name).write_text("x")
    assert write_state(tmp_path, *sample_state(1), strict=True)
    assert sorted(os.listdir(tmp_path / STATE_FOLDER)) == sorted([*keep, *COMMITTED])
    assert checkpoint.has_state(tmp_path)
