"""The fold: later occurrences win in curves, what was really spent counts, and nothing odd in a log stops it."""

from __future__ import annotations

import json
import random

import pytest
from event_logs import STEP_S, event, finished, started, step, training, write_run

from shoal.dashboard.curve import apportion, braille, smooth, sparkline, thin, ticks, value_range
from shoal.dashboard.folding import fold
from shoal.dashboard.history import History, summary
from shoal.events import EventReader


def resumed_run() -> list:
    """Steps 1 to 12, killed; a gap of 1000 s; resumed at step 10, on to step 20 and a regular end."""
    again = training(11, 20, t=2000.0)
    back = event(2000.01, "rank-0", "resumed", step=10, checkpoint="checkpoints/step-00000010")
    ends = [finished(2000 + 10 * STEP_S + 0.5, rank) for rank in range(4)]
    return [*training(1, 12), *again[:4], back, *again[4:], *ends]


def test_every_step_of_rank_0_is_a_point_of_the_curve() -> None:
    history = fold(training(1, 30))
    assert [point.step for point in history.points] == list(range(1, 31))
    assert history.points[-1].samples == 30 * 64
    assert history.points[-1].bytes_sent == 30 * 1000
    assert history.points[-1].seconds == pytest.approx(30 * STEP_S)


def test_folding_piece_by_piece_gives_what_folding_at_once_gives() -> None:
    events = resumed_run()
    piecewise = History()
    for index in range(0, len(events), 7):
        fold(events[index : index + 7], piecewise)
    assert piecewise == fold(events)


def test_a_repeated_step_counts_once_in_the_curve_and_the_later_one_wins() -> None:
    events = resumed_run()
    for one in events:
        if one["kind"] == "step" and one["t"] >= 2000:
            one["loss"] = 0.5
    history = fold(events)
    assert [point.step for point in history.points] == list(range(1, 21))
    assert history.points[10].loss == 0.5
    assert history.points[9].loss != 0.5
    assert history.samples == 20 * 64


def test_a_resume_forgets_at_once_what_the_model_has_lost() -> None:
    events = [*training(1, 12), event(1001.3, "rank-0", "validation", step=12, loss=1.0, metrics={}, best=True)]
    history = fold([*events, started(2000.0, 0, 4), event(2000.1, "rank-0", "resumed", step=10)])
    assert history.step == 10
    assert history.validations == []


def _view(t: float, rank: int, epoch: int, seats: list[int]) -> dict:
    cause = "start" if epoch == 1 else "somebody joins"
    fields = {"epoch": epoch, "rank": rank, "seats": seats, "cause": cause, "planned": epoch > 1, "step": 0}
    return event(t, f"rank-{rank}", "view", **fields)


def test_an_attempts_first_view_is_told_before_its_beginning_and_counts() -> None:
    """Each worker tells of its first view, and then that it begins; the others' may come in between, or not."""
    first = [_view(999.0, 0, 1, [0, 1]), started(999.1, 0, 2), _view(999.2, 1, 1, [0, 1]), started(999.3, 1, 2)]
    both = [_view(999.0, 0, 1, [0, 1]), _view(999.0, 1, 1, [0, 1]), started(999.1, 0, 2), started(999.3, 1, 2)]
    for events in (first, both):
        history = fold([*events, _view(1001.0, 0, 2, [0, 1, 2])])
        assert [view.seats for view in history.members.views.values()] == [[0, 1], [0, 1, 2]]
        assert len(history.members.lines()) == 1
        again = [{**one, "t": one["t"] + 1000, "attempt": "second"} for one in events]
        fold(again, history)
        assert [view.seats for view in history.members.views.values()] == [[0, 1]]


def test_who_never_came_in_is_told_and_fails_no_run() -> None:
    """Whoever asks to join an elastic run may be refused: no matter of those who train."""
    views = [_view(999.0 + 0.01 * rank, rank, 1, [0, 1]) for rank in range(2)]
    refused = event(1000.2, "rank-2", "error", error="CoordinatorError", message="its code is another", symptom=False)
    history = fold([*views, *training(1, 3), refused])
    assert history.failures == []
    assert history.state == "unfinished"
    assert [note.message for note in history.warnings] == ["rank 2 did not come in: its code is another"]
    member = {**refused, "source": "rank-1", "t": 1000.3}
    assert fold([member], history).state == "failed"


def test_going_back_to_copies_of_lost_shards_forgets_those_steps_and_is_told() -> None:
    told = event(1011.0, "rank-0", "rolled_back", step=6, from_step=10, state_from="memory")
    history = fold([*training(1, 10), told])
    assert [point.step for point in history.points][-1] == 6
    assert "training went back from step 10 to 6, to the copies in other ranks' memory" in history.warnings[0].message


def test_seconds_leave_out_the_time_in_which_the_run_was_dead() -> None:
    history = fold(resumed_run())
    assert history.seconds == pytest.approx(12 * STEP_S + 10 * STEP_S + 0.5)
    seconds = [point.seconds for point in history.points]
    assert seconds == sorted(seconds)


