"""``colossal-mpi generate`` prints the same text for a seed on any grid, from runs and from Hugging Face."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
from mpi4py import MPI

from colossal_mpi import Grid, checkpoint
from colossal_mpi.apps import config as configs
from colossal_mpi.apps.training import saved
from colossal_mpi.apps.training.trainer import Trainer
from colossal_mpi.layers import Parallelism, generate, models
from colossal_mpi.runtime.launcher import mpiexec_command
from tests import command_line

CLI = [sys.executable, "-m", "colossal_mpi.apps.cli", "generate"]
MODEL = {"layers": 2, "hidden": 20, "heads": 5, "context": 12, "vocabulary": 259, "std": 0.3}
OPTIONS = ["--prompt", "The ", "--prompt", "An integer", "-n", "15", "--top-k", "40", "--seed", "3"]
OPTIONS += ["--kernels", "reference"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return a run of no steps, in float64, and its trainer."""
    folder = tmp_path_factory.mktemp("generate") / "run"
    table = {"model": MODEL, "parallel": {"dtype": "float64"}}
    trainer = Trainer(configs.validate(table, "generate"), Grid(MPI.COMM_SELF))
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.toml").touch()
    trainer.save(folder / "checkpoints" / "step-0000000", 0)
    return folder, trainer


def start(ranks, *arguments):
    if ranks == 1:
        done = command_line.call("generate", *arguments)
        return replace(done, stdout=done.stdout.encode(), stderr=done.stderr.encode())
    command, env = mpiexec_command(ranks, [*CLI, *map(str, arguments)])
    return subprocess.run(command, env={**os.environ, **env}, capture_output=True, timeout=120, check=False)


def test_the_same_text_on_any_grid(run):
    folder, trainer = run
    prompts = [list(text.encode()) for text in ("The ", "An integer")]
    exact = generate(trainer.model, prompts, 15, temperature=0.8, top_k=40, seed=3, vocabulary=256)
    text = "".join(bytes(a + b).decode(errors="replace") + "\n" for a, b in zip(prompts, exact, strict=True))
    grids = (["pipe=2,col=2", "--tensor", "1d"], ["data=3"], ["row=2,col=2", "--tensor", "2d"])
    for ranks, where in zip((4, 3, 4), grids, strict=True):
        result = start(ranks, folder, *OPTIONS, "--grid", *where)
        assert result.returncode == 0, result.stderr
        assert result.stdout.decode() == text
    assert trainer.task.sample(5) == b"\nThe " + bytes(
        generate(trainer.model, [b"\nThe "], 5, temperature=0.8, vocabulary=256)[0]
    )


def test_a_directory_of_hugging_face_with_its_tokenizer(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    config = models.GPTConfig(vocabulary=300, layers=1, hidden=12, heads=3, positions=20, std=0.3)
    model = models.GPT(config, Parallelism(Grid(MPI.COMM_SELF)))
    models.save_pretrained(model, tmp_path / "hf", extra={"eos_token_id": 7})
    refused = start(1, tmp_path / "hf")
    assert b"has no tokenizer.json: give the tokenizer with --tokenizer FILE" in refused.stderr
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(290)}, unk_token="w0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "hf" / "tokenizer.json"))
    exact = generate(model, [[5, 6]], 30, temperature=0.0, stop=7, vocabulary=290)[0]
    result = start(1, tmp_path / "hf", "--prompt", "w5 w6", "-n", 30, "--temperature", 0)
    assert result.returncode == 0, result.stderr
    assert result.stdout.decode() == "w5 w6" + words.decode(exact) + "\n"
    staged = start(2, tmp_path / "hf", "--grid", "pipe=2")
    assert b"only a checkpoint is cut into stages; make one with convert --to cm" in staged.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], b"no checkpoint at nowhere"),
        (["RUN", "--tokenizer", "nowhere.json"], b"tokenizer nowhere.json: No such file or directory"),
        (["RUN", "--top-p", "0"], b"top_p above 0 and at most 1"),
        (["RUN", "--grid", "data=3"], b"Grid"),
    ],
)
def test_a_wrong_call_is_one_message(run, arguments, message):
    result = start(2, *(run[0] if word == "RUN" else word for word in arguments))
    assert result.returncode != 0
    assert result.stderr.count(b"colossal_mpi: error:") == 1, result.stderr
    assert message in result.stderr


def test_other_models_have_no_text(tmp_path):
    grid = Grid(MPI.COMM_SELF)
    model = models.Bert(models.BertConfig(vocabulary=9, layers=1, hidden=4, heads=2, positions=5), Parallelism(grid))
    checkpoint.save(
        tmp_path / "bert", saved.weights_by_name(model.parameters()), {"model": models.describe(model)}, grid
    )
    result = start(1, tmp_path / "bert")
    assert b"is a Bert: the models that generate text are GPT, Llama" in result.stderr
