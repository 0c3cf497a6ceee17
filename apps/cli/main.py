"""The command line ``colossal-mpi``."""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from colossal_mpi.apps.config import load as configs
from colossal_mpi.errors import ColossalError, ConfigError
from colossal_mpi.grid import world_rank, world_size

# typer brings a click of its own in newer versions and takes the installed one in older ones.
_ClickException: type[Exception] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")


bench = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Measure speed beside that of the peers.",
    epilog="Example: colossal-mpi bench gemm --size 2048",
)
app.add_typer(bench, name="bench")
data = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Turn texts to tokens, and look at these.",
    epilog="Example: colossal-mpi data prepare *.txt corpus.h5",
)
app.add_typer(data, name="data")


@app.callback(invoke_without_command=True, epilog="Example: colossal-mpi run -n 4 colossal-mpi train demo")
def _root(show_version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Distributed linear algebra and parallel deep learning on MPI."""
    if show_version:
        typer.echo(version("colossal-mpi"))
        raise typer.Exit


@app.command(
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    epilog="Example: colossal-mpi run -n 4 colossal-mpi train demo",
)
def run(
    command: Annotated[list[str], typer.Argument(help="Program and its arguments; a .py file is run by this Python.")],
    ranks: Annotated[int, typer.Option("-n", help="Number of ranks.")] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the line and do not run it.")] = False,
) -> None:
    """Start COMMAND on several ranks with the mpiexec of the MPI in use, and print the plain line that does it."""
    from colossal_mpi.apps import launch

    raise typer.Exit(launch.run(ranks, command, dry_run))


@app.command(epilog="Example: mpiexec -n 8 colossal-mpi train demo --grid data=2,row=2,col=2 --set training.steps=50")
def train(
    config: Annotated[str | None, typer.Argument(help=f"A TOML file, or a shipped one: {configs.shipped()}.")] = None,
    grid: Annotated[str | None, typer.Option(help="Axes of the grid, outermost first: data=2,row=2,col=2.")] = None,
    tensor: Annotated[str | None, typer.Option(help="Tensor mode: none, 1d, 2d, 2.5d, 3d.")] = None,
    kernels: Annotated[str | None, typer.Option(help="Local maths: auto, reference, torch.")] = None,
    setting: Annotated[list[str] | None, typer.Option("--set", help="section.key=value; may be repeated.")] = None,
    resume: Annotated[str | None, typer.Option(help="Go on with the run in this directory.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a run in the run directory.")] = False,
    trace: Annotated[int, typer.Option(min=0, help="Trace so many steps from the second on into trace.json.")] = 0,
    show_config: Annotated[
        bool, typer.Option("--show-config", help="Print the file with every key and what it means, and do nothing.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print memory, words and times of a step on the grid, and do nothing.")
    ] = False,
) -> None:
    """Train a model on text or images. Run it under mpiexec or srun, or alone on one rank."""
    from colossal_mpi.apps.planning.beside import predicted
    from colossal_mpi.apps.training import train as training

    given = {"tensor": tensor, "kernels": kernels}
    settings = [*(setting or []), *(f'parallel.{key}="{value}"' for key, value in given.items() if value)]
    if grid:
        settings.append(configs.grid_setting(configs.parse_grid(grid)))
    if (config is None) == (resume is None):
        raise ConfigError("train: give a configuration, or --resume and the directory of a run")
    if show_config or dry_run:
        _shown(config if config is not None else f"{resume}/config.toml", settings, dry_run)
        return
    if config is None:
        raise typer.Exit(training.resume(str(resume), settings, trace, predicted))
    raise typer.Exit(training.start(configs.load(config, settings), overwrite, trace, predicted))


def _shown(source: str, settings: list[str], dry_run: bool) -> None:
    """Print the configuration of a run, or what a step of it takes."""
    from colossal_mpi.apps.data.corpus import fitted
    from colossal_mpi.apps.planning import dry

    resolved = fitted(configs.load(source, settings))
    if dry_run:
        dry.main(resolved)
    elif world_rank() == 0:
        sys.stdout.write(configs.commented(resolved))


@app.command(epilog="Example: colossal-mpi plan llama --ranks 64 --gpu-memory 80GiB --flops 400e12 --bandwidth 25e9")
def plan(
    config: Annotated[str, typer.Argument(help=f"A TOML file, or a shipped one: {configs.shipped()}.")],
    ranks: Annotated[int | None, typer.Option(help="Ranks to plan for; by default those of this job.")] = None,
    memory: Annotated[
        str | None, typer.Option("--memory", "--gpu-memory", help="Of a rank: 80GiB; else no limit.")
    ] = None,
    flops: Annotated[float | None, typer.Option(help="flop/s of a rank; else as measured.")] = None,
    memory_bandwidth: Annotated[float | None, typer.Option(help="Bytes/s of a rank's memory.")] = None,
    bandwidth: Annotated[float | None, typer.Option(help="Bytes/s from other nodes.")] = None,
    near_bandwidth: Annotated[float | None, typer.Option(help="Bytes/s from the own node.")] = None,
    latency: Annotated[float | None, typer.Option(help="Seconds of a message.")] = None,
    ranks_per_node: Annotated[int | None, typer.Option(help="Ranks on a node.")] = None,
    show: Annotated[int, typer.Option(help="Ways to run that are shown.")] = 8,
    rounds: Annotated[int, typer.Option("--try", help="Do so many steps of each of these, taking turns.")] = 0,
    setting: Annotated[list[str] | None, typer.Option("--set", help="section.key=value; may be repeated.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the rows here.")] = None,
) -> None:
    """Find the fastest grid, modes and schedule for a model on so many ranks, by dry runs; explain the winner.

    Under mpiexec the machine is measured by all ranks; with --flops it is another one.
    """
    from colossal_mpi.apps.planning import plan as planning
    from colossal_mpi.apps.planning.rates import Given

    given = Given(flops, memory_bandwidth, latency, bandwidth, near_bandwidth, ranks_per_node)
    options = planning.checked(config, setting or [], ranks, memory, given, show, rounds, json)
    raise typer.Exit(planning.main(options))


@app.command(epilog="Example: colossal-mpi report runs/demo runs/other --output comparison")
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Directories of runs, one or several.")],
    output: Annotated[
        Path | None, typer.Option(help="Directory to write to. [RUN/report, of several RUN/report/comparison]")
    ] = None,
) -> None:
    """Draw a run, or several on the same axes: PNG files and one HTML page that needs nothing else."""
    from colossal_mpi.apps import report as reports

    page, lacking = reports.write(runs, output)
    for picture, reason in lacking:
        typer.echo(f"not shown: {picture}: {reason}")
    typer.echo(f"report {page}")


@app.command(epilog="Example: mpiexec -n 4 colossal-mpi doctor --directory /scratch/me/runs")
def doctor(
    directory: Annotated[Path, typer.Option(help="Where runs are to be written.")] = Path("runs"),
    seconds: Annotated[float, typer.Option(help="Time for measuring messages between ranks.")] = 4.0,
    json: Annotated[bool, typer.Option("--json", help="Print JSON in place of a table.")] = False,
) -> None:
    """Examine MPI, launcher, cores, GPUs, disk and network, and say what to do; exit code 1 if something is bad.

    Start it as the program itself will be started: under mpiexec or srun, with the same variables.
    """
    from colossal_mpi.apps.doctor import examine

    raise typer.Exit(examine.main(directory, seconds, json))


@app.command(epilog="Example: mpiexec -n 4 colossal-mpi inspect runs/demo --verify")
def inspect(
    path: Annotated[Path, typer.Argument(help="A checkpoint, or a run for its latest one.")],
    verify: Annotated[bool, typer.Option("--verify", help="Check every checksum, all ranks their share.")] = False,
    diff: Annotated[Path | None, typer.Option(help="Compare with this one; exit code 1 if they differ.")] = None,
) -> None:
    """Show what a checkpoint holds and whether it is whole, or in what two of them differ."""
    from colossal_mpi.apps.cli import inspect as inspection

    raise typer.Exit(inspection.inspect(path, verify, diff))


@app.command(epilog="Example: mpiexec -n 4 colossal-mpi convert gpt2 gpt2.cm --to cm")
def convert(
    source: Annotated[Path, typer.Argument(help="A directory of Hugging Face, a checkpoint or a run.")],
    target: Annotated[Path, typer.Argument(help="The directory to write; it must not exist.")],
    to: Annotated[str, typer.Option(help="hf: config.json and safetensors. cm: an HDF5 checkpoint.")],
    most: Annotated[int, typer.Option(help="Bytes of weights in one safetensors file.")] = 5 * 10**9,
) -> None:
    """Convert weights between Hugging Face's directories and checkpoints, bit for bit, on any number of ranks."""
    from colossal_mpi.apps.cli import convert as conversion

    conversion.convert(source, target, to, most)


@app.command(epilog="Example: mpiexec -n 2 colossal-mpi generate runs/demo --prompt 'The ' --top-p 0.9 --grid pipe=2")
def generate(
    source: Annotated[Path, typer.Argument(help="A run, a checkpoint, or a directory of Hugging Face.")],
    prompt: Annotated[list[str] | None, typer.Option(help="Text to continue; may be repeated. ['The ']")] = None,
    count: Annotated[int, typer.Option("-n", help="Tokens to draw after each.")] = 160,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Draw from so many of the likeliest.")] = None,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest of this probability together.")] = 1.0,
    seed: Annotated[int, typer.Option(help="The same seed gives the same text on any grid.")] = 0,
    grid: Annotated[str | None, typer.Option(help="Axes of the grid, outermost first: pipe=2,col=2.")] = None,
    tensor: Annotated[str, typer.Option(help="Tensor mode: none, 1d, 2d, 2.5d, 3d.")] = "none",
    tokenizer: Annotated[Path | None, typer.Option(help="A tokenizer.json; of what was trained here: bytes.")] = None,
) -> None:
    """Continue text by a GPT or a Llama, on any grid."""
    from colossal_mpi.apps.cli import generate as generation

    how = generation.How(grid, tensor, temperature, top_k, top_p, seed)
    generation.main(source, prompt or ["The "], count, how, tokenizer)


