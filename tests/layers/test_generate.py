"""Generation with a KV cache equals a run of the whole model for each token, on any grid."""

import json
from dataclasses import replace

import numpy as np
import pytest
from mpi4py import MPI

from colossal_mpi import ColossalError, Grid, OptionError, ShapeError, comm, from_global, ledger, random
from colossal_mpi.layers import Context, Decoding, Parallelism, SelfAttention, generate
from colossal_mpi.layers.containers import Sequential
from colossal_mpi.layers.head import Head
from colossal_mpi.layers.inference.kv_cache import KVCache
from colossal_mpi.layers.models import GPT, GPTConfig, Llama, LlamaConfig
from colossal_mpi.layers.pipeline import Pipeline, partition, stage_grid
from colossal_mpi.platform import backend
from tests.cases import host, inner, totals
from tests.reference.modes import GRIDS, SEQUENCE, mode_of

COMMON = {"layers": 2, "positions": 13, "dtype": "float64", "std": 0.4}
QWEN = {"sliding_window": 4, "sliding_layers": (1,), "qk_norm": True, "bias": True, "out_bias": False}
MODELS = {
    "gpt": (GPT, GPTConfig(vocabulary=37, hidden=20, heads=5, **COMMON)),
    "llama": (Llama, LlamaConfig(vocabulary=41, hidden=24, heads=6, groups=3, inner=11, **COMMON)),
    "qwen": (Llama, LlamaConfig(vocabulary=41, hidden=24, heads=6, groups=3, inner=11, **QWEN, **COMMON)),
    "one-group": (Llama, LlamaConfig(vocabulary=41, hidden=24, heads=6, groups=1, inner=11, **COMMON)),
}
B, LENGTHS = 5, np.array([3, 1, 8, 5, 2])
TOKENS = np.random.default_rng(6).integers(0, 37, (B, COMMON["positions"]))
PROMPTS = [list(map(int, row[:n])) for row, n in zip(TOKENS, LENGTHS, strict=True)]
STEPS = 3
"""Steps of one token each, after the prompts."""
OPTIONS = {
    "greedy": {"temperature": 0.0},
    "plain": {"temperature": 0.7},
    "top-k": {"top_k": 5, "seed": 1},
    "top-p": {"top_p": 0.8, "temperature": 1.5},
    "both": {"top_k": 9, "top_p": 0.6, "vocabulary": 30},
    "stop": {"stop": [3, 5, 7, 11, 13, 17, 19, 23]},
    "window": {"window": 6},
}
COUNT = 7
"""Number of tokens that are drawn, more than the positions that the longest prompt leaves."""
TEXTS = {"gpt": OPTIONS, "llama": {name: OPTIONS[name] for name in ("greedy", "plain")}}
PIPES = (
    {"pipe": 2},
    {"pipe": 3},
    {"pipe": 2, "data": 2},
    {"pipe": 2, "seq": 2},
    {"pipe": 2, "row": 2, "col": 2},
    {"pipe": 2, "col": 2, "depth": 2},
)
EVERY_GRID = (*GRIDS, *SEQUENCE, {"data": 8}, *PIPES)
every_grid = pytest.mark.grids(*EVERY_GRID)


def make(name, grid):
    """Return a model on this rank's stage, its pipeline if there is one, and its parallelism."""
    kind, config = MODELS[name]
    place = stage_grid(grid)
    p = Parallelism(place, mode_of(place))
    model = kind(config, p)
    return model, Pipeline(partition(model, grid), grid) if "pipe" in grid.axes else None, p


def texts(name, grid, cases=None, **options):
    model, pipeline, _ = make(name, grid)
    chosen = {case: some for case, some in TEXTS[name].items() if cases is None or case in cases}
    return {
        case: generate(model, PROMPTS, COUNT, pipeline=pipeline, **some, **options) for case, some in chosen.items()
    }


