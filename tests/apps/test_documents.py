"""The lines that the README and the guides tell a reader to type run and print what is shown; all names exist."""

import re
import shlex
import subprocess
import sys
import tomllib
from functools import cache
from itertools import pairwise
from pydoc_data.topics import topics

import pytest

from colossal_mpi.apps.config import Config, model_sections
from tests.documents import DOCUMENTS, ROOT, Line, Literal, Program, command, commands, parse, paths, read
from tests.fakes import environment

READ = {path.relative_to(ROOT).as_posix(): read(path) for path in DOCUMENTS}
RUN = [name for name, found in READ.items() if any(isinstance(item, Line) and item.can_run for item in found)]
ALL = {item for found in READ.values() for item in found}
TYPED = sorted((item for item in ALL if isinstance(item, Line)), key=lambda line: line.text)
NAMED = sorted(item.text for item in ALL if isinstance(item, Literal))
TEXT = "\n".join(topics[name] for name in sorted(topics))[:60000]


@pytest.fixture
def folder(tmp_path):
    """Make the files that a reader has: texts, a tokenizer, the scripts of the repository."""
    tokenizers = pytest.importorskip("tokenizers")
    (tmp_path / "corpus").mkdir()
    (tmp_path / "jobs").symlink_to(ROOT / "jobs")
    for name, text in {"corpus/a.txt": TEXT[:30000], "corpus/b.txt": TEXT[30000:], "my.txt": TEXT}.items():
        (tmp_path / name).write_text(text)
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator([TEXT], trainer)
    made.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


@pytest.mark.parametrize("name", RUN)
def test_a_document_does_what_it_says(name, folder):
    env, typed = environment(folder / "bin", small=True), set()
    for item in READ[name]:
        if isinstance(item, Program):
            (folder / item.name).write_text(item.code)
        elif isinstance(item, Line) and item.can_run and item.text not in typed:
            typed.add(item.text)
            run(item, folder, env)
    assert not [p.name for p in READ[name] if isinstance(p, Program) and not any(p.name in line for line in typed)]


def run(line, folder, env):
    """Run a line, and compare its output with the output in the document; ``...`` stands for anything."""
    result = subprocess.run(
        ["bash", "-c", line.text], cwd=folder, env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode in line.codes, f"{line.text}\n{result.stdout}{result.stderr}"
    shown = re.escape(stripped(line.output)).replace(r"\.\.\.", "(?s:.*)")
    assert not shown or re.fullmatch(shown, stripped(result.stdout)), f"{line.text}\n{result.stdout}"


def stripped(text):
    """Return a text without empty lines and the blanks around lines."""
    return "\n".join(line.strip() for line in text.splitlines() if line.strip())


@pytest.mark.parametrize("line", TYPED, ids=lambda line: line.text)
def test_a_line_names_what_there_is(line):
    words = line.words
    assert subprocess.run(["bash", "-n", "-c", line.text], check=False).returncode == 0
    assert all(path.exists() for word in words for path in paths(word))
    if "colossal-mpi" in words:
        parse(words[words.index("colossal-mpi") + 1 :])
        assert all(is_key(word) for before, word in pairwise(words) if before == "--set")
    if words[0] in BEFOREHAND:
        BEFOREHAND[words[0]](words[1:])


def make(words):
    done = subprocess.run(["make", "-n", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def pip(words):
    options = {word.partition("=")[0] for word in words if word.startswith("-")}
    assert options <= options_of_pip(words[0])
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {extra for word in words for part in re.findall(r"\[(.*)\]", word) for extra in part.split(",")} <= {*extras}


@cache
def options_of_pip(command):
    shown = subprocess.run([sys.executable, "-m", "pip", command, "--help"], capture_output=True, text=True, check=True)
    return set(re.findall(r"--?[\w-]+", shown.stdout))


BEFOREHAND = {"make": make, "pip": pip}
"""Checks of the lines that are not run."""


@pytest.mark.parametrize("names", list(commands()), ids=" ".join)
def test_the_example_of_a_help_is_understood(names):
    example = (command(names)[0].epilog or "").partition("colossal-mpi ")[2]
    if example:  # a group shows the example of one of its commands
        parse(shlex.split(example))


def test_literals_name_what_there_is():
    missing = [
        literal
        for literal in NAMED
        for path in paths(literal)
        if not path.exists() and not path.with_suffix(".py").exists()
    ]
    unknown = [literal for literal in NAMED if re.match("--[a-z]", literal) and not is_understood(literal)]
    keys = [literal for literal in NAMED if re.fullmatch(r"[a-z]+\.[a-z_]+( = .*)?", literal) and not is_key(literal)]
    assert (missing, unknown, keys) == ([], [], [])


def is_understood(options):
    """Say whether some command of ``colossal-mpi`` has these options."""
    for names in commands():
        try:
            parse([*names, *shlex.split(options)])
        except Exception:
            continue
        return True
    return False


def is_key(literal):
    """Say whether a literal is a key of a configuration; without ``=`` one of an unknown section passes."""
    section, key = re.match(r"(\w+)\.(\w+)", literal).groups()
    if section not in Config.model_fields:
        return section != section.lower() or "=" not in literal
    sections = model_sections().values() if section == "model" else [Config.model_fields[section].annotation]
    return key in ("json",) or any(key in one.model_fields for one in sections)