@bench.command(epilog="Example: colossal-mpi bench gemm --size 2048 --size 8192,512,512 --plot gemm.png")
def gemm(
    size: Annotated[
        list[str] | None, typer.Option(help="M,N,K, or one number for a cube; may be repeated. [2048]")
    ] = None,
    ranks: Annotated[int | None, typer.Option(help="Ranks to start, 4 unless under mpiexec.")] = None,
    dtype: Annotated[str, typer.Option(help="float64, float32, complex64, complex128.")] = "float64",
    algorithm: Annotated[
        list[str] | None, typer.Option(help="numpy, scalapack, auto, summa, ...: may be repeated; all by default.")
    ] = None,
    repeat: Annotated[int | None, typer.Option(help="Rounds of all of them. By default 10, and 1 s of each.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the rows here.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the speeds here (PNG, PDF, SVG).")] = None,
) -> None:
    """Time every matrix product beside NumPy and ScaLAPACK, all taking turns in one run."""
    from colossal_mpi.apps.bench import gemm as benchmark
    from colossal_mpi.apps.bench import options

    chosen = options.checked(size or ["2048"], ranks, dtype, algorithm or [], repeat, json, plot, world=world_size())
    raise typer.Exit(benchmark.main(chosen))


@bench.command("attention", epilog="Example: colossal-mpi bench attention --sequence 4096 --heads 32 --groups 8")
def bench_attention(
    sequence: Annotated[
        list[int] | None, typer.Option(help="Tokens; may be repeated. 1024 to 16384 by default.")
    ] = None,
    heads: Annotated[int, typer.Option(help="Heads of queries.")] = 4,
    groups: Annotated[int | None, typer.Option(help="Heads of keys and values, as many by default.")] = None,
    width: Annotated[int, typer.Option(help="Width of a head.")] = 64,
    dtype: Annotated[str, typer.Option(help="float32 or float64.")] = "float32",
    causal: Annotated[bool, typer.Option(help="Whether a query sees its own and earlier keys only.")] = True,
    json: Annotated[Path | None, typer.Option(help="Write the rows here.")] = None,
) -> None:
    """Measure the memory and time of attention, forward and backward, as the sequence grows."""
    from colossal_mpi.apps.bench import attention as benchmark

    sizes = benchmark.Sizes(heads, heads if groups is None else groups, width, dtype, causal)
    raise typer.Exit(benchmark.main(sequence or [2**i for i in range(10, 15)], sizes, json))


