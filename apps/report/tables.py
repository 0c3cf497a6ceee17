"""The tables of a report: results, configurations and their differences, machines and versions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from colossal_mpi.apps import text
from colossal_mpi.apps.report.runs import Run, shares

Table = list[tuple[str, list[str]]]
"""Rows with a name and the value of each run; the value is empty where it was not recorded."""


def results(runs: Sequence[Run]) -> Table:
    """Return the results of each run."""
    rows: dict[str, Callable[[Run], str]] = {
        "Model": _model,
        "Grid": lambda run: text.plain(run.facts.get("grid") or run.config.get("parallel.grid", {})),
        "Tensor mode": lambda run: str(run.config.get("parallel.tensor", "")),
        "Steps": _steps,
        "Time in steps": lambda run: text.duration(sum(run.series("seconds")[1])) if run.last("seconds") else "",
        "Training loss, last": lambda run: _number(run.last("loss")),
        "Validation loss, last": lambda run: _number(run.last("val_loss")),
        "Validation loss, best": lambda run: _number(min(run.series("val_loss")[1], default=None)),
        **{f"Validation {name}, last": _share(name) for run in runs for row in run.rows for name in shares(row)},
        "Speed, median": _speed,
        "MFU, median": lambda run: _percent(run.median("mfu")),
        "HFU, median": lambda run: _percent(run.median("hfu")),
        "Peak": lambda run: _si(run.facts.get("peak_flops"), "flop/s"),
        "Peak, how known": lambda run: str(run.facts.get("peak_of", "")),
        "Model flop of a step": lambda run: _si(run.facts.get("model_flop"), "flop"),
        "Hardware flop of a step": lambda run: _si(run.facts.get("hardware_flop"), "flop"),
        "Memory, largest rank": lambda run: _most(run, "memory"),
        "GPU memory, largest rank": lambda run: _most(run, "device_memory"),
        "Words of a step, all ranks": lambda run: f"{sum(run.words().values()):,}" if run.gathered else "",
        "Time in communication": _communication,
        "Predicted of rank 0": _predicted,
    }
    return _filled({name: [value(run) for run in runs] for name, value in rows.items()})


def _model(run: Run) -> str:
    count = run.facts.get("parameters")
    name = run.facts.get("task") or str(run.config.get("model.kind", "")).upper()
    return f"{name}, {count:,} parameters" if count else name


def _steps(run: Run) -> str:
    done, all_of_them = run.rows[-1]["step"], run.config.get("training.steps")
    return f"{done:,}" if all_of_them in (None, done) else f"{done:,} of {all_of_them:,}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _share(name: str) -> Callable[[Run], str]:
    def value(run: Run) -> str:
        last = run.last(f"val_{name.replace(' ', '_')}")
        return "" if last is None else f"{100 * last:.1f} %"

    return value


def _percent(value: float | None) -> str:
    return "" if value is None else text.percent(value)


def _si(value: float | None, unit: str) -> str:
    return text.si(value, unit) if value else ""


def _speed(run: Run) -> str:
    value = run.median(f"{run.unit}_per_second")
    return "" if value is None else f"{text.significant(value) if value < 1000 else f'{value:,.0f}'} {run.unit}/s"


def _most(run: Run, key: str) -> str:
    sizes = run.gathered[-1].get(key) if run.gathered else None
    return text.binary(max(sizes)) if sizes else ""


def _communication(run: Run) -> str:
    """Return the time that a rank spends in communication, and the time of a step."""
    step = run.median("seconds")
    spent = sum(run.seconds().values())
    return f"{text.duration(spent)} of {text.duration(step)} a step" if run.gathered and step else ""


def _predicted(run: Run) -> str:
    """Return the cost of a step on rank 0 that a dry run predicted."""
    found = run.facts.get("predicted")
    if not found:
        return ""
    return (
        f"{found['words']:,} words, {text.binary(found['memory'])} of arrays, {text.duration(found['seconds'])} a step"
    )


def configuration(runs: Sequence[Run]) -> Table:
    """Return every key of the configurations."""
    keys = list(dict.fromkeys(key for run in runs for key in run.config))
    sections = list(dict.fromkeys(key.partition(".")[0] for key in keys))
    keys.sort(key=lambda key: sections.index(key.partition(".")[0]))
    return [(key, [_written(run.config, key) for run in runs]) for key in keys]


def _written(config: dict[str, Any], key: str) -> str:
    return text.plain(config[key]) if key in config else ""


def differences(table: Table) -> Table:
    """Return the rows of the configurations in which runs differ, except for the run directory."""
    return [(key, values) for key, values in table if len(set(values)) > 1 and key != "run.directory"]


def machines(runs: Sequence[Run]) -> Table:
    """Return the machine of each run, and the versions that it ran with."""
    facts = [run.facts.get("machine", {}) for run in runs]
    rows: dict[str, Callable[[dict[str, Any]], str]] = {
        "Ranks": lambda m: f"{m['ranks']:,}" if "ranks" in m else "",
        "Nodes": _nodes,
        "Processor": lambda m: str(m.get("processor", "")),
        "Cores of a rank": lambda m: ", ".join(map(str, m.get("cores_per_rank", []))),
        "Device": lambda m: ", ".join(m.get("devices", [])),
        "System": lambda m: str(m.get("system", "")),
        "MPI": lambda m: str(m.get("mpi", "")),
    }
    table = {name: [value(machine) for machine in facts] for name, value in rows.items()}
    table["Kernels"] = [str(run.facts.get("kernels", "")) for run in runs]
    for name in dict.fromkeys(name for machine in facts for name in machine.get("versions", {})):
        table[name] = [machine.get("versions", {}).get(name, "") for machine in facts]
    return _filled(table)


def _nodes(machine: dict[str, Any]) -> str:
    nodes, most = machine.get("nodes", []), 4
    hosts = [f"{node['host']} ({node['ranks']} rank{'s' * (node['ranks'] > 1)})" for node in nodes[:most]]
    return ", ".join([*hosts, *([f"{len(nodes) - most:,} more"] if len(nodes) > most else [])])


def _filled(rows: dict[str, list[str]]) -> Table:
    """Return the rows in which at least one run has a value."""
    return [(name, values) for name, values in rows.items() if any(values)]
