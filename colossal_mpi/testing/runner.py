"""Run multi-rank tests from the parent's ordinary run loop.

`colossal_mpi.testing.plugin` registers the `Runner`. For each multi-rank test it starts a job if none runs it, waits
for the ranks, and reports the merged report of `colossal_mpi.testing.merge`.
"""

import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from .job import Job
from .merge import Interruption, merge
from .store import STORE
from .watch import follow

Reports = dict[int, dict[str, pytest.TestReport]]
PHASES = ("setup", "call", "teardown")


def rank_count(item: pytest.Item) -> int:
    """Return the number of ranks that the markers of an item ask for."""
    params = item.callspec.params if hasattr(item, "callspec") else {}
    if isinstance(params.get("grid"), dict):
        return math.prod(params["grid"].values())
    marker = item.get_closest_marker("ranks")
    return params.get("ranks", marker.args[0]) if marker else 1


def group(item: pytest.Item) -> tuple[Path, int]:
    """Return the key of the items that share a job, because starting a job takes a second or two."""
    return item.path.parent, rank_count(item)


class Runner:
    """The plugin in the parent, which runs a multi-rank item by waiting for the ranks that run it.

    Parameters
    ----------
    config : pytest.Config
        The configuration of the parent.
    root : Path
        The directory of the session; it is removed at the end of the session.
    """

    def __init__(self, config: pytest.Config, root: Path):
        self.config, self.root = config, root
        self.store = config.stash[STORE]
        self.job: Job | None = None
        self._jobs = 0
        self._unstartable: dict[tuple[Path, int], Interruption] = {}

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
        """Run and report an item of several ranks; leave the others to pytest."""
        if rank_count(item) == 1:
            return None
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        for report in self._reports(item):
            item.ihook.pytest_runtest_logreport(report=report)
        self._leave(item, nextitem)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True

    def pytest_sessionfinish(self) -> None:
        """End a job that a failure, ``-x`` or Ctrl-C has left running."""
        if self.job:
            self.job.kill()

    def pytest_unconfigure(self) -> None:
        """Remove the directory of the session."""
        shutil.rmtree(self.root, ignore_errors=True)

    def _reports(self, item: pytest.Item) -> list[pytest.TestReport]:
        if _file(item) in self._unstartable:
            return self._merged(item, {}, self._unstartable[_file(item)])
        call = pytest.CallInfo.from_call(
            lambda: self._ready(item), "setup", reraise=(KeyboardInterrupt, pytest.exit.Exception)
        )
        if call.excinfo:
            return [pytest.TestReport.from_item_and_call(item, call), merge(item, "teardown", {}, 0)]
        interruption, reports = self._follow(item)
        outcomes = {tuple(report.outcome for report in phases.values()) for phases in reports.values()}
        if interruption or len(outcomes) > 1:
            # If only some ranks failed, there may be messages that the next test would receive.
            self._close(patience=0)
        return self._merged(item, reports, interruption)

    def _follow(self, item: pytest.Item) -> tuple[Interruption | None, Reports]:
        assert self.job
        marker = item.get_closest_marker("deadline")
        deadline = float(marker.args[0] if marker else self.config.getini("mpi_deadline"))
        interruption = follow(self.job, item.nodeid, deadline)
        if interruption and (interruption.doubtful or (not self.job.began() and len(self.job.tests) > 1)):
            # Another rank was in a later test when the job died, or another file keeps the job from starting: run the
            # test in a separate job.
            self._close(patience=0)
            self.job = self._start(item, [item])
            interruption = follow(self.job, item.nodeid, deadline)
        if interruption and not self.job.began():
            self._unstartable[_file(item)] = interruption
        return interruption, {
            rank: {when: self._deserialized(data) for when, data in log.reports.get(item.nodeid, {}).items()}
            for rank, log in self.job.ranks.items()
        }

    def _ready(self, item: pytest.Item) -> None:
        """Prepare the files of an item and start a job that runs it, unless one does."""
        self.store.prepare(item)
        if self.job is None or item.nodeid not in self.job.tests:
            self._close()
            items = item.session.items
            rest = [one for one in items[items.index(item) :] if group(one) == group(item)]
            self.job = self._start(
                item, [one for one in rest if _file(one) not in self._unstartable and self._prepares(one)]
            )

    def _start(self, item: pytest.Item, items: list[pytest.Item]) -> Job:
        self._jobs += 1
        spec = {
            "tests": [one.nodeid for one in items],
            "files": [str(path) for path in dict.fromkeys(one.path for one in items)],
            "ranks": rank_count(item),
            "options": _options(self.config),
            "prepared": str(self.store.prepared),
        }
        return Job(self.root / f"job{self._jobs}", spec, self.config.invocation_params.dir)

    def _prepares(self, item: pytest.Item) -> bool:
        call = pytest.CallInfo.from_call(
            lambda: self.store.prepare(item), "setup", reraise=(KeyboardInterrupt, pytest.exit.Exception)
        )
        return call.excinfo is None

    def _deserialized(self, data: dict[str, Any]) -> pytest.TestReport:
        report = self.config.hook.pytest_report_from_serializable(config=self.config, data=data)
        assert isinstance(report, pytest.TestReport)
        return report

    def _merged(
        self,
        item: pytest.Item,
        reports: Reports,
        interruption: Interruption | None,
    ) -> list[pytest.TestReport]:
        """Return the reports of the phases, except the report of a call that passed after a setup that did not pass."""
        size, broken = rank_count(item), _broken_phase(reports) if interruption else None
        of_phase = {when: {rank: phases[when] for rank, phases in reports.items() if when in phases} for when in PHASES}
        setup, call, teardown = (
            merge(item, when, of_phase[when], size, interruption if when == broken else None) for when in PHASES
        )
        return [setup, *([call] if setup.passed or call.failed else []), teardown]

    def _leave(self, item: pytest.Item, nextitem: pytest.Item | None) -> None:
        """End the job after its last item, and the parent's fixtures that the next item does not use."""
        if nextitem is None or group(nextitem) != group(item):
            self._close()
        call = pytest.CallInfo.from_call(
            lambda: item.session._setupstate.teardown_exact(nextitem),
            "teardown",
            reraise=(KeyboardInterrupt,),
        )
        if call.excinfo:
            item.ihook.pytest_runtest_logreport(report=pytest.TestReport.from_item_and_call(item, call))

    def _close(self, patience: float = 5.0) -> None:
        if self.job:
            self.job.finish(patience)
        self.job = None


def _file(item: pytest.Item) -> tuple[Path, int]:
    return item.path, rank_count(item)


def _broken_phase(reports: Reports) -> str:
    setups = [phases["setup"] for phases in reports.values() if "setup" in phases]
    if not setups or any(report.failed for report in setups):
        return "setup"
    return "teardown" if all("call" in phases for phases in reports.values()) else "call"


def _options(config: pytest.Config) -> list[str]:
    """Return the options with which a rank collects and reports as the parent does."""
    option = config.option
    options = ["--capture=sys", "--maxfail=0", "-k", "", "-m", "", "-p", "no:faulthandler"]
    options += [
        f"--rootdir={config.rootpath}",
        f"--import-mode={option.importmode}",
        f"--tb={option.tbstyle}",
        f"--device={option.device}",
    ]
    options += [f"--verbosity={option.verbose}", *(["--showlocals"] if option.showlocals else [])]
    options += ["-c", str(config.inipath)] if config.inipath else []
    repeated = {"-W": option.pythonwarnings, "-o": option.override_ini, "-p": option.plugins}
    return options + [text for name, values in repeated.items() for value in values or [] for text in (name, value)]
