"""The event log loses nothing that was written, survives a crash of its writer, and reads back in order of time."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path

import pytest

from shoal.errors import MachineError
from shoal.events import EventLog, EventReader, read_events


def lines_of(path: Path) -> list[str]:
    return path.read_text().splitlines()


def test_every_event_has_time_source_and_kind(tmp_path: Path) -> None:
    with EventLog(tmp_path / "rank-0.jsonl", "rank-0") as log:
        log.write("step", step=1, loss=0.5)
    (event,) = read_events(tmp_path)
    assert (event["source"], event["kind"], event["step"], event["loss"]) == ("rank-0", "step", 1, 0.5)
    assert isinstance(event["t"], float)


def test_an_event_is_with_the_system_before_write_returns(tmp_path: Path) -> None:
    with EventLog(tmp_path / "a.jsonl", "a") as log:
        for step in range(3):
            log.write("step", step=step)
            assert [event["step"] for event in read_events(tmp_path)] == list(range(step + 1))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_json_cannot_carry_is_written_as_null(tmp_path: Path, value: float) -> None:
    with EventLog(tmp_path / "a.jsonl", "a") as log:
        log.write("validation", loss=value, metrics={"accuracy": value, "deep": {"er": value}})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    (line,) = lines_of(tmp_path / "a.jsonl")
    event = json.loads(line, parse_constant=refuse)
    assert event["loss"] is None
    assert event["metrics"] == {"accuracy": None, "deep": {"er": None}}


@pytest.mark.parametrize("text", ["", "two\nlines", "\r\x85\u2028 separators", 'quotes " and \\', "fish 🐟", "\x00"])
def test_any_text_is_one_line_and_reads_back(tmp_path: Path, text: str) -> None:
    with EventLog(tmp_path / "a.jsonl", "a") as log:
        log.write("warning", message=text)
        log.write("after")
    assert [event.get("message") for event in read_events(tmp_path)] == [text, None]


def test_events_of_all_processes_are_ordered_by_time(tmp_path: Path) -> None:
    for source, times in (("rank-0", (1, 4)), ("rank-1", (2, 3)), ("launcher", (0, 5))):
        text = "".join(json.dumps({"t": t, "source": source, "kind": "step"}) + "\n" for t in times)
        (tmp_path / f"{source}.jsonl").write_text(text)
    assert [event["t"] for event in read_events(tmp_path)] == [0, 1, 2, 3, 4, 5]


def test_a_line_torn_by_a_crash_spoils_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with EventLog(path, "a") as log:
        log.write("before")
    with path.open("a") as file:
        file.write('{"t": 1.0, "source": "a", "ki')
    with EventLog(path, "a") as log:
        log.write("after")
    assert [event["kind"] for event in read_events(tmp_path)] == ["before", "after"]


@pytest.mark.parametrize(
    "line", ["", "null", "[]", "7", "{}", '{"t": "soon", "source": "a", "kind": "b"}', '{"t": 1, "kind": "b"}', "\xff"]
)
def test_a_line_that_is_no_event_is_passed_over(tmp_path: Path, line: str) -> None:
    whole = json.dumps({"t": 1.0, "source": "a", "kind": "step"})
    (tmp_path / "a.jsonl").write_bytes(f"{whole}\n{line}\n{whole}\n".encode("latin-1"))
    assert len(read_events(tmp_path)) == 2


def test_a_reader_gives_each_event_once_and_waits_for_whole_lines(tmp_path: Path) -> None:
    reader, path = EventReader(tmp_path), tmp_path / "a.jsonl"
    whole = json.dumps({"t": 1.0, "source": "a", "kind": "step"}) + "\n"
    assert reader.poll() == []
    for text, num_events in ((whole, 1), (whole[:10], 0), (whole[10:-1], 0), ("\n", 1), (whole * 3, 3), ("", 0)):
        with path.open("a") as file:
            file.write(text)
        assert len(reader.poll()) == num_events
    with EventLog(tmp_path / "late.jsonl", "late") as log:
        log.write("hello")
    assert [event["kind"] for event in reader.poll()] == ["hello"]


def test_a_folder_that_does_not_exist_holds_no_events(tmp_path: Path) -> None:
    assert read_events(tmp_path / "none") == []


def test_what_the_disk_refuses_for_a_while_is_written_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, room = os.write, [10]

    def write(descriptor: int, data: bytes) -> int:
        if room[0] <= 0:
            raise OSError(28, "No space left on device")
        taken = data[: room[0]]
        room[0] -= len(taken)
        return real(descriptor, taken)

    monkeypatch.setattr("shoal.events.os.write", write)
    with EventLog(tmp_path / "patient.jsonl", "rank-0", patience_s=60.0) as log:
        for number in range(3):
            log.write("step", step=number)
        room[0] = 1 << 20
        log.write("step", step=3)
    assert [event["step"] for event in read_events(tmp_path)] == [0, 1, 2, 3]
    room[0] = 0
    with EventLog(tmp_path / "impatient.jsonl", "rank-0") as log, pytest.raises(MachineError, match="No space left"):
        log.write("step", step=0)


@pytest.mark.parametrize("jump_s", [-3600.0, 3600.0])
def test_a_clock_that_jumps_is_named_and_moves_no_event(
    jump_s: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = time.time
    with EventLog(tmp_path / "a.jsonl", "a") as log:
        log.write("step", step=1)
        monkeypatch.setattr(time, "time", lambda: real() + jump_s)
        log.write("step", step=2)
        log.write("step", step=3)
    first, warning, *others = read_events(tmp_path)
    assert (first["step"], [event["step"] for event in others]) == (1, [2, 3])
    assert warning["message"] == f"the clock of a jumped by {jump_s:+,.0f} s; its events go on as if it had not"
    assert 0 <= others[-1]["t"] - first["t"] < 60


def test_a_clock_that_is_set_a_little_is_followed_but_never_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = time.time
    with EventLog(tmp_path / "a.jsonl", "a") as log:
        for step, ahead_s in enumerate([0.0, 2.0, 4.0, 1.0]):
            monkeypatch.setattr(time, "time", lambda ahead_s=ahead_s: real() + ahead_s)
            log.write("step", step=step)
    events = read_events(tmp_path)
    assert [event["step"] for event in events] == [0, 1, 2, 3]
    assert 3.9 < events[-1]["t"] - events[0]["t"] < 60


def test_a_log_that_is_opened_again_after_its_clock_went_back_goes_on_behind_its_last_event(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = time.time
    for attempt, ahead_s in enumerate([7200.0, 0.0]):
        monkeypatch.setattr(time, "time", lambda ahead_s=ahead_s: real() + ahead_s)
        with EventLog(tmp_path / "a.jsonl", "a") as log:
            log.write("step", step=attempt)
    before, warning, after = read_events(tmp_path)
    assert (before["step"], after["step"]) == (0, 1)
    assert "jumped by -7,200 s" in warning["message"]
    assert after["t"] >= before["t"]