def prepare(path):
    """Write the logits of whole texts, and texts made without a cache, on one rank."""
    grid = Grid(MPI.COMM_SELF)
    logits = {}
    for name in MODELS:
        model, _, p = make(name, grid)
        logits[name] = host(model.forward(from_global(TOKENS, grid, p.tokens()), Context(train=False))[0])
    for name in TEXTS:
        (path / f"{name}.json").write_text(json.dumps(texts(name, grid, cached=False)))
    np.savez(path / "logits.npz", **logits)


prepared_by = pytest.mark.prepare(prepare)


def step_by_step(name, grid):
    """Return the logits of the last token of each prompt and of the tokens after it, on the last stage."""
    model, pipeline, p = make(name, grid)
    cache, made = KVCache(int(LENGTHS.max()) + STEPS), []
    for step in range(STEPS + 1):
        at = LENGTHS + step - 1
        ids = np.take_along_axis(TOKENS, at[:, None], 1) if step else TOKENS[:, : LENGTHS.max()]
        ctx = Context(
            train=False, positions=at[:, None] if step else None, decoding=Decoding(cache, None if step else at)
        )
        x = from_global(ids, p.grid, p.tokens())
        border = (*ids.shape, model.config.hidden), p.stream(), "float64"
        y = model.forward(x, ctx)[0] if pipeline is None else pipeline.forward(x, ctx, border)
        made.append(None if y is None else y.gather()[:, 0])
    return made, cache


@prepared_by
@every_grid
def test_logits_with_a_cache_are_those_of_whole_texts(grid, prepared):
    for name, exact in np.load(prepared / "logits.npz").items():
        made, _ = step_by_step(name, grid)
        for step, logits in enumerate(made):
            whole = np.take_along_axis(exact, (LENGTHS + step - 1)[:, None, None], 1)[:, 0]
            assert logits is None or np.max(abs(logits - whole)) <= 1e-12 * np.max(abs(whole)), name
        assert (made[0] is None) == (grid.coords.get("pipe", 0) < grid.axes.get("pipe", 1) - 1)


@prepared_by
@every_grid
def test_texts_are_those_of_one_rank_without_a_cache(grid, prepared):
    """Each grid takes about a third of the options, the next grid the next ones."""
    for name, options in TEXTS.items():
        first, cases = EVERY_GRID.index(dict(grid.axes)), list(options)
        cases = {cases[(first + i) % len(cases)] for i in range(0, len(cases), 3)}
        exact, mine = json.loads((prepared / f"{name}.json").read_text()), texts(name, grid, cases)
        assert mine == {case: exact[case] for case in cases}, name
        assert comm.collect(mine, grid) == [mine] * grid.size
        assert len({json.dumps(some) for some in exact.values()}) == len(options)


def test_texts_end_where_they_are_to_and_have_no_other_tokens():
    stop, mine = set(OPTIONS["stop"]["stop"]), texts("gpt", Grid(MPI.COMM_SELF))
    assert all(token < 30 for text in mine["both"] for token in text)
    assert not any(stop & set(text[:-1]) for text in mine["stop"])
    assert all(len(text) == COUNT or text[-1] in stop for text in mine["stop"])
    assert min(map(len, mine["stop"])) < COUNT


@pytest.mark.grids({"data": 2, "col": 2}, {"row": 2, "col": 2})
def test_a_text_is_the_same_beside_any_other(grid):
    model, _, _ = make("gpt", grid)
    whole = generate(model, PROMPTS, COUNT, top_k=7)
    assert generate(model, PROMPTS[:1], COUNT, top_k=7) == whole[:1]
    assert generate(model, [*PROMPTS, [1] * 30], COUNT, top_k=7)[:B] == whole
    assert generate(model, PROMPTS, 4, top_k=7) == [text[:4] for text in whole]
    assert generate(model, PROMPTS, 0) == [[]] * B
    assert generate(model, [], 3) == []
    stored = GPT(MODELS["gpt"][1], Parallelism(grid, mode_of(grid), keep_gathered=False, zero=3))
    assert generate(stored, PROMPTS, COUNT, top_k=7) == whole
    assert generate(model, PROMPTS, COUNT, top_k=7, seed=1) != whole


