"""``colossal-mpi convert`` keeps every bit of the weights to a checkpoint and back, on any number of ranks."""

import json
from pathlib import Path

import numpy as np
import pytest
from mpi4py import MPI

from colossal_mpi import CheckpointError, Layout, OptionError, checkpoint, distarray
from colossal_mpi.apps import training
from colossal_mpi.apps.cli.convert import convert
from colossal_mpi.apps.config import Config
from colossal_mpi.apps.training import trainer
from colossal_mpi.grid import Grid
from colossal_mpi.layers import Parallelism, generate, models
from tests import command_line
from tests.reference import hf_case as case

prepared_by = pytest.mark.prepare(case.prepare)
MOST = 10**9


@prepared_by
@pytest.mark.ranks(3)
def test_there_and_back_is_the_same_bits(prepared, shared_path):
    for name in ("gpt2-untied", "mistral", "qwen2-window", "qwen3", "mixtral", "qwen3-experts", "bert", "vit"):
        source, middle, target = prepared / name, shared_path / f"{name}.cm", shared_path / name
        convert(source, middle, "cm", MOST)
        convert(middle, target, "hf", 9000)
        if MPI.COMM_WORLD.rank == 0:
            assert case.same_tensors(source, target)
            before, after = case.table(source), case.table(target)
            differing = {key for key in before if before[key] != after.get(key)}
            assert not differing
            assert models.read_settings(models.find_settings(target)) == models.read_settings(
                models.find_settings(source)
            )


SETTINGS = {
    "generation_config.json": b'{"eos_token_id": [3, 4]}',
    "tokenizer.json": b'{"version": "1.0"}',
    "tokenizer_config.json": b'{"tokenizer_class": "PreTrainedTokenizerFast"}',
    "chat_template.jinja": "naïve".encode(),
}


def test_tokenizer_and_generation_settings_travel(tmp_path):
    grid = Grid(MPI.COMM_SELF)
    model = models.GPT(models.GPTConfig(vocabulary=9, layers=1, hidden=4, heads=2, positions=5), Parallelism(grid))
    models.save_pretrained(model, tmp_path / "hf", extra={"eos_token_id": 3}, settings=SETTINGS)
    convert(tmp_path / "hf", tmp_path / "cm", "cm", MOST)
    convert(tmp_path / "cm", tmp_path / "back", "hf", MOST)
    assert models.read_settings(models.find_settings(tmp_path / "back")) == SETTINGS
    assert case.table(tmp_path / "back")["eos_token_id"] == 3
    assert models.end_tokens({}, training.settings_of(tmp_path / "cm")) == [3, 4]
    (tmp_path / "cm" / "tokenizer.json").write_bytes(b'{"version": "2.0"}')
    assert "tokenizer.json is not the file that was written" in next(iter(checkpoint.verify(tmp_path / "cm", grid)))


def test_strict_refuses_what_would_be_left_aside_and_said(tmp_path):
    """A BERT of masked language alone has no place for the pooler of a directory."""
    config = {"vocabulary": 9, "layers": 1, "hidden": 4, "heads": 2, "inner": 3, "positions": 5}
    model = models.Bert(models.BertConfig(**config), Parallelism(Grid(MPI.COMM_SELF)))
    models.save_pretrained(model, tmp_path / "hf")
    table = case.table(tmp_path / "hf") | {"architectures": ["BertForMaskedLM"]}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(table))
    strict = command_line.call("convert", tmp_path / "hf", tmp_path / "cm", "--to", "cm", "--strict")
    assert strict.returncode == 1
    assert "hf holds more than its model: it has bert.pooler.dense.bias, bert.pooler.dense.weight" in strict.stderr
    assert not (tmp_path / "cm").exists()
    with pytest.warns(UserWarning, match=r"4 tensors .* are left aside: bert.pooler.dense.bias.*\(--strict\) refuses"):
        assert command_line.call("convert", tmp_path / "hf", tmp_path / "cm", "--to", "cm").returncode == 0
    refused = command_line.call("generate", tmp_path / "hf", "--strict")
    assert "hf holds more than its model" in refused.stderr


@prepared_by
@pytest.mark.grids({"pipe": 2, "data": 2})
def test_stages_of_a_mixtral_write_the_text_of_one_rank(grid, prepared, shared_path):
    convert(prepared / "mixtral", shared_path / "cm", "cm", MOST)
    ids = case.TOKENS[:3, :4].tolist()
    one = models.from_pretrained(prepared / "mixtral", Parallelism(Grid(MPI.COMM_SELF)))
    staged, pipeline, _ = training.load_model(shared_path / "cm", grid, "none")
    assert generate(staged, ids, 6, temperature=0.0, pipeline=pipeline) == generate(one, ids, 6, temperature=0.0)


@pytest.mark.ranks(2)
def test_a_run_becomes_a_directory_of_hugging_face(shared_path):
    config = Config.model_validate(
        {
            "model": {"layers": 1, "hidden": 12, "heads": 3, "context": 8},
            "training": {"batch": 2, "evaluate_batches": 1},
            "parallel": {"grid": {"col": 2}, "tensor": "2d"},
        }
    )
    grid = Grid(col=2)
    run = trainer.Trainer(config, grid)
    (shared_path / "run" / "checkpoints").mkdir(parents=True, exist_ok=True)
    (shared_path / "run" / "config.toml").touch()
    (shared_path / "run" / "tokenizer.json").write_text("{}")
    run.save(shared_path / "run" / "checkpoints" / "step-0000003", 3)
    convert(shared_path / "run", shared_path / "hf", "hf", MOST)
    saved = shared_path / "run" / "checkpoints" / "step-0000003"
    for source in (shared_path / "run", saved, saved.with_name("latest")):
        assert training.settings_of(source)["tokenizer.json"].samefile(shared_path / "run" / "tokenizer.json")
    assert (shared_path / "hf" / "tokenizer.json").read_text() == "{}"
    back = models.from_pretrained(shared_path / "hf", Parallelism(grid, "2d"))
    for mine, theirs in zip(run.model.parameters(), back.parameters(), strict=True):
        assert np.array_equal(mine.value.local, theirs.value.local), mine.name


@prepared_by
@pytest.mark.ranks(2)
def test_what_cannot_be_converted_is_refused(prepared, shared_path):
    with pytest.raises(OptionError, match=r"--to 'onnx': use 'hf' or 'cm'"):
        convert(prepared / "gpt2", shared_path / "x", "onnx", MOST)
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*gpt2: manifest.json is missing"):
        convert(prepared / "gpt2", shared_path / "x", "hf", MOST)
    with pytest.raises(CheckpointError, match=r"config.json cannot be read: No such file"):
        convert(Path("nowhere"), shared_path / "x", "cm", MOST)
    convert(prepared / "gpt2", shared_path / "there", "cm", MOST)
    with pytest.raises(CheckpointError, match=r"there exists: a checkpoint is never overwritten"):
        convert(shared_path / "there", shared_path / "there", "hf", MOST)
    grid = Grid(col=2)
    checkpoint.save(shared_path / "bare", {"w": distarray.zeros([3], grid, Layout(None))}, {}, grid)
    with pytest.raises(CheckpointError, match="does not say of which model it is"):
        convert(shared_path / "bare", shared_path / "x", "hf", MOST)