@bench.command("train", epilog="Example: colossal-mpi bench train --hidden 512 --grid row=2,col=2 --tensor 2d")
def bench_train(
    layers: Annotated[int, typer.Option(help="Transformer blocks.")] = 4,
    hidden: Annotated[int, typer.Option(help="Width of the stream.")] = 256,
    heads: Annotated[int, typer.Option(help="Attention heads.")] = 4,
    sequence: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 128,
    batch: Annotated[int, typer.Option(help="Sequences of a step.")] = 8,
    vocabulary: Annotated[int, typer.Option(help="Kinds of tokens.")] = 256,
    kernels: Annotated[
        list[str] | None, typer.Option(help="pytorch, reference, torch: may be repeated; all by default.")
    ] = None,
    grid: Annotated[str | None, typer.Option(help="Axes of the grid of our ranks: row=2,col=2.")] = None,
    tensor: Annotated[str, typer.Option(help="Tensor mode: none, 1d, 2d, 2.5d, 3d.")] = "none",
    repeat: Annotated[int, typer.Option(help="Rounds of all of them.")] = 15,
    json: Annotated[Path | None, typer.Option(help="Write the rows here.")] = None,
) -> None:
    """Time a GPT's training step beside PyTorch eager, all taking turns."""
    from colossal_mpi.apps.bench import train as benchmark
    from colossal_mpi.apps.bench.steps import Sizes

    sizes = Sizes(layers, hidden, heads, sequence, batch, vocabulary)
    raise typer.Exit(benchmark.main(benchmark.checked(sizes, grid, tensor, kernels or [], repeat, json)))


