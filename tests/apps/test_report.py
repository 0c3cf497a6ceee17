"""Runs record their steps and traces, and a report draws them, from runs of older versions, too."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import tomli_w
from mpi4py import MPI

from colossal_mpi import Grid, comm
from colossal_mpi.apps import config as configs
from colossal_mpi.apps import report, text
from colossal_mpi.apps.cli.report import Report
from colossal_mpi.apps.report.curves import running_median
from colossal_mpi.apps.run_directory import PLOTS, RunDirectory
from colossal_mpi.apps.training import meter as meter_module
from colossal_mpi.apps.training.meter import Meter
from colossal_mpi.apps.training.trace import KINDS, Trace
from colossal_mpi.apps.training.trainer import Trainer
from colossal_mpi.errors import ConfigError
from colossal_mpi.layers.analysis.flops import hardware_flop, model_flop
from colossal_mpi.machine import measure_flops
from tests.reference.modes import mode_of

SMALL = {"model": {"layers": 2, "hidden": 20, "heads": 5, "context": 12}}


def metered(grid, path, peak=1e9, steps=(2,)):
    """Return the rows of two steps of a small run, measured, and the run."""
    parallel = {"grid": dict(grid.axes), "tensor": mode_of(grid) or "none", "schedule": "zero-bubble"}
    parallel["kernels"] = "reference"
    training, run = {"batch": 5, "microbatches": 2}, {"peak_flops": peak}
    trainer = Trainer(configs.validate(SMALL | {"training": training, "parallel": parallel, "run": run}, "x"), grid)
    meter, rows = Meter(trainer, RunDirectory(path), steps), []
    for step in range(2):
        with meter.measure(step + 1) as row:
            trainer.step(step)
        rows.append(row)
    return rows, meter


@pytest.mark.grids({"pipe": 2, "data": 2})
def test_rows_have_words_by_axis_utilisation_and_the_memory_of_every_rank(grid, shared_path):
    rows, meter = metered(grid, shared_path)
    row, moved = rows[-1], meter.moved
    flop = [f(meter.trainer.model, 5, 12) for f in (model_flop, hardware_flop)]
    assert [row["mfu"], row["hfu"]] == pytest.approx([one / row["seconds"] / 1e9 for one in flop])
    assert row["tokens_per_second"] == pytest.approx(5 * 12 / row["seconds"])
    assert row["words_by_axis"] == moved.by_axis()
    assert sum(row["words_by_axis"].values()) == row["words_received"] == moved.words > 0
    assert {"pipe", "data"} <= set(row["words_by_axis"])
    assert 0 < sum(row["seconds_by_axis"].values()) < row["seconds"]
    told, words = meter.ranks(), comm.collect(moved.by_axis(), grid)
    if grid.rank:
        assert told == {}
        return
    assert told["ranks"]["words"] == words
    assert all(size > 1e7 for size in told["ranks"]["memory"])
    assert len(told["ranks"]["memory"]) == 4
    facts = RunDirectory(shared_path).facts()
    assert (facts["peak_flops"], facts["peak_of"]) == (1e9, "run.peak_flops")
    assert (facts["model_flop"], facts["machine"]["ranks"]) == (flop[0], 4)


@pytest.mark.grids({"pipe": 2, "data": 2}, {"row": 2, "col": 2})
def test_a_trace_has_one_process_a_rank_and_slices_that_nest(grid, shared_path):
    metered(grid, shared_path, steps=(1, 2))
    if grid.rank:
        return
    events = json.loads((shared_path / "trace.json").read_text())["traceEvents"]
    assert {event["pid"] for event in events} == set(range(4))
    names = [event["args"]["name"] for event in events if event["name"] == "process_name"]
    assert re.fullmatch(r"rank 1 \((pipe=0, data=1|row=0, col=1)\)", names[1])
    for rank in range(4):
        check_track([event for event in events if event["pid"] == rank])
    assert {event["args"]["step"] for event in events if event.get("cat") == "step"} == {1, 2}
    layers = {event["name"] for event in events if "layer" in event.get("args", {})}
    assert {"blocks.0", "blocks.1.attention.qkv", "head"} <= layers
    if "pipe" in grid.axes:  # the last stage has further weight products, and the first waits for it
        assert any(event["cat"] == "weight" and event["args"].get("microbatch") == 1 for event in events[16:])
        assert any(event["cat"] == "idle" and event["name"] == "receive pipe" for event in events[16:])


def check_track(events):
    """Check that complete slices of a rank are nested or disjoint, and that asynchronous ones are closed."""
    complete = [event for event in events if event["ph"] == "X"]
    assert {event["cat"] for event in complete} <= {"step", *KINDS}
    assert {"step", "forward", "backward", "update", "comm"} <= {event["cat"] for event in complete}
    slack, open_ = 2e-3, []  # microseconds are written with three digits
    for event in sorted(complete, key=lambda event: (event["ts"], -event["dur"])):
        assert event["dur"] >= 0 <= event["ts"]
        while open_ and event["ts"] >= open_[-1] - slack:
            open_.pop()
        assert not open_ or event["ts"] + event["dur"] <= open_[-1] + slack, event
        open_.append(event["ts"] + event["dur"])
        assert (event["cat"] == "step") == (len(open_) == 1)
    ends = {end: {event["id"]: event["ts"] for event in events if event["ph"] == end} for end in "be"}
    assert ends["b"].keys() == ends["e"].keys()
    assert all(ends["b"][i] <= ends["e"][i] for i in ends["b"])


def test_nodes_whose_counters_differ_are_put_on_one_clock(tmp_path):
    trace, wait = Trace(Grid(MPI.COMM_SELF), tmp_path / "trace.json"), ("wait", "comm", 66.25, 66.5, {})
    trace._add_all([("a", 1.7e9, 1, 5.0, 6.0, [], []), ("b", 1.7e9 - 60, 1, 66.0, 67.0, [wait], [])])
    times = [(event["pid"], event["ts"], event["dur"]) for event in trace._events]
    assert times == [(0, 0, 1e6), (1, 1e6, 1e6), (1, 1.25e6, 0.25e6)]


def test_the_peak_is_measured_once_for_a_machine(tmp_path, monkeypatch):
    grid = Grid(MPI.COMM_SELF)
    assert measure_flops(grid, "float32") > 1e6
    measured = []
    monkeypatch.setattr(meter_module, "measure_flops", lambda grid, dtype: measured.append(dtype) or 2e9)
    for _ in range(2):
        _, meter = metered(grid, tmp_path, peak=0)
        assert meter.peak == 2e9
    assert measured == ["float32"]
    assert "float32 on 1 rank at once" in RunDirectory(tmp_path).facts()["peak_of"]


def make_run(path, steps, config=None, old=False):
    """Write a run's directory as `train` does; if `old`, as a version without run.json and ranks did."""
    (path / "report").mkdir(parents=True)
    table = {"training": {"clip": 1.0, "steps": 80}, "parallel": {"tensor": "2d", "grid": {"row": 2}}, **(config or {})}
    (path / "config.toml").write_text(tomli_w.dumps(table))
    axes = {"row": 1234567, "row,col": 89}
    for i in range(1, steps + 1):
        row = {"step": i, "loss": 5.0 / i, "gradient_norm": 100.0 / i**2, "learning_rate": 1e-3}
        row |= {"seconds": 0.5, "tokens_per_second": 2048.0, "words_received": 1234656}
        if not old:
            row |= {"mfu": 0.25, "hfu": 0.3, "loss_scale": 2.0**16, "words_by_axis": axes}
            row["gradient_norm"] = None if i == 3 else row["gradient_norm"]  # an overflow of 16-bit floats
        if i % 10 == 0:
            row |= {"val_loss": 5.5 / i, "val_accuracy": i / 100}
        if i % 10 == 0 and not old:
            row["ranks"] = {"memory": [3 << 29, 1 << 30], "words": [axes] * 2, "seconds": [{"row": 0.1}, {"row": 0.3}]}
        RunDirectory(path).append(row)
    if not old:
        (path / "trace.json").write_text(json.dumps({"traceEvents": list(trace())}))
        facts = {
            "task": "GPT",
            "per": "token",
            "parameters": 1032576,
            "peak_flops": 2.5e11,
            "peak_of": "run.peak_flops",
        }
        RunDirectory(path).write_facts(facts | {"machine": {"ranks": 2, "versions": {"numpy": "9.9"}}})
    return path


