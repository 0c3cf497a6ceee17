"""Names that a plugin registers train, resume and are choices everywhere; messages name wrong plugins."""

import builtins
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from colossal_mpi import ConfigError
from colossal_mpi.apps import config as configs
from colossal_mpi.runtime.launcher import mpiexec_command

PLUGIN = Path(__file__).parents[1] / "reference" / "plugin.py"
EVERYTHING = """
[model]
kind = "bigram"
hidden = 6
context = 12
spread = 0.2
[training]
steps = 4
batch = 4
microbatches = 2
optimizer = "scaled-descent"
optimizer_options = { factor = 2.0 }
rate = "square-root"
rate_options = { least = 0.8 }
warmup = 1
checkpoint_every = 2
evaluate_every = 2
evaluate_batches = 1
[parallel]
grid = { col = 2 }
tensor = "replicated"
schedule = "one-by-one"
kernels = "reference"
dtype = "float64"
[run]
directory = "run"
peak_flops = 1e9
report = false
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "all.toml").write_text(EVERYTHING)
    shutil.copy(PLUGIN, tmp_path / "mine.py")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(ranks, *arguments):
    command, env = mpiexec_command(ranks, [sys.executable, "-m", "colossal_mpi.apps.cli", "train", *arguments])
    return subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, timeout=120, check=False)


def losses(run):
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.deadline(180)
def test_everything_of_a_plugin_trains_and_is_found_again_by_a_resumed_run(folder, monkeypatch):
    done = train(2, "all.toml", "--plugin", "mine.py")
    assert done.returncode == 0, done.stderr
    assert "Bigram of 3,328 parameters, float64, tensor replicated on Grid(col=2)" in done.stdout
    assert (folder / "run" / "sample.txt").read_bytes() == b"as the plugin says"
    facts = json.loads((folder / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert facts["learning_rate"] == pytest.approx(1e-3 * 0.8)  # the square root of 1/3 is less

    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    more = train(1, "--resume", "../run", "--grid", "data=1", "--tensor", "none", "--set", "training.steps=6")
    assert more.returncode == 0, more.stderr
    alone = train(1, "../all.toml", "--plugin", "../mine.py", "--grid", "data=1", "--tensor", "none")
    assert alone.returncode == 0, alone.stderr
    assert losses(folder / "run")[:4] == pytest.approx(losses(folder / "elsewhere" / "run"), rel=1e-12)
    assert len(losses(folder / "run")) == 6


LISTS = """
import sys
from colossal_mpi.apps import config as configs
from colossal_mpi.apps.planning import candidates
from colossal_mpi.apps.training import compare
config = configs.load("all.toml", ['run.plugins=["mine.py"]'])
for key in ("parallel.tensor", "parallel.schedule", "training.optimizer", "training.rate"):
    print(configs.choices(key)[-1])
print(*[tensor for tensor, _ in candidates.tensor_shapes(config, 2)])
print(*[case.name for case in compare.cases()])
print(*{way["schedule"] for way in candidates.schedules(configs.load("demo"), {"pipe": 2})} & {"one-by-one", "gpipe"})
print(*sorted({"bigram", "unigram"} & set(configs.choices("model.kind"))))
print(*configs.model_sections()["unigram"].model_fields)
for setting in ("optimizer_options={factor=\\"x\\"}", "optimizer_options={fctor=1}", "rate_options={floor=0.1}"):
    try:
        configs.load("all.toml", ['run.plugins=["mine.py"]', f"training.{setting}"])
    except configs.toml.ConfigError as problem:
        print(problem)
"""


def test_choices_plans_and_the_demo_derive_from_the_registries(folder):
    done = subprocess.run([sys.executable, "-c", LISTS], capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr == ""
    *choices, shapes, cases, schedules, kinds, keys, wrong, unknown, alien = done.stdout.splitlines()
    assert choices == ["replicated", "one-by-one", "scaled-descent", "square-root"]
    assert shapes == "1d replicated"
    assert cases == "one rank 1d 2d 2.5d 3d replicated ring ulysses"
    assert schedules == "one-by-one"
    assert kinds == "bigram unigram"
    assert keys == "kind layers hidden context vocabulary spread"
    assert "option factor='x' of 'scaled-descent': input should be a valid number" in wrong
    assert "'scaled-descent' has no option 'fctor'; it has factor" in unknown
    assert "'square-root' has no option 'floor'; it has least" in alien


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"run.plugins: cannot read .*wrong.py: No such file or directory"),
        ("import nowhere\n", r"run.plugins: .*wrong.py failed with ModuleNotFoundError: No module named 'nowhere'"),
        ("open('/nowhere/x')\n", r"run.plugins: .*wrong.py failed with FileNotFoundError: .*'/nowhere/x'"),
        ("raise SystemExit(3)\n", r"run.plugins: .*wrong.py failed with SystemExit: 3"),
        (
            "from colossal_mpi.layers.parallelism import MODES, Mode, register_mode\n"
            "register_mode(Mode('2d', MODES['1d'].template, ('col',), 'Another.'))\n",
            r"run.plugins: .*wrong.py failed with OptionError: tensor mode '2d' is registered already",
        ),
    ],
    ids=["missing", "raises", "lacks-a-file", "exits", "taken"],
)
def test_errors_of_a_plugin_name_its_file(tmp_path, text, message):
    path = tmp_path / "wrong.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        configs.load("demo", [f"run.plugins=['{path}']"])


def test_a_plugin_that_is_given_by_two_paths_is_loaded_once(tmp_path):
    (tmp_path / "counted.py").write_text("import builtins\nbuiltins.counted = getattr(builtins, 'counted', 0) + 1\n")
    (tmp_path / "link.py").symlink_to("counted.py")
    plugins = [str(tmp_path / name) for name in ("counted.py", "link.py")]
    config = configs.load("demo", [configs.setting("run.plugins", plugins)])
    assert config.run.plugins == plugins
    assert vars(builtins).pop("counted") == 1


def test_the_benchmark_of_optimizers_knows_those_of_a_plugin(folder):
    code = "from colossal_mpi.apps.bench.optimizers import Optimizers as O\n"
    code += "print(O(config='demo', optimizer=['scaled-descent=1e-3'], setting=['run.plugins=[\"mine.py\"]']).cases)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert "scaled-descent" in done.stdout, done.stderr
