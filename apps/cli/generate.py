"""``colossal-mpi generate``: continue text with the model of a run, a checkpoint or a Hugging Face directory."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer

from colossal_mpi.apps import config as configs
from colossal_mpi.apps.command import Command, GridAxes, Plugins
from colossal_mpi.apps.data import Bytes, Tokenizer, load_tokenizer
from colossal_mpi.apps.training import load_model, settings_of
from colossal_mpi.apps.training.tasks import TASKS, CausalLanguage
from colossal_mpi.errors import ConfigError
from colossal_mpi.grid import Grid, world_size
from colossal_mpi.layers import MODES, generate, kernels, models
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
    strict: Annotated[
        bool,
        typer.Option("--strict", help="Refuse tensors that are not the model's."),
    ] = False

    def run(self) -> int:
        """Print each prompt and its continuation on rank 0.

        Raises
        ------
        ConfigError
            If the model does not generate text, or its tokens are unknown.
        """
        axes = configs.parse_grid(self.grid) if self.grid is not None else {"data": world_size()}
        grid = Grid(None, "auto", **axes)
        model, pipeline, table = load_model(self.source, grid, self.tensor, self.plugin, self.strict)
        kernels.use(self.kernels, grid)
        generating = [kind.model for kind in MODELS.values() if issubclass(TASKS[kind.task], CausalLanguage)]
        if type(model) not in generating:
            names = ", ".join(model.__name__ for model in generating)
            raise ConfigError(f"{self.source} is a {type(model).__name__}: the models that generate text are {names}")
        settings = settings_of(self.source)
        words, stop = self._tokenizer(bool(table), settings), models.end_tokens(table, settings)
        prompts = [words.encode([prompt.encode()], special=True)[0].tolist() for prompt in self.prompt]
        continuations = generate(
            model,
            prompts,
            self.count,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            seed=self.seed,
            stop=stop,
            vocabulary=words.vocabulary,
            pipeline=pipeline,
        )
        if grid.rank == 0:
            for prompt, before, drawn in zip(self.prompt, prompts, continuations, strict=True):
                _print(_continued(words, prompt, before, drawn))
        return 0

    def _tokenizer(self, foreign: bool, settings: Mapping[str, Path]) -> Tokenizer:
        """Return the tokenizer of the option or of the settings; `Bytes` for a model that a run trained on a text."""
        path = self.tokenizer or settings.get("tokenizer.json")
        if path is not None:
            return load_tokenizer(str(path))
        if foreign:
            raise ConfigError(f"{self.source} has no tokenizer.json: give the tokenizer with --tokenizer FILE or bytes")
        return Bytes()


def _continued(words: Tokenizer, prompt: str, before: list[int], drawn: list[int]) -> str:
    """Return a prompt as it was typed and the text of the tokens drawn after it.

    The tokens are decoded after those of the prompt, because a decoder drops a blank at the beginning of a text.
    """
    start, whole = words.decode(before), words.decode([*before, *drawn])
    if not whole.startswith(start):  # the decoder joins the last word of the prompt with the next one
        return whole.decode(errors="replace")
    rest, blanks = whole[len(start) :], prompt[len(prompt.rstrip()) :].encode()
    if not start.endswith(blanks):  # blanks that have no tokens, and that the decoder puts before a word
        rest = rest.removeprefix(blanks)
    return prompt + rest.decode(errors="replace")


def _print(text: str) -> None:
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # characters that an ASCII terminal cannot show
    print(text, flush=True)
