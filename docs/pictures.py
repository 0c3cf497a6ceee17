"""Draw the pictures of the documentation: the cuts of a layer's arrays in each mode, and the packages by floors.

The modes are drawn from the layouts that the layers themselves ask for, and the floors from the contract of imports in
``pyproject.toml``. ``conf.py`` calls `draw_all`.
"""

import math
import tomllib
from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt
from matplotlib.patches import Rectangle

from colossal_mpi.layers import MODES, Parallelism
from colossal_mpi.layout import coords_of

ROOT = Path(__file__).parents[1]
SIZES = {"b": 8, "s": 8, "h": 8, "f": 16}
PICTURES = {"data": ("none", {"data": 4}), "seq": ("none", {"seq": 4})} | {
    mode.name: (mode.name, dict.fromkeys(mode.axes, 4 if len(mode.axes) == 1 else 2))
    for mode in MODES.values()
    if mode.axes
}
"""The name of each picture, its tensor mode and the axes of its grid."""
COLOURS = ["#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3", "#937860", "#da8bc3", "#8c8c8c"]
TEXT = {"ha": "center", "va": "center", "color": "white", "fontsize": 9, "fontweight": "bold"}


class Plan:
    """A grid without processes, with the axes and sizes that layouts ask for."""

    def __init__(self, axes):
        self.axes = axes

    def extent(self, axes):
        """Return the number of ranks along some axes."""
        return math.prod(self.axes.get(axis, 1) for axis in axes)

    def __repr__(self):
        return ",".join(f"{axis}={size}" for axis, size in self.axes.items())


def blocks(layout, shape, axes):
    """Return the ranks that hold each block, by its box."""
    held = {}
    for rank in range(math.prod(axes.values())):
        held.setdefault(layout.on(axes, len(shape)).box(shape, axes, coords_of(rank, axes)), []).append(rank)
    return held


def span(rows, shape):
    """Return the start and the length of a block's tokens as shares of all tokens, samples and positions together."""
    start, length = 0.0, 1.0
    for (low, high), size in zip(rows, shape, strict=False):
        start, length = start + length * low / size, length * (high - low) / size
    return start, length


def draw(ax, title, letters, layout, axes):
    """Draw an array: its last dim from left to right, the others from top to bottom."""
    shape = tuple(SIZES[x] for x in letters)
    for (*rows, (left, right)), ranks in blocks(layout, shape, axes).items():
        y, height = span(rows, shape)
        x, width = left / shape[-1], (right - left) / shape[-1]
        ax.add_patch(Rectangle((x, y), width, height, fc=COLOURS[min(ranks)], ec="white", lw=1.5))
        ax.text(x + width / 2, y + height / 2, ",".join(map(str, ranks)), **TEXT)
    ax.set(xlim=(0, 1), ylim=(1, 0), xticks=[], yticks=[])
    ax.set_title(title, fontsize=10, family="monospace")
    ax.set_xlabel(letters[-1])
    ax.set_ylabel(" x ".join(letters[:-1]))
    ax.spines[:].set_visible(False)


def name(array, letters, layout):
    """Return the name of an array with its layout, as the guides write it."""
    cut = ["".join(f"_{','.join(axes)}" if axes else "") for axes in layout.dims]
    return f"{array}[" + ", ".join(f"{x}{c}" for x, c in zip(letters, cut, strict=True)) + "]"


def picture(mode, path):
    """Draw the stream, a weight as it is stored and the inside of a block."""
    tensor, axes = PICTURES[mode]
    p = Parallelism(Plan(axes), tensor)
    product = p.product("bsh,hf->bsf", "f")
    arrays = [
        ("X", "bsh", p.stream("bsh")),
        ("W", "hf", p.store(product.w, (SIZES["h"], SIZES["f"]))),
        ("Y", "bsf", p.inside("bsf", "f")),
    ]
    figure, panels = plt.subplots(1, 3, figsize=(8.4, 2.6), width_ratios=[1, 1.4, 1.4])
    for ax, (array, letters, layout) in zip(panels, arrays, strict=True):
        draw(ax, name(array, letters, layout), letters, layout, axes)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def floors():
    """Return the packages of each part from the top down, as the contract of imports in pyproject.toml lists them."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    order = [[name.strip() for name in floor.replace(":", "|").split("|")] for floor in contracts[0]["layers"]]
    parts = {
        part: sorted(path.parent.name for path in (ROOT / part).glob("*/__init__.py"))
        for part in ("apps", "layers", "linalg")
    }
    return [(names[0], parts[names[0]]) if names[0] in parts else ("colossal_mpi", names) for names in order]


def packages(path):
    """Draw the packages as boxes on floors; a package imports only from the floors below it."""
    rows = floors()
    figure, ax = plt.subplots(figsize=(8.4, 0.4 * len(rows) + 0.3))
    colours = {"apps": COLOURS[3], "layers": COLOURS[1], "linalg": COLOURS[2], "colossal_mpi": COLOURS[0]}
    for y, (part, names) in enumerate(rows):
        width = 1 / len(names)
        for x, package in enumerate(names):
            ax.add_patch(Rectangle((x * width, y), width, 1, fc=colours[part], ec="white", lw=2))
            ax.text((x + 0.5) * width, y + 0.5, package, **TEXT | {"fontsize": 8})
        label = part if part != "colossal_mpi" or rows[y - 1][0] != part else ""
        ax.text(-0.01, y + 0.5, label, ha="right", va="center", fontsize=9, family="monospace")
    ax.set(xlim=(-0.14, 1), ylim=(len(rows), 0))
    ax.axis("off")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def draw_all(directory):
    """Draw every picture into a directory."""
    Path(directory).mkdir(exist_ok=True)
    packages(Path(directory) / "architecture.svg")
    for mode in PICTURES:
        picture(mode, Path(directory) / f"mode-{mode.replace('.', '')}.svg")