@bench.command("optimizers", epilog="Example: colossal-mpi bench optimizers --optimizer adamw --optimizer muon=2e-3")
def bench_optimizers(
    optimizer: Annotated[
        list[str] | None, typer.Option(help="name, or name=rate,rate; may be repeated. [adamw and muon, five rates]")
    ] = None,
    config: Annotated[str, typer.Option(help="A TOML file, or a shipped one.")] = "demo",
    steps: Annotated[int, typer.Option(help="Steps of each run.")] = 400,
    every: Annotated[int, typer.Option(help="Steps between validations.")] = 25,
    seed: Annotated[list[int] | None, typer.Option(help="Seeds; may be repeated. [0]")] = None,
    setting: Annotated[list[str] | None, typer.Option("--set", help="section.key=value; may be repeated.")] = None,
    json: Annotated[Path | None, typer.Option(help="Keep the losses here; those that it has are not redone.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw them here (PNG, PDF, SVG).")] = None,
) -> None:
    """Train one model by several optimizers and learning rates, and compare validation losses at equal steps."""
    from colossal_mpi.apps.bench import optimizers as benchmark

    raise typer.Exit(benchmark.main(benchmark.cases(config, setting, steps, every, seed, optimizer), json, plot))


@bench.command("pipeline", epilog="Example: colossal-mpi bench pipeline --microbatches 8 --plot pipeline.png")
def bench_pipeline(
    stages: Annotated[int, typer.Option(help="Ranks, one stage each.")] = 2,
    microbatches: Annotated[int, typer.Option(help="Parts of a step's sequences.")] = 4,
    layers: Annotated[int, typer.Option(help="Transformer blocks.")] = 8,
    hidden: Annotated[int, typer.Option(help="Width of the stream.")] = 256,
    heads: Annotated[int, typer.Option(help="Attention heads.")] = 4,
    sequence: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 128,
    batch: Annotated[int, typer.Option(help="Sequences of a step.")] = 8,
    vocabulary: Annotated[int, typer.Option(help="Kinds of tokens.")] = 256,
    simulate: Annotated[int, typer.Option(help="Stages that are simulated with the times.")] = 8,
    repeat: Annotated[int, typer.Option(help="Rounds of all schedules.")] = 10,
    json: Annotated[Path | None, typer.Option(help="Write the rows here.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw what the stages do when here (PNG, PDF, SVG).")] = None,
) -> None:
    """Measure how long the stages of a GPT wait by every pipeline schedule, and simulate more stages."""
    from colossal_mpi.apps.bench import pipeline as benchmark

    sizes = benchmark.Sizes(layers, hidden, heads, sequence, batch, vocabulary, stages, microbatches, simulate)
    raise typer.Exit(benchmark.main(benchmark.checked(sizes, repeat, json, plot)))


