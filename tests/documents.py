"""Parse the documents: find the programs, shell lines, options and paths that they tell a reader to type."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from colossal_mpi.apps.cli.program import program
from colossal_mpi.apps.command import LazyCommand

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.rst", *sorted((ROOT / "docs").rglob("*.rst"))]
RUN = {"colossal-mpi", "mpiexec", "python", "sbatch", "srun"}
"""Programs whose lines can run on any machine that runs the tests; `fakes` has stand-ins for Slurm's."""
FOREIGN = {"apt", "git", "jobs/mpirun.sh", "make", "module", "mpirun", "pip", "scancel", "ssh"}
"""Programs that need a network, a cluster or more rights, or that run the tests themselves."""
SHELLS = {"bash", "console", "sh", "shell"}
"""Languages of blocks with lines for a shell; blocks in other languages are not for typing."""
_FOUND = re.compile(
    r"(?:::|code-block:: (?P<language>\w+))\n\n(?P<block>(?: {4}.*\n|\n)+)|``(?P<literal>[^`]+)``|`(?P<path>[\w./-]+)`"
)
_PATH = re.compile(r"(apps|colossal_mpi|docs|jobs|layers|linalg|tests)/[\w./{},-]*")


@dataclass(frozen=True)
class Program:
    """A Python file whose first line is a comment with its name."""

    name: str
    code: str


@dataclass(frozen=True)
class Line:
    """A line for a shell: after ``$`` in a block, or between double backticks."""

    text: str
    output: str = ""
    """The output that the document shows below it."""
    inline: bool = False

    @property
    def words(self):
        """Its words, without comments and without variables in front of the program."""
        words = shlex.split(self.text, comments=True)
        while words and re.match(r"\w+=", words[0]):
            del words[0]
        return words

    @property
    def can_run(self):
        """True if it can run as it stands, without a network, a cluster or more rights.

        A word in capitals is a placeholder. In a sentence, the mere name of a command is no line to type. Benchmarks
        take minutes and have separate tests.
        """
        words = self.words
        if words[0] not in RUN or words[1:3] in (["-m", "venv"], ["-m", "pip"]) or "bench" in words[:2]:
            return False
        mentioned = self.inline and words[0] == "colossal-mpi" and not command(words[1:])[1]
        return not mentioned and not any(word.isalpha() and word.isupper() for word in words)

    @property
    def codes(self):
        """The exit codes that it may have: 0, and the codes that its comment names."""
        return {0, *map(int, re.findall(r"# .*exit code (\d+)", self.text))}


@dataclass(frozen=True)
class Literal:
    """Any other text between backticks."""

    text: str


def command(words):
    """Return the command of ``colossal-mpi`` that words begin with, and the words after it."""
    found, words = program(), list(words)
    while words and words[0] in getattr(found, "commands", {}):
        found = found.commands[words.pop(0)]
    return found.load() if isinstance(found, LazyCommand) else found, words


def commands(group=None, *names):
    """Yield the words of every command of ``colossal-mpi``."""
    group = command([])[0] if group is None else group
    for name, one in getattr(group, "commands", {}).items():
        yield [*names, name]
        yield from commands(one, *names, name)


def parse(words):
    """Fail unless ``colossal-mpi`` has the command and the options of these words."""
    found, rest = command(words)
    context = found.context_class(found, info_name=found.name, **found.context_settings)
    values, _, _ = found.make_parser(context).parse_args(args=rest)
    started = values.get("command") or []
    if "colossal-mpi" in started:  # run -n 4 colossal-mpi ...
        parse(started[started.index("colossal-mpi") + 1 :])
    assert not hasattr(found, "commands") or not rest or rest[0].startswith("-"), f"no command {' '.join(words)}"


def read(path):
    """Return the programs, lines and literals of a document, in order."""
    found = []
    for match in _FOUND.finditer(path.read_text()):
        block, literal = match["block"], " ".join((match["literal"] or match["path"] or "").split())
        if block:
            found += _block(re.sub("^    ", "", block, flags=re.M).strip("\n"), match["language"], path)
        elif literal.partition(" ")[0] in RUN | FOREIGN and " " in literal:
            found.append(Line(literal, inline=True))
        else:
            found.append(Literal(literal))
    return found


def _block(text, language, path):
    name = re.match(r"# (\w+\.py)\n", text)
    if name or language == "python":
        assert name, f"{path}: the first line of a program is a comment with its name:\n{text}"
        return [Program(name[1], text + "\n")]
    first = text.partition("\n")[0]
    if not first.startswith("$ "):
        words = {line.split()[0] for line in text.splitlines() if line.split()}
        shell = language in SHELLS or (language is None and words & (RUN | FOREIGN))
        assert not shell, f"{path}: a line for a shell begins with $: {first}"
        return []
    return [Line(*piece.partition("\n")[::2]) for piece in re.split(r"^\$ ", text, flags=re.M)[1:]]


def paths(literal):
    """Return the files of the repository that a literal names, with ``{a,b}`` written out."""
    if not _PATH.fullmatch(literal):
        return []
    before, brace, rest = literal.partition("{")
    inside, _, after = rest.partition("}")
    return [ROOT / f"{before}{piece}{after}" for piece in inside.split(",")] if brace else [ROOT / literal]
