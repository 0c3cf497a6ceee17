"""Generated configurations: any setting is taken and survives a round trip, or is one error that names its key."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from colossal_mpi import ConfigError
from colossal_mpi.apps import config as configs
from colossal_mpi.apps.config import Config
from tests.generated import examples

DEMO = configs.load("demo")
KEYS = sorted(f"{section}.{key}" for section, keys in DEMO.model_dump().items() for key in keys)
WORDS = st.sampled_from(
    ["0", "1", "-1", "2", "3", "1e-3", "-0.5", "nan", "inf", "1e400", "9" * 30, "true", "''", "none", "{}", "[]"]
    + ["{ row = 2 }", "{ row = 0 }", "{ nope = 2, row = -1 }", "['x']", "[[]]", "[1, 2]", "torch", "auto", "adamw"]
    + ["a\u0000b", "ü", "\ud800", "x = 1\ny = 2", "2026-12-01", "0x10", "'''", '"', "[", "{", "#"]
)


@examples(10)
@given(st.dictionaries(st.sampled_from(KEYS), WORDS | st.text(max_size=8), max_size=3))
def test_any_setting_is_taken_or_refused_by_name(tmp_path_factory, changed):
    changed.pop("run.plugins", None)  # they are programs of the user
    settings = [f"{key}={value}" for key, value in changed.items()]
    try:
        config = configs.load("demo", settings)
    except ConfigError as error:
        assert any(key in str(error) or key.rpartition(".")[2] in str(error) for key in changed), error  # noqa: PT017
        return
    path = tmp_path_factory.mktemp("any") / "run.toml"
    for text in (configs.dump(config), configs.commented(config)):
        path.write_text(text, encoding="utf-8")
        assert configs.load(str(path)) == config


@examples(5)
@given(st.text(max_size=60) | st.binary(max_size=60).map(lambda raw: raw.decode("latin-1")))
def test_any_file_is_a_configuration_or_refused(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("any") / "run.toml"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    try:
        assert isinstance(configs.load(str(path)), Config)
    except ConfigError as error:
        assert str(path) in str(error)  # noqa: PT017


@pytest.mark.parametrize("section", sorted(Config.model_fields))
def test_a_section_that_is_no_table_is_refused(tmp_path, section):
    (tmp_path / "run.toml").write_text(f"{section} = 3\n")
    with pytest.raises(ConfigError, match=section):
        configs.load(str(tmp_path / "run.toml"))
