"""``colossal-mpi generate``: continue text with the model of a run, a checkpoint or a Hugging Face directory."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer

from colossal_mpi.apps import config as configs
from colossal_mpi.apps.command import Command, GridAxes, Plugins
from colossal_mpi.apps.data import Bytes, Tokenizer, load_tokenizer
from colossal_mpi.apps.training import load_model
from colossal_mpi.apps.training.tasks import TASKS, CausalLanguage
from colossal_mpi.errors import ConfigError
from colossal_mpi.grid import Grid, world_size
from colossal_mpi.layers import MODES, generate, kernels
from colossal_mpi.layers.models import MODELS


@dataclass(frozen=True, kw_only=True)
class Generate(Command):
    """Continue text with a GPT or a Llama, on any grid."""

    example = "mpiexec -n 2 colossal-mpi generate runs/demo --prompt 'The ' --top-p 0.9 --grid pipe=2"

    source: Annotated[Path, typer.Argument(help="A run, a checkpoint, or a Hugging Face directory.")]
    prompt: Annotated[
        list[str], typer.Option(help="Text to continue; may be repeated. By default 'The '.", show_default=False)
    ] = field(default_factory=lambda: ["The "])
    count: Annotated[int, typer.Option("-n", help="Tokens to draw after each prompt.")] = 160
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.8
    top_k: Annotated[int | None, typer.Option(help="Draw from this many tokens only.")] = None
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens of this probability together.")] = 1.0
    seed: Annotated[int, typer.Option(help="The same seed gives the same text on any grid.")] = 0
    grid: GridAxes = None
    tensor: Annotated[str, typer.Option(help=f"Tensor mode: {', '.join(MODES)}.")] = "none"
    kernels: Annotated[str, typer.Option(help=f"Local kernels: {', '.join(kernels.choices())}.")] = kernels.AUTO
    plugin: Plugins = field(default_factory=list)
    tokenizer: Annotated[Path | None, typer.Option(help="By default the run's, else bytes.")] = None

    def run(self) -> int:
        """Print each prompt and its continuation on rank 0.

        Raises
        ------
        ConfigError
            If the model does not generate text, or its tokens are unknown.
        """
        axes = configs.parse_grid(self.grid) if self.grid is not None else {"data": world_size()}
        grid = Grid(None, "auto", **axes)
        model, pipeline, table = load_model(self.source, grid, self.tensor, self.plugin)
        kernels.use(self.kernels, grid)
        generating = [kind.model for kind in MODELS.values() if issubclass(TASKS[kind.task], CausalLanguage)]
        if type(model) not in generating:
            names = ", ".join(model.__name__ for model in generating)
            raise ConfigError(f"{self.source} is a {type(model).__name__}: the models that generate text are {names}")
        words = self._tokenizer(bool(table))
        continuations = generate(
            model,
            [words.encode([prompt.encode()], special=True)[0].tolist() for prompt in self.prompt],
            self.count,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            seed=self.seed,
            stop=table.get("eos_token_id") or (),
            vocabulary=words.vocabulary,
            pipeline=pipeline,
        )
        if grid.rank == 0:
            for prompt, tokens in zip(self.prompt, continuations, strict=True):
                _print(prompt + words.decode(tokens).decode(errors="replace"))
        return 0

    def _tokenizer(self, foreign: bool) -> Tokenizer:
        """Return the tokenizer of the option or of the directory; `Bytes` for a model that a run trained on a text."""
        path = self.tokenizer or self.source / "tokenizer.json"
        if self.tokenizer is not None or path.is_file():
            return load_tokenizer(str(path))
        if foreign:
            raise ConfigError(f"{self.source} has no tokenizer.json: give the tokenizer with --tokenizer FILE")
        return Bytes()


def _print(text: str) -> None:
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # characters that an ASCII terminal cannot show
    print(text, flush=True)
