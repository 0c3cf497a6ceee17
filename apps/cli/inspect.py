"""``colossal-mpi inspect``: print what a checkpoint holds, check its files, and compare two checkpoints.

`inspect` reads the manifest and the arrays with ``colossal_mpi.checkpoint`` and prints on rank 0.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tomli_w
import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from colossal_mpi import checkpoint, comm
from colossal_mpi.apps import text
from colossal_mpi.apps.command import Command
from colossal_mpi.apps.run_directory import RunDirectory
from colossal_mpi.checkpoint import Manifest
from colossal_mpi.errors import CheckpointError
from colossal_mpi.grid import Grid, world_size


@dataclass(frozen=True, kw_only=True)
class Inspect(Command):
    """Show what a checkpoint holds and whether it is whole, or how two of them differ."""

    example = "mpiexec -n 4 colossal-mpi inspect runs/demo --verify"

    path: Annotated[Path, typer.Argument(help="A checkpoint, or a run for its latest checkpoint.")]
    verify: Annotated[bool, typer.Option("--verify", help="Check every checksum; the ranks share the work.")] = False
    diff: Annotated[Path | None, typer.Option(help="Compare with this one; exit code 1 if they differ.")] = None

    def run(self) -> int:
        return inspect(self.path, self.verify, self.diff)


def inspect(path: Path, verify: bool, diff: Path | None) -> int:
    """Show a checkpoint, or the latest one of a run, on rank 0.

    Parameters
    ----------
    path : Path
        The directory of a checkpoint or of a run.
    verify : bool
        Whether to check every checksum, and not only the sizes of the files.
    diff : Path, optional
        A second checkpoint, or run, to compare with.

    Returns
    -------
    int
        1 if a checkpoint is damaged or the two differ, else 0.

    Raises
    ------
    CheckpointError
        If there is no checkpoint or its manifest is damaged.
    """
    grid = Grid(None, "cpu", ranks=world_size())
    with comm.agreed(grid, CheckpointError):
        paths = [_checkpoint(one) for one in (path, diff) if one is not None]
        tables = [checkpoint.read_manifest(one) for one in paths]
    console = Console(markup=False, soft_wrap=True, highlight=False, quiet=grid.rank != 0)
    if diff is None:
        _show(console, paths[0], tables[0])
    whole = [_check(console, one, table, verify, grid) for one, table in zip(paths, tables, strict=True)]
    if not all(whole):
        return 1
    return 0 if diff is None else _compare(console, paths, grid)


def _checkpoint(path: Path) -> Path:
    return RunDirectory(path).latest() if (path / "checkpoints").is_dir() else path


def _show(console: Console, path: Path, table: Manifest) -> None:
    arrays, metadata = table["arrays"], table["metadata"]
    total = sum(map(checkpoint.array_bytes, arrays.values()))
    step = f"step {metadata['step']}, " if "step" in metadata else ""
    count = f"{len(arrays)} array{'s' * (len(arrays) != 1)}"
    console.print(
        f"{path}: {step}{count}, {text.binary(total)}, "
        f"in {len(table['files'])} files, format {table['format_version']}",
    )
    console.print(_tree(table))
    rest = {name: value for name, value in metadata.items() if name != "config" and isinstance(value, dict)}
    for name, value in {**rest, "config": metadata.get("config")}.items():
        if value:
            console.print(f"\n{name}", style="bold")
            console.print(_toml(value), end="")


def _toml(table: dict[str, Any]) -> str:
    return tomli_w.dumps(_without_null(table))


def _without_null(value: Any) -> Any:
    """Return a value of JSON without its nulls, which TOML does not have."""
    if isinstance(value, dict):
        return {key: _without_null(item) for key, item in value.items() if item is not None}
    return [_without_null(item) for item in value if item is not None] if isinstance(value, list) else value


def _tree(table: Manifest) -> Tree:
    tree, groups = Tree("", hide_root=True, guide_style="dim"), dict[str, Tree]()
    width = max((len(name) for name in table["arrays"]), default=0)
    sizes: dict[str, int] = {}
    for name, entry in table["arrays"].items():
        for group in _groups(name):
            sizes[group] = sizes.get(group, 0) + checkpoint.array_bytes(entry)
    for name, value in table["values"].items():
        line = f"{value['value']} {'' if value['units'] == '1' else value['units']}"
        _leaf(tree, groups, sizes, name, width, line)
    for name, entry in sorted(table["arrays"].items(), key=lambda item: _natural(item[0])):
        shape = " x ".join(map(str, entry["shape"])) or "scalar"
        line = f"{shape:>16}  {entry['dtype']:8}  {text.binary(checkpoint.array_bytes(entry)):>10}  {entry['layout']}"
        _leaf(tree, groups, sizes, name, width, line)
    return tree


def _natural(name: str) -> list[Any]:
    """Return a key that sorts layer 10 behind layer 9."""
    return [(int(word), "") if word.isdigit() else (0, word) for word in re.split(r"(\d+)", name)]


def _groups(name: str) -> list[str]:
    parts = name.split("/")[:-1]
    return ["/".join(parts[: i + 1]) for i in range(len(parts))]


def _leaf(tree: Tree, groups: dict[str, Tree], sizes: dict[str, int], name: str, width: int, line: str) -> None:
    above = _groups(name)
    for i, group in enumerate(above):
        if group not in groups:
            size = f"  {text.binary(sizes[group])}" if group in sizes else ""
            parent = groups[above[i - 1]] if i else tree
            groups[group] = parent.add(Text(f"{group.rpartition('/')[2]}{size}", "bold"))
    parent, last = groups[above[-1]] if above else tree, name.rpartition("/")[2]
    room = max(1, width - len(name) + len(last) + 2)
    parent.add(Text(f"{last:{room}}{line}"))


def _check(console: Console, path: Path, table: Manifest, verify: bool, grid: Grid) -> bool:
    """Check the files by their sizes or by every checksum, print the result, and return whether all are whole."""
    begun = time.perf_counter()
    problems = checkpoint.verify(path, grid) if verify else checkpoint.missing_files(path, table["files"])
    seconds = time.perf_counter() - begun
    total = sum(file["bytes"] for file in table["files"].values())
    if problems:
        console.print("\n".join(problems), style="bold red")
    elif verify:
        checks = sum(len(file["parts"]) for file in table["files"].values())
        console.print(
            f"\n{path}: verified: all {checks} checksums of {text.binary(total)} fit "
            f"({text.binary(total / seconds)}/s on {grid.size} rank{'s' * (grid.size > 1)})",
        )
    else:
        console.print(f"\n{path}: {len(table['files'])} files of the sizes written; --verify checks every byte")
    return not problems


def _compare(console: Console, paths: Sequence[Path], grid: Grid) -> int:
    found = checkpoint.differences(paths[0], paths[1], grid)
    if not found:
        console.print("no difference: the same names, shapes and values, to the bit")
        return 0
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("name", "difference", "elements", "greatest", "relative"):
        table.add_column(column, justify="left" if column in ("name", "difference") else "right")
    for d in found:
        numbers = [f"{d.elements:,}", f"{d.absolute:.3e}", f"{d.relative:.3e}"] if d.elements else ["", "", ""]
        table.add_row(Text(d.name), Text(d.what), *numbers)
    console.width = max(console.width, 100)
    console.print(table)
    console.print("greatest: the largest difference; relative: that over the largest magnitude in the first")
    return 1
