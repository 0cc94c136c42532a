"""The report: one page that needs nothing else, from any state in which a run can be."""

from __future__ import annotations

import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import CliRunner
from event_logs import event, finished, started, step, training, write_run
from rich.console import Console

from shoal.cli.report import report
from shoal.dashboard.report import print_report, write_report
from shoal.errors import RunError
from shoal.events import Event
from shoal.run import Run

_VOID = {"meta"}


class Balanced(HTMLParser):
    """Fails on a tag that is closed out of order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        pass  # `<path .../>` closes itself

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def validation(t: float, number: int, loss: float | None, **fields: object) -> Event:
    return event(
        t, "rank-0", "validation", **{"step": number, "loss": loss, "metrics": {"accuracy": 0.5}, "best": True} | fields
    )


def whole_run() -> list[Event]:
    saved = event(
        1004.2, "rank-0", "checkpoint_saved", step=40, path="checkpoints/x", size_bytes=5000, stall_s=0.1, write_s=1.0
    )
    told = [validation(1004.1, 40, 2.0), saved, event(1004.3, "rank-0", "sample", text="once upon")]
    return [*training(1, 40), *told, *(finished(1005.0, rank) for rank in range(4))]


def killed_run() -> list[Event]:
    killed = event(1005.0, "launcher", "worker_exited", rank=2, pid=9, exit_code=-9)
    lost = event(
        1004.9, "rank-1", "error", step=40, error="PeerLostError", message="gone", traceback="Tr", symptom=True
    )
    return [*training(1, 40), killed, lost]


def run_of_nans() -> list[Event]:
    steps = [step(1000.0 + number, 0, number, loss=None, lr=None, epoch=None) for number in range(1, 9)]
    return [started(1000.0, 0, 1), *steps, validation(1010.0, 8, None, metrics={"accuracy": None})]


def one_step() -> list[Event]:
    return training(1, 1, world_size=1)


STATES = {
    "whole": whole_run(),
    "killed": killed_run(),
    "nans": run_of_nans(),
    "one step": one_step(),
    "no step": [started(1000.0, rank, 4) for rank in range(4)],
    "no event": [],
    "only a validation": [started(1000.0, 0, 1), validation(1001.0, 0, 4.0)],
    "steps of no time": [started(1000.0, 0, 1), step(1000.0, 0, 1, step_s=0.0, compute_s=0.0, samples=0)],
}


def printed(run: Run, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width)
    print_report(run, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("state", STATES)
def test_a_run_in_any_state_has_a_page_a_picture_and_a_print(tmp_path: Path, state: str) -> None:
    run = write_run(tmp_path / "run", STATES[state])
    assert write_report(run) == run.report
    page = run.report.read_text()
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    assert not re.search(r"\bnan\b|\binf\b|None</b>", page)
    assert run.curve.read_bytes().startswith(b"\x89PNG")
    assert str(run.report) in printed(run)


def test_the_page_needs_nothing_from_outside(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", whole_run())
    page = write_report(run).read_text()
    assert not re.search(r"https?:|//|<script|<link|@import|src=", page)


def test_text_of_the_run_is_escaped_everywhere(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    events = whole_run()
    for one in events:
        one |= {name: evil for name in ("job", "node", "device", "text", "reason", "path") if name in one}
    events += [
        event(1006.0, "rank-0", "warning", message=evil),
        event(1006.0, "rank-0", "error", step=1, error=evil, message=evil, traceback=evil, symptom=False),
        validation(1006.0, 40, 1.0, metrics={evil: 1.0}),
    ]
    run = write_run(tmp_path / "run", events, plan=evil)
    run.write_info({"job": evil, evil: evil})
    assert "<script" not in write_report(run).read_text()


def test_the_page_shows_what_was_asked_of_it(tmp_path: Path) -> None:
    page = write_report(write_run(tmp_path / "run", whole_run())).read_text()
    for words in ("charlm.py:job", "finished: steps", "once upon", "replicate = 4", "checkpoints/x", "2.13.0"):
        assert words in page
    for title in ("Loss", "Sample", "Where the time went", "Throughput and traffic", "Checkpoints", "Plan"):
        assert f"<h2>{title}</h2>" in page


def test_a_killed_run_names_who_was_killed_and_what_followed(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", killed_run())
    page = write_report(run).read_text()
    assert "rank 2 was ended by SIGKILL" in page
    assert "rank 2 was ended by SIGKILL" in printed(run)
    assert "followed from another rank" in page
    assert "PeerLostError" in printed(run)


def test_a_long_run_gives_a_page_of_bounded_size(tmp_path: Path) -> None:
    events = training(1, 6000, world_size=1) + [validation(2000.0 + n, n, 2.0) for n in range(200)]
    page = write_report(write_run(tmp_path / "run", events)).read_text()
    assert len(page) < 300_000


def test_a_folder_that_is_no_run_is_refused_and_left_alone(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"run\.json"):
        write_report(Run(tmp_path))
    with pytest.raises(RunError, match=r"run\.json"):
        print_report(Run(tmp_path), Console(file=io.StringIO()))
    assert list(tmp_path.iterdir()) == []


def test_the_print_shows_the_curve_the_bars_and_the_sample(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", whole_run())
    text = printed(run)
    assert re.search("[\u2801-\u28ff]", text)
    assert text.count("rank ") >= 4
    assert "once upon" in text
    assert "●" in text


def test_brackets_in_a_sample_are_text_and_not_markup(tmp_path: Path) -> None:
    told = event(1006.0, "rank-0", "sample", text="[red]a[/nothing] list[int]")
    assert "[red]a[/nothing] list[int]" in printed(write_run(tmp_path / "run", [*whole_run(), told]))


def test_control_codes_in_a_sample_do_not_reach_the_terminal(tmp_path: Path) -> None:
    told = event(1006.0, "rank-0", "sample", text="a\x1b[31mb\x00c\n\tline two")
    run = write_run(tmp_path / "run", [*whole_run(), told])
    assert "a·[31mb·c" in printed(run)
    assert "\x1b" not in write_report(run).read_text()


def test_the_command_ends_stdout_with_one_json_object(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", whole_run())
    result = CliRunner().invoke(report, [str(run.path), "--json"])
    assert result.exit_code == 0
    assert json.loads(result.stdout)["steps"] == 40
    assert "charlm.py:job" in result.stderr


def test_the_command_without_json_prints_to_stdout(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", whole_run())
    result = CliRunner().invoke(report, [str(run.path)])
    assert result.exit_code == 0
    assert "finished: steps" in result.stdout