@pytest.mark.grids({}, {"data": 2, "col": 2}, {"row": 2, "col": 3}, {"depth": 2, "row": 2, "col": 2}, {"seq": 3})
def test_memory_is_that_of_keys_and_values_once(grid):
    for name, (_, config) in MODELS.items():
        cache = step_by_step(name, grid)[1]
        heads = getattr(config, "groups", config.heads)
        cut_heads = name != "one-group" or grid.axes.get("col", 1) == 1
        copies = 1 if cut_heads else grid.axes["col"]  # where the queries of the group are cut, each rank has its keys
        slots, window = LENGTHS.max() + STEPS, getattr(config, "sliding_window", None) or 99
        sliding = range(config.layers) if getattr(config, "sliding_layers", None) is None else config.sliding_layers
        kept = sum(min(slots, window) if i in sliding else slots for i in range(config.layers))
        whole = 2 * kept * B * heads * config.hidden // config.heads
        assert sum(comm.collect(cache.nbytes, grid)) == 8 * whole * copies


@pytest.mark.grids({}, {"seq": 2})
@pytest.mark.parametrize("window", [1, 4, 5])
def test_a_window_keeps_as_many_tokens_as_it_has(grid, window):
    """Tokens come one by one, several at once, and more than the window has."""
    p, (b, s, h, heads) = Parallelism(grid), (2, 17, 12, 3)
    layer = SelfAttention(h, heads, p, "a", window=window, dtype="float64", std=0.5)
    x = random.normal((b, s, h), grid, p.stream(), 0, "x")
    exact, cache, done = layer.forward(x, Context())[0].gather(), KVCache(s), []
    for start, stop in ((0, 7), (7, 8), (8, 14), (14, 15), (15, 17)):
        context = Context(decoding=Decoding(cache), positions=np.arange(start, stop) if start else None)
        done.append(layer.forward(x[:, start:stop].redistribute(p.stream()), context)[0].gather())
    assert np.max(abs(np.concatenate(done, 1) - exact)) <= 1e-14 * np.max(abs(exact))
    assert sum(comm.collect(cache.nbytes, grid)) == 2 * b * window * h * 8


def test_long_texts_in_a_window_are_those_without_a_cache():
    kind, config = MODELS["qwen"]
    model = kind(replace(config, positions=40, sliding_layers=None), Parallelism(Grid(MPI.COMM_SELF)))
    exact = generate(model, PROMPTS, 25, temperature=0.0, cached=False)
    assert generate(model, PROMPTS, 25, temperature=0.0) == exact


@pytest.mark.grids({"row": 2, "col": 2}, {"data": 2, "col": 2})
def test_words_of_a_token(grid):
    """A pass of one token moves the words of sequences of one token and of the choice, but no logits and no keys."""
    model, _, p = make("llama", grid)

    def words(length, cache):
        ids = from_global(TOKENS[:, :1], grid, p.tokens())
        with ledger.record() as moved:
            model.forward(ids, Context(train=False, decoding=Decoding(cache), positions=np.full((B, 1), length)))
        return moved.words

    cache = KVCache(9)
    assert words(0, None) == words(0, cache) == words(8, cache)


