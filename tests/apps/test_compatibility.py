"""The messages that the page on compatibility shows are those of the code, and its tables have every entry."""

import ast
import gzip
import re
from pathlib import Path

import pytest

from colossal_mpi.apps.data.formats import REFUSED, recognize
from colossal_mpi.errors import ConfigError

ROOT = Path(__file__).parents[2]
PAGE = " ".join((ROOT / "docs" / "guides" / "compatibility.rst").read_text(encoding="utf-8").split())
SOURCES = ("apps/data/formats.py", "layers/models/pretrained.py", "colossal_mpi/runtime")
MESSAGES = re.findall(r'"([^"]+)"', re.sub("``.*?``", "", PAGE))


def texts():
    """Return the texts of the modules that raise the messages, each whole, whatever lines it stands in."""
    for place in SOURCES:
        path = ROOT / place
        for file in [path] if path.is_file() else path.glob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                parts = node.values if isinstance(node, ast.JoinedStr) else [node]
                yield "".join(
                    part.value if isinstance(part, ast.Constant) and isinstance(part.value, str) else "{}"
                    for part in parts
                )


def test_messages_are_those_of_the_code():
    known = list(texts())
    assert len(MESSAGES) >= 8
    assert [message for message in MESSAGES if not any(message in text for text in known)] == []


@pytest.mark.parametrize("magic", REFUSED)
def test_known_files_that_are_not_read_are_refused_with_their_remedy(tmp_path, magic):
    (tmp_path / "data.gz").write_bytes(gzip.compress(magic + b"rest"))
    with pytest.raises(ConfigError, match=re.escape(": ".join(REFUSED[magic]))):
        recognize(tmp_path / "data.gz")


def test_tables_are_on_one_page():
    for guide in (ROOT / "docs" / "guides").glob("*.rst"):
        text = guide.read_text(encoding="utf-8")
        assert (
            ("registry:: families" in text) == ("registry:: refused files" in text) == (guide.stem == "compatibility")
        )