@bench.command("checkpoint", epilog="Example: colossal-mpi bench checkpoint --size 2 --directory /scratch/me")
def bench_checkpoint(
    size: Annotated[float, typer.Option(help="GiB of the state, of all ranks together.")] = 1.0,
    ranks: Annotated[int | None, typer.Option(help="Ranks to start, 4 unless under mpiexec.")] = None,
    directory: Annotated[Path, typer.Option(help="Where to write; on the disk that is to be measured.")] = Path("runs"),
    repeat: Annotated[int, typer.Option(help="Rounds of all of them.")] = 5,
    json: Annotated[Path | None, typer.Option(help="Write the rows here.")] = None,
) -> None:
    """Time saving and loading beside plain writing and reading of the same bytes, and the stall of training."""
    from colossal_mpi.apps.bench import checkpoint as benchmark

    raise typer.Exit(benchmark.main(benchmark.checked(size, ranks, directory, repeat, json)))


@data.command("prepare", epilog="Example: colossal-mpi data prepare --tokenizer gpt2.json *.txt corpus.h5")
def data_prepare(
    files: Annotated[list[Path], typer.Argument(help="INPUT... OUT.h5: texts, or .jsonl with a document a line.")],
    tokenizer: Annotated[str, typer.Option(help="bytes, or a JSON file of the package tokenizers.")] = "bytes",
    end: Annotated[str | None, typer.Option(help="Put this token (of bytes: this text) behind each document.")] = None,
    key: Annotated[str, typer.Option(help="Of the text in a line of .jsonl.")] = "text",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.h5.")] = False,
) -> None:
    """Write the tokens of texts of any size to a store, which data.files takes."""
    from colossal_mpi.apps.data import prepare

    if len(files) < 2 or files[-1].suffix != ".h5":
        raise ConfigError("data prepare: give one or more inputs and then a store to write, which ends in .h5")
    prepare.prepare(files[:-1], files[-1], tokenizer, end, key, overwrite)


@data.command("inspect", epilog="Example: colossal-mpi data inspect corpus.h5")
def data_inspect(
    store: Annotated[Path, typer.Argument(help="A token store.")],
    shown: Annotated[int, typer.Option("--tokens", help="Show so many tokens of some documents, as text.")] = 60,
) -> None:
    """Show tokens, documents, vocabulary and some text of a store."""
    from colossal_mpi.apps.data import prepare

    prepare.inspect(store, shown)


def main() -> None:
    """Run the command line; an error of the user's is one message and a non-zero exit of the whole job."""
    try:
        code = app(standalone_mode=False)
    except typer.Abort:
        code = 130
    except _ClickException as problem:
        _fail(ConfigError(f"{problem} (see colossal-mpi --help)"))
    except ColossalError as problem:
        _fail(problem)
    sys.exit(code or 0)


def _fail(problem: ColossalError) -> None:
    if world_size() > 1:
        raise problem from None  # the guards print it once for the job
    sys.stderr.write(f"colossal_mpi: error: {problem}\n")
    sys.exit(1)