def test_what_comes_after_training_is_no_training_time() -> None:
    assert fold([*training(1, 10), finished(1060.0, 0, seconds=1.25)]).seconds == pytest.approx(1.25)


def test_a_warning_on_the_way_to_a_resume_does_not_bring_the_dead_time_back() -> None:
    events = [*training(1, 12), event(1999.0, "rank-0", "warning", message="an old file"), started(2000.0, 0, 4)]
    assert fold(events).seconds == pytest.approx(12 * STEP_S)


def test_time_and_bytes_of_repeated_steps_count_in_full() -> None:
    history = fold(resumed_run())
    assert [rank.bytes_sent for rank in history.ranks.values()] == [22_000] * 4
    assert history.ranks[0].total.compute_s == pytest.approx(22 * 0.05)


def test_the_parts_of_the_time_add_up_to_the_steps() -> None:
    history = fold(training(1, 5))
    for rank in history.ranks.values():
        assert rank.total.total_s == pytest.approx(5 * STEP_S)
        assert rank.total.other_s == pytest.approx(5 * 0.01)


def test_overlapping_parts_never_give_a_negative_rest() -> None:
    history = fold([*training(1, 1), step(1001.0, 0, 2, compute_s=0.1, wait_s=0.1)])
    assert history.ranks[0].total.other_s == pytest.approx(0.01)


def test_bytes_sent_between_steps_are_taken_from_the_end_of_the_run() -> None:
    history = fold([*training(1, 5), finished(1010.0, 1, bytes_sent=9_999)])
    assert [rank.bytes_sent for rank in history.ranks.values()] == [5000, 9999, 5000, 5000]


def test_a_loss_that_is_not_finite_is_none_and_the_json_stays_json() -> None:
    odd = event(1003.0, "rank-0", "validation", step=7, loss=None, metrics={"accuracy": float("nan")}, best=False)
    history = fold([*training(1, 6), step(1002.0, 0, 7, loss=None), odd])
    assert history.loss is None
    text = json.dumps(summary(history, "run"), allow_nan=False)
    assert json.loads(text)["metrics"] == {"accuracy": None}


def test_unknown_kinds_unknown_fields_and_missing_fields_are_passed_over() -> None:
    events = [
        event(1.0, "rank-0", "weather", sky="blue"),
        event(1.0, "nobody", "run_started"),
        event(1.0, "rank-x", "step", step=3),
        event(2.0, "rank-0", "run_started", moon="full"),
        event(3.0, "rank-0", "step", mood="good"),
        event(4.0, "rank-0", "validation"),
        event(5.0, "rank-0", "checkpoint_saved"),
        event(5.0, "rank-0", "error"),
        event(6.0, "launcher", "worker_exited"),
    ]
    assert fold(events).points[0].loss is None
    json.dumps(summary(fold(events), "run"), allow_nan=False)


def test_torn_lines_are_passed_over_and_a_half_written_one_is_read_when_it_is_whole(tmp_path) -> None:
    run = write_run(tmp_path / "run", training(1, 3, world_size=1))
    log = run.events / "rank-0.jsonl"
    line = json.dumps(step(1000.4, 0, 4))
    with log.open("a") as file:
        file.write('{"t": 1000.35, "source": "rank-0", "ki\n' + line[:40])
    reader = EventReader(run.events)
    history = fold(reader.poll())
    assert history.step == 3
    with log.open("a") as file:
        file.write(line[40:] + "\n")
    assert fold(reader.poll(), history).step == 4


def test_no_events_make_an_empty_history_with_a_summary() -> None:
    told = summary(fold([]), "run")
    assert told["state"] == "empty"
    assert told["steps"] == told["samples"] == 0
    assert told["bytes_sent_per_rank"] == []
    assert told["loss"] is told["val_loss"] is told["step_ms_median"] is told["samples_per_second"] is None


def test_summary_has_the_promised_keys_and_figures() -> None:
    best = event(1000.5, "rank-0", "validation", step=5, loss=2.5, metrics={"accuracy": 0.5}, best=True)
    last = event(1003.5, "rank-0", "validation", step=30, loss=2.7, metrics={"accuracy": 0.4}, best=False)
    ends = [finished(1004.0, rank) for rank in range(4)]
    told = summary(fold([*training(1, 4), best, *training(5, 30)[4:], last, *ends]), "runs/one")
    assert told["steps"] == 30
    assert told["samples"] == 30 * 64
    assert told["seconds"] == pytest.approx(4.0)
    assert told["step_ms_median"] == pytest.approx(100)
    assert told["samples_per_second"] == pytest.approx(640)
    assert (told["val_loss"], told["best_val_loss"], told["best_step"]) == (2.7, 2.5, 5)
    assert told["metrics"] == {"accuracy": 0.4}
    assert told["bytes_sent_per_rank"] == [30_000] * 4
    assert told["peak_memory_bytes_per_rank"] == [300_000_000 + rank for rank in range(4)]
    assert (told["plan"], told["run"], told["reason"]) == ("3f9a0c1d", "runs/one", "steps")


