"""What one rank has told the parent."""

import json
import re
from pathlib import Path
from typing import Any


class RankLog:
    """What one rank has written so far."""

    def __init__(self, directory: Path, rank: int):
        self.path, self.stack_path = directory / f"rank{rank}.jsonl", directory / f"rank{rank}.stacks"
        self.pid: int | None = None
        self.last: str | None = None
        self.started: dict[str, float] = {}
        self.failed: dict[str, float] = {}
        self.reports: dict[str, dict[str, Any]] = {}
        self.ended: str | None = None
        self._offset = 0

    def read(self) -> None:
        """Take in the lines that are new and whole."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self._offset)
            whole, newline, _ = file.read().rpartition(b"\n")
        self._offset += len(whole) + len(newline)
        for line in whole.splitlines():
            self._take(**json.loads(line))

    def _take(self, event: str, time: float, value: Any) -> None:
        if event == "pid":
            self.pid = value
        elif event == "start":
            self.last = value
            self.started[value] = time
        elif event == "end":
            self.ended = value
        else:
            self.reports.setdefault(value["nodeid"], {})[value["when"]] = value
            if value["outcome"] == "failed" or (value["outcome"] == "skipped" and "wasxfail" in value):
                self.failed.setdefault(value["nodeid"], time)

    def stack(self) -> str:
        """Return the stacks that the rank has dumped, without thread numbers and pytest's own frames."""
        text = self.stack_path.read_text() if self.stack_path.exists() else ""
        text = re.sub(r"(?m)^( +File .*/_pytest/.*\n)(?: +File .*(?:\n|$))*", "", text)
        text = text.partition("\nExtension modules:")[0]
        return re.sub(r"(hread) 0x\w+", r"\1", text).strip()
