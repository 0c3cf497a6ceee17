"""The directive ``registry``: a table of the entries of a registry, so that no document repeats their names."""

from docutils.parsers.rst import Directive
from docutils.statemachine import StringList

from colossal_mpi.apps.data.formats import REFUSED
from colossal_mpi.layers import kernels
from colossal_mpi.layers.models import MODELS
from colossal_mpi.layers.models.pretrained import LACKING
from colossal_mpi.layers.optim import LEARNING_RATES, OPTIMIZERS
from colossal_mpi.layers.parallelism import MODES, SEQUENCE_MODES
from colossal_mpi.layers.pipeline import SCHEDULES


def _modes(registry):
    return [
        (mode.name, f"{mode.description} {mode.paper}{'.' * bool(mode.paper)}".strip()) for mode in registry.values()
    ]


def _with_options(registry):
    return [(kind.name, f"{kind.description} {_options(kind.options)}".strip()) for kind in registry.values()]


def _options(options):
    if not options:
        return ""
    defaults = ", ".join(f"``{name} = {option.default!r}``" for name, option in options.items())
    return f"Options: {defaults}."


def _families():
    known = [(one.model_type, kind) for kind in MODELS.values() for one in kind.huggingface]
    works = [(name, f"It is read and written as a ``{kind.model.__name__}``.") for name, kind in known]
    return [*works, *((name, f"It is refused: {reason}.") for name, reason in LACKING.items())]


def _refused_files():
    return [(what, f'It is refused: "{remedy}".') for what, remedy in dict(REFUSED.values()).items()]


TABLES = {
    "tensor modes": lambda: _modes(MODES),
    "sequence modes": lambda: _modes(SEQUENCE_MODES),
    "models": lambda: [(kind.name, kind.model.__doc__.splitlines()[0]) for kind in MODELS.values()],
    "families": _families,
    "refused files": _refused_files,
    "schedules": lambda: [(kind.name, kind.description) for kind in SCHEDULES.values()],
    "optimizers": lambda: _with_options(OPTIMIZERS),
    "learning rates": lambda: _with_options(LEARNING_RATES),
    "kernels": lambda: list(kernels.choices().items()),
}


class Registry(Directive):
    """``.. registry:: optimizers`` makes a table with a row for each registered optimizer."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self):
        lines = [".. list-table::", "   :widths: 20 80", ""]
        for name, text in TABLES[self.arguments[0]]():
            lines += [f"   * - {name if ' ' in name else f'``{name}``'}", f"     - {text}"]
        parent = self.state.parent.__class__()
        self.state.nested_parse(StringList(lines, "registry"), self.content_offset, parent)
        return parent.children