def test_bytes_between_the_steps_of_a_resumed_attempt_are_added_to_those_before() -> None:
    history = fold([*training(1, 5), *training(6, 10, t=2000.0), finished(2010.0, 0, bytes_sent=5_700)])
    assert history.ranks[0].bytes_sent == 5_000 + 5_700


def test_a_rank_that_was_never_heard_is_none_in_the_summary() -> None:
    told = summary(fold([started(1.0, 0, 3), step(1.1, 0, 1)]), "run")
    assert told["bytes_sent_per_rank"] == [1000, None, None]


@pytest.mark.parametrize(
    ("extra", "state"),
    [
        ([], "unfinished"),
        ([event(1002.0, "launcher", "worker_exited", rank=1, pid=7, exit_code=-9)], "failed"),
        ([event(1002.0, "rank-1", "error", error="ValueError", message="no", symptom=False)], "failed"),
        ([event(1002.0, "launcher", "worker_exited", rank=1, pid=7, exit_code=0), finished(1002.0, 0)], "finished"),
    ],
)
def test_the_state_says_how_the_run_ended(extra: list, state: str) -> None:
    assert fold([*training(1, 5), *extra]).state == state


def test_a_new_attempt_takes_back_the_failure_of_the_one_before() -> None:
    failed = event(1002.0, "rank-1", "error", error="ValueError", message="no", symptom=False)
    history = fold([*training(1, 5), failed, *training(1, 6, t=2000.0)])
    assert history.state == "unfinished"
    assert len(history.failures) == 1
    assert history.step == 6


def test_the_same_warning_of_many_ranks_is_kept_once_and_counted() -> None:
    warnings = [event(1.0 + rank, f"rank-{rank}", "warning", message="slow") for rank in range(5)]
    history = fold(warnings)
    assert [(note.message, note.count) for note in history.warnings] == [("slow", 5)]


def test_checkpoints_that_failed_or_were_damaged_are_warnings() -> None:
    failed = event(1.0, "rank-0", "checkpoint_failed", step=5, message="disk full")
    damaged = event(2.0, "rank-0", "checkpoint_damaged", checkpoint="step-00000005", message="bad sum")
    messages = [note.message for note in fold([failed, damaged]).warnings]
    assert "step 5: disk full" in messages[0]
    assert "step-00000005: bad sum" in messages[1]


def test_smoothing_keeps_a_constant_and_its_gaps_and_does_not_lag() -> None:
    assert smooth([2.0, None, 2.0, 2.0]) == pytest.approx([2.0, None, 2.0, 2.0])
    line = [float(index) for index in range(101)]
    assert smooth(line)[50] == pytest.approx(50)
    assert smooth([]) == []


def test_thinning_keeps_the_extremes() -> None:
    points = [(float(index), random.Random(index).random()) for index in range(10_000)]
    points[5_000] = (5_000.0, 9.0)
    thinned = thin(points, 500)
    assert len(thinned) <= 502
    assert max(y for _, y in thinned) == 9.0
    assert thinned == sorted(thinned)


@pytest.mark.parametrize("parts", [[1.0, 1.0, 1.0], [0.0, 5.0], [1e-9, 3.0, 7.0], [0.3]])
@pytest.mark.parametrize("width", [1, 7, 40])
def test_apportioned_cells_fill_the_width_exactly(parts: list[float], width: int) -> None:
    assert sum(apportion(parts, width)) == width


def test_nothing_to_apportion_gives_no_cells() -> None:
    assert apportion([0.0, 0.0], 10) == [0, 0]


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-3.0, 1e6), (1.00001, 1.00002), (5.0, 5.0)])
def test_ticks_lie_within_the_axis_and_are_few(low: float, high: float) -> None:
    marks = ticks(low, high)
    assert 1 <= len(marks) <= 11
    assert all(low - 1e-9 * abs(low) <= mark <= high * (1 + 1e-9) for mark in marks)


def test_an_axis_of_nothing_or_of_one_value_has_a_width() -> None:
    for values in ([], [0.0], [3.0, 3.0]):
        low, high = value_range(values)
        assert low < high


def test_drawings_in_characters_have_the_size_that_was_asked() -> None:
    assert len(sparkline([float(index) for index in range(1000)], 24)) == 24
    assert sparkline([1.0, None, 3.0], 10) == "▁ █"
    assert sparkline([], 10) == ""
    rows = braille([(0.0, 0.0), (1.0, 1.0)], (10, 4), (0.0, 1.0), (0.0, 1.0))
    assert [len(row) for row in rows] == [10] * 4
    assert rows[0][-1] != " "
    assert rows[-1][0] != " "
