"""Configurations have defaults and take settings; errors name key, value, file and what would work."""

import re

import pytest

from colossal_mpi import ConfigError
from colossal_mpi.apps import config as configs
from colossal_mpi.apps.config import model_sections


def write(tmp_path, text):
    path = tmp_path / "run.toml"
    path.write_text(text)
    return str(path)


SHIPPED = configs.shipped().split(", ")


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configurations_are_valid_and_survive_a_round_trip(tmp_path, name):
    config = configs.load(name)
    assert config.parallel.grid == {"row": 2, "col": 2}
    assert config.run.directory == f"runs/{name}"
    assert configs.load(write(tmp_path, configs.dump(config))) == config


@pytest.mark.parametrize("name", SHIPPED)
def test_what_is_shown_has_a_comment_for_each_key_and_loads_again(tmp_path, name):
    settings = ["training.milestones=[3, 4]", "training.rate=multi-step", "data.files=['x']"]
    settings.append("run.directory=a 'b' \"c\" # d")
    config = configs.load(name, settings)
    shown = configs.commented(config)
    assert configs.load(write(tmp_path, shown)) == config
    lines = shown.splitlines()
    keys = [i for i, line in enumerate(lines) if re.match(r"\w+ = |# \w+ is not set", line)]
    assert len(keys) == sum(len(section) for section in config.model_dump().values())
    bare = [lines[i] for i in keys if not re.search(r"  # \w", lines[i]) and not lines[i - 1].startswith("# ")]
    assert not bare
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize(
    ("settings", "messages"),
    [
        (["parallel.virtual_stages=2"], ["parallel.schedule='1f1b', parallel.virtual_stages=2: .*interleaved"]),
        (
            ["parallel.schedule=interleaved", "parallel.grid={ pipe = 2, row = 2 }", "parallel.tensor=1d"],
            [
                "parallel.tensor='1d': tensor='1d' uses .* and not row of Grid\\(row=2\\): use tensor='2d'",
                "parallel.schedule='interleaved', parallel.virtual_stages=1",
            ],
        ),
        (["model.heads=3"], ["model.heads=3: 3 heads do not divide hidden=128: use heads in {1, 2, 4"]),
        (["training.keep_every=5"], ["training.keep_every=5: it keeps some of those that training.keep_last removes"]),
        (["training.milestones=[5]"], ["training.milestones=\\[5\\]: these are of training.rate='multi-step'"]),
        (["data.shift=1"], ["data.shift=1: images are moved"]),
        (['run.directory=""'], ["run.directory='': string should have at least 1 character"]),
    ],
    ids=["stages", "axes", "heads", "keep", "milestones", "shift", "directory"],
)
def test_impossible_combinations_are_refused_before_anything_starts(settings, messages):
    with pytest.raises(ConfigError, match="demo.toml: " + ".*; ".join(messages)):
        configs.load("demo", settings)


def test_groups_that_do_not_divide_the_heads_are_refused():
    with pytest.raises(ConfigError, match=r"model.heads=4, model.groups=3: 3 groups do not divide 4 heads: use groups"):
        configs.load("llama", ["model.heads=4", "model.groups=3"])


def test_there_is_one_of_every_kind():
    assert {configs.load(name).model.kind for name in SHIPPED} == set(model_sections())


def test_a_model_without_a_kind_is_a_gpt(tmp_path):
    old = configs.load(write(tmp_path, "[model]\nlayers = 2\n"))
    assert (old.model.kind, old.model.layers) == ("gpt", 2)
    assert configs.load(write(tmp_path, "[training]\nsteps = 2\n")).model.kind == "gpt"
    assert configs.load(write(tmp_path, ""), ["model.kind=vit", "model.patch=4"]).model.patch == 4


def test_settings_overrule_the_file_and_may_be_strings(tmp_path):
    path = write(tmp_path, "[training]\nsteps = 7\n")
    config = configs.load(path, ["training.steps=9", "run.directory=runs/x", "parallel.grid={data = 3}"])
    assert (config.training.steps, config.run.directory, config.parallel.grid) == (9, "runs/x", {"data": 3})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[training]\nstep = 5\n", r"run.toml: unknown key training.step=5; known here are steps, batch"),
        ("[tranining]\n", r"unknown key tranining={}; known here are model, data, training, parallel, adapter, run"),
        ("[training]\nsteps = 'many'\n", r"training.steps='many': input should be a valid integer"),
        ("[training]\nsteps = 0\n", r"training.steps=0: input should be greater than or equal to 1"),
        (
            "[parallel]\ngrid = { comm = 2 }\n",
            r"grid.comm.*='comm': input should be 'pipe', 'data', .*'row' or 'col'",
        ),
        ("[training]\nlr = inf\n", r"training.lr=inf: input should be a finite number"),
        ("[parallel]\nkernels = 'fast'\n", r"parallel.kernels='fast': input should be 'auto', 'reference' or 'torch'"),
        ("[parallel]\ntensor = '4d'\n", r"parallel.tensor='4d': input should be 'none', '1d', '2d', '2.5d' or '3d'"),
        ("[training]\nbatch = 2\nmicrobatches = 3\n", r"microbatches=3 must be at most batch=2"),
        ("[model]\nkind = 'gtp'\n", r"model.kind='gtp': input should be 'bert', 'gpt', 'llama' or 'vit'"),
        (
            "[model]\npatch = 4\n",
            r"unknown key model.patch=4; known here \(kind='gpt'\) are kind, layers, hidden",
        ),
        ("[model]\nkind = 'vit'\nlayers = 0\n", r": model.layers=0: input should be greater than or equal to 1"),
        ("[model]\nkind = 'vit'\npool = 'last'\n", r"model.pool='last': input should be 'first' or 'mean'"),
        ("model = 3\n", r"model=3: input should be a valid dictionary"),
        ("training = 3\n[model\n", r"run.toml is not valid TOML"),
    ],
    ids=[
        *["key", "section", "type", "range", "axis", "finite", "provider", "choice", "combination"],
        *["kind", "key-of-kind", "range-of-kind", "choice-of-kind", "model", "syntax"],
    ],
)
def test_errors_name_key_value_file_and_remedy(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        configs.load(write(tmp_path, text))


def test_all_errors_come_in_one_message(tmp_path):
    with pytest.raises(ConfigError) as caught:
        configs.load(write(tmp_path, "[training]\nsteps = 0\nbatsh = 1\n"))
    assert re.search("steps=0.*batsh", str(caught.value))


def test_missing_file_names_the_shipped_configurations():
    with pytest.raises(ConfigError, match="cannot read config nowhere: .*; give a file or one of: .*demo.*vit"):
        configs.load("nowhere")


@pytest.mark.parametrize("text", ["", "row", "row=", "row=two", "row=²", "row=2,row=2", "2=row"])
def test_malformed_grids_are_refused(text):
    with pytest.raises(ConfigError, match="write axis=size"):
        configs.parse_grid(text)


@pytest.mark.parametrize("setting", ["steps=1", "training.steps", "training.steps.x=1"])
def test_malformed_settings_are_refused(setting, tmp_path):
    with pytest.raises(ConfigError, match="--set"):
        configs.load(write(tmp_path, "[training]\nsteps = 1\n"), [setting])