def trace():
    for rank in range(2):
        for name, kind, start, width, what in (
            ("step 3", "step", 0, 90, {"step": 3}),
            ("forward microbatch 0", "forward", 1, 30, {"microbatch": 0}),
            ("blocks.0", "forward", 2, 10, {"layer": "blocks.0"}),
            ("receive pipe", "idle", 31, 20, {"words": 3}),
            ("backward microbatch 0", "backward", 51, 30, {"microbatch": 0}),
        ):
            yield {"name": name, "cat": kind, "ph": "X", "ts": start, "dur": width, "pid": rank, "tid": 0, "args": what}


class Page(HTMLParser):
    """The elements of a page."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.ids, self.links, self.text = [], [], [], []
        self.source = path.read_text()
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        self.ids += [attrs["id"]] if "id" in attrs else []
        self.links += [attrs[name] for name in ("href", "xlink:href", "src") if name in attrs]

    def handle_data(self, data):
        self.text.append(data.strip())


def test_a_page_stands_alone_and_shows_everything_of_a_run(tmp_path):
    path, lacking = report.write([make_run(tmp_path / "a<b>&c", 80)])
    page = Page(path)
    assert lacking == []
    assert path == tmp_path / "a<b>&c" / "report" / "index.html"
    assert "script" not in page.tags
    assert page.tags.count("svg") == len(PLOTS)
    assert len(set(page.ids)) == len(page.ids)
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    assert all(found[1:] in page.ids for found in re.findall(r"url\((#[^)]*)\)", page.source))
    assert not re.search(r"(?<!xmlns=\")(?<!xmlns:xlink=\")https?://", page.source)
    assert "prefers-color-scheme: dark" in page.source
    assert {"a<b>&c", "GPT, 1,032,576 parameters", "2,469,312", "250 Gflop/s", "1.50 GiB", "25.0 %"} <= set(page.text)
    assert "200 ms of 500 ms a step" in page.text
    for name in PLOTS:
        assert (path.parent / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_runs_are_compared_and_what_one_lacks_is_said(tmp_path, capsys):
    data = {"data": {"shift": 1}}
    runs = [make_run(tmp_path / "one" / "run", 80), make_run(tmp_path / "two" / "run", 7, data, old=True)]
    assert Report(runs=runs, output=tmp_path / "both").run() == 0
    assert str(tmp_path / "both" / "index.html") in capsys.readouterr().out
    page = Page(tmp_path / "both" / "index.html")
    assert {"one/run", "two/run", "data.shift", "7 of 80"} <= set(page.text)
    for picture in ("utilisation", "scale", "memory", "words"):
        assert (
            "Not recorded by two/run" in page.source[page.source.index(f'id="{picture}"') :].partition("</figure>")[0]
        )
    assert Report(runs=runs[1:]).run() == 0
    output = capsys.readouterr().out
    for title in ("Validation measures", "Utilisation", "Loss scale", "Memory of each rank", "Communication by axis"):
        assert f"not shown: {title}: " in output
    assert "Utilisation: not recorded" in Page(runs[1] / "report" / "index.html").text
    assert not (runs[1] / "report" / "memory.png").exists()


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"no run at .*nowhere: it has no config.toml; give the directory of a run"):
        report.write([tmp_path / "nowhere"])
    with pytest.raises(ConfigError, match=r"has done no step yet: metrics.jsonl has no rows"):
        report.write([make_run(tmp_path / "none", 0)])
    broken = make_run(tmp_path / "broken", 1)
    (broken / "config.toml").write_text("[")
    with pytest.raises(ConfigError, match="the run at .*broken cannot be read"):
        report.write([broken])
    with pytest.raises(ConfigError, match="the report cannot be written to /proc/nowhere"):
        report.write([make_run(tmp_path / "run", 1)], Path("/proc/nowhere"))


def test_numbers_are_written_for_the_eye():
    assert [text.si(value, "flop") for value in (0, 12.34, 999.9, 6.744e9)] == [
        "0 flop",
        "12.3 flop",
        "1,000 flop",
        "6.74 Gflop",
    ]
    assert [text.binary(size) for size in (0, 1000, 3 << 29)] == ["0 B", "1,000 B", "1.50 GiB"]
    assert [text.duration(s) for s in (4e-4, 1.5, 123, 7394)] == ["0.400 ms", "1.50 s", "2:03 min", "2:03:14 h"]
    assert text.plain({"row": 2, "col": 1024}) == "row=2, col=1,024"
    assert running_median([5, 1, 4, 100, 3], 3) == [3.0, 4, 4, 4, 51.5]