@pytest.mark.grids({"seq": 3}, {"seq": 2})
def test_words_in_a_ring(grid):
    p, (b, s, h, heads), c = Parallelism(grid), (2, 7, 12, 3), grid.size
    layer = SelfAttention(h, heads, p, "a", dtype="float64")
    x, cache = random.normal((b, s, h), grid, p.stream(), 0, "x"), KVCache(s + 1)
    for step, tokens in enumerate((x, x[:, :1])):
        positions = np.full((b, 1), s) if step else None
        with ledger.record() as moved:
            layer.forward(tokens, Context(decoding=Decoding(cache), positions=positions))
        n = tokens.shape[1]
        assert sum(comm.collect(moved.words, grid)) == (c - 1) * n * b * (3 * h + heads * (h // heads + 2))
    slots = comm.collect(cache.nbytes, grid)
    assert max(slots) - min(slots) <= 8 * 2 * b * h  # one token


@pytest.mark.grids({"row": 2, "col": 2}, {"col": 3}, {"col": 2, "depth": 2}, {"depth": 2, "row": 1, "col": 2})
def test_a_head_of_some_tokens_has_its_adjoint(grid):
    p, sizes = Parallelism(grid, mode_of(grid)), {"h": 6, "v": 11}
    head = Head("bsh,vh->bsv", sizes, "v", p, "head", bias=False, std=1.0, dtype="float64")
    x = random.normal((5, 7, 6), grid, p.stream(), 0, "x")
    whole, _ = head.forward(x, Context())
    at = np.array([6, 0, 3, 3, 1])
    y, cache = head.forward(x, Context(decoding=Decoding(logits_at=at)))
    assert y.shape == (5, 1, 11)
    picked = np.take_along_axis(whole.gather(), at[:, None, None], 1)
    assert np.max(abs(y.gather() - picked)) <= 1e-14 * np.max(abs(picked))
    dy = random.normal(y.shape, grid, y.layout, 1, "dy")
    dx = head.backward(dy, cache)
    assert dx.layout == x.layout
    left, right = totals([inner(dy, y), inner(dx, x)], grid)
    assert abs(left - right) <= 1e-13 * dy.norm() * y.norm()
    assert head.weight.reduce().norm() > 0


@pytest.mark.grids({"row": 2, "col": 2})
def test_a_model_of_ones_own_generates_too(grid):
    p = Parallelism(grid, "2d")
    gpt = GPT(MODELS["gpt"][1], p)
    exact = generate(gpt, PROMPTS, 3, temperature=0)
    plain = super(Head, gpt.layers[-1])
    gpt.layers[-1].forward = plain.forward  # a head that does all tokens
    assert generate(Sequential(*gpt.layers), PROMPTS, 3, temperature=0) == exact


@pytest.mark.grids({"data": 2})
def test_what_cannot_be_generated_is_refused(grid):
    model, _, p = make("gpt", grid)
    with pytest.raises(ShapeError, match="prompt 1 is empty: it must have one token or more"):
        generate(model, [[1], []], 3)
    with pytest.raises(ShapeError, match="prompt 0 has 2 tokens from 1 to 37: they must be from 0 on, all below 37"):
        generate(model, [[1, 37]], 3)
    with pytest.raises(OptionError, match="count=-1"):
        generate(model, PROMPTS, -1)
    with pytest.raises(OptionError, match="window=14 of 13 positions"):
        generate(model, PROMPTS, 3, window=14)
    for options in ({"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.1}, {"vocabulary": 0}):
        with pytest.raises(OptionError, match="temperature must be 0 or more, top_p above 0"):
            generate(model, PROMPTS, 3, **options)
    both = SelfAttention(6, 3, p, "a", causal=False)
    x = random.normal((2, 3, 6), grid, p.stream(), 0, "x").astype("float32")
    with pytest.raises(OptionError, match="kept for causal attention alone"):
        both.forward(x, Context(decoding=Decoding(KVCache(3))))
    causal = SelfAttention(6, 3, p, "a")
    with pytest.raises(ShapeError, match="a token at position 2 needs 3 slots; the cache has 2"):
        causal.forward(x, Context(decoding=Decoding(KVCache(2))))
    model.layers[-1].weight.value.local[...] *= backend.namespace(x.local).nan
    with pytest.raises(ColossalError, match="the logits after prompt 0, 1, 2, 3, 4 are not numbers"):
        generate(model, PROMPTS, 3)
