"""`Parallelism` refuses modes, products and grids that do not fit, naming them, and cuts weights evenly."""

import ast
from dataclasses import replace
from pathlib import Path

import pytest

from colossal_mpi import GridError, Layout, OptionError, ShapeError
from colossal_mpi.layers import (
    MODES,
    SEQUENCE_MODES,
    Linear,
    Mode,
    Parallelism,
    SequenceMode,
    register_mode,
    register_sequence_mode,
)
from colossal_mpi.layers.attention.self_attention import SelfAttention
from colossal_mpi.layers.parallelism import Template


def test_no_layer_knows_the_name_of_a_mode():
    folder = Path(__file__).parents[2] / "layers"
    for path in folder.rglob("*.py"):
        if path.name != "parallelism.py":
            words = [node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)]
            assert not {word for word in words if isinstance(word, str)} & set(MODES) - {"none"}, path


def test_every_mode_takes_a_grid_of_one_rank(one_rank):
    for mode in MODES:
        assert Parallelism(one_rank, mode).stream().cut == ()


def test_unknown_mode_is_refused_with_the_known_ones(one_rank):
    with pytest.raises(GridError, match=r"tensor='4d': use one of 'none', '1d', '2d', '2.5d', '3d'"):
        Parallelism(one_rank, "4d")


@pytest.mark.grids({"row": 2, "col": 2})
def test_axis_that_the_mode_does_not_use_is_refused(grid):
    axes = "'1d' uses the axes data, seq, ulysses, col and"
    with pytest.raises(GridError, match=rf"{axes} not row of Grid\(row=2, col=2\): use tensor='2d' or '2.5d' or '3d'"):
        Parallelism(grid, "1d")


@pytest.mark.grids({"planes": 2})
def test_axis_of_no_mode_is_refused(grid):
    with pytest.raises(GridError, match="not planes"):
        Parallelism(grid, "3d")


@pytest.mark.grids({"seq": 2}, {"seq": 2, "col": 2})
def test_a_product_without_a_letter_that_an_axis_cuts_is_refused(grid):
    p = Parallelism(grid, "1d")
    with pytest.raises(GridError, match=r"'bh,hv->bv' lacks the letter 's', which axis seq=2 cuts with tensor='1d'"):
        Linear("bh,hv->bv", {"h": 6, "v": 5}, "v", p, "classes")
    with pytest.raises(GridError, match="pass replicate='s' to do the same product on all ranks along seq"):
        p.product("bh,he->be", None)
    product = p.product("bh,hv->bv", "v", replicate="s")
    assert dict(product.axes) == {axis: "v" for axis in grid.axes if axis == "col"}


@pytest.mark.grids({"data": 2, "row": 2})
def test_the_letters_of_a_replicated_product_are_named_one_by_one(grid):
    p = Parallelism(grid, "2d")
    with pytest.raises(GridError, match="lacks the letter 'b', which axis data=2 cuts .* pass replicate='sb'"):
        p.product("h,hv->v", "v", replicate="s")
    assert not p.product("h,hv->v", "v", replicate="bs").axes
    with pytest.raises(OptionError, match="replicate='s': it has the letters s; replicate names letters"):
        p.product("bsh,hf->bsf", "f", replicate="s")


def test_registries_take_new_names_and_the_same_mode_again(monkeypatch):
    monkeypatch.setattr("colossal_mpi.layers.parallelism.MODES", dict(MODES))
    monkeypatch.setattr("colossal_mpi.layers.parallelism.SEQUENCE_MODES", dict(SEQUENCE_MODES))
    mode = Mode("columns", MODES["1d"].template, ("col",), "Cut columns.")
    assert register_mode(register_mode(mode)) is mode
    with pytest.raises(OptionError, match="tensor mode '1d' is registered already: choose another name than none, 1d"):
        register_mode(Mode("1d", MODES["2d"].template, ("col",), "Cut columns."))
    with pytest.raises(OptionError, match="tensor mode 'own': every mode has the axes data, pipe: leave them out"):
        register_mode(Mode("own", MODES["1d"].template, ("data", "col", "pipe"), "Cut columns."))
    with pytest.raises(OptionError, match="sequence mode 'half': .* each of the axes seq, ulysses once"):
        register_sequence_mode(SequenceMode("half", ("seq",), (), "Cut half."))


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (
            {"stream": {"b": "row"}},
            r"template.stream\['b'\]='row' must be a tuple of names of axes, such as \('col',\)",
        ),
        ({"stored": "col"}, "template.stored='col' must be a tuple"),
        ({"inside": {"f": ("col",)}}, "template.inside has the letter 'f': use 'b', 's', 'inner'"),
        ({"stream": {"b": ("col",), "h": ("col",)}}, "template.stream cuts by col twice: an axis cuts one letter"),
        ({"up": {"col": "x"}}, "template.up has the letter 'x': use 'b', 's', 'h', 'inner'"),
        ({"down": {"col": "f"}}, "template.down has the letter 'f': use 'b', 's', 'h', 'inner'"),
    ],
    ids=["string", "stored", "letter", "twice", "up", "down"],
)
def test_a_template_that_is_none_is_refused(part, message):
    template = replace(MODES["1d"].template, **part)
    with pytest.raises(OptionError, match="tensor mode 'own': " + message):
        register_mode(Mode("own", template, ("col",), "Cut columns."))
    with pytest.raises(OptionError, match="tensor mode 'own': its template says nothing of the axis plane"):
        register_mode(Mode("own", MODES["1d"].template, ("col", "plane"), "Cut columns."))
    assert "own" not in MODES


def test_modes_describe_themselves():
    for mode in (*MODES.values(), *SEQUENCE_MODES.values()):
        assert mode.description.endswith(".")
        assert mode.paper or mode.name == "none"


@pytest.mark.grids({"row": 2, "col": 3})
def test_a_weight_is_stored_cut_evenly_where_it_can_be(grid):
    p = Parallelism(grid, "2d")
    assert p.store(Layout(None, "col"), (8, 9)) == Layout("row", "col")
    assert p.store(Layout(None, "col"), (7, 12)) == Layout(None, ("col", "row"))
    assert p.store(Layout(None, "col"), (7, 9)) == Layout("row", "col")  # neither divides: the larger blocks
    assert p.store(Layout("col"), (7,)) == Layout("col")


@pytest.mark.grids({"seq": 2, "ulysses": 2, "col": 2})
def test_heads_are_cut_by_the_axes_that_are_no_ring(grid):
    """With 4 groups ulysses cuts the groups, too; with 2 groups, which col cuts already, it cuts the heads in them."""
    ring, heads = Parallelism(grid, "1d"), Parallelism(grid, "1d", sequence="ulysses")
    assert ring.attention("bstad", "a", "a") == Layout(None, "seq", None, ("col", "ulysses"), None)
    assert heads.attention("bstad", "a", "a") == Layout(None, None, None, ("col", "seq", "ulysses"), None)
    assert [ring.spread({"g": g, "r": 2}, "g") for g in (4, 2)] == ["g", "r"]
    assert ring.spread({"g": 2, "r": 4}, "r") == "g"
    assert ring.attention("bsgrd", "g", "r") == Layout(None, "seq", "col", "ulysses", None)
    assert ring.attention("bstgd", "g", "r") == Layout(None, "seq", None, "col", None)


def test_heads_that_do_not_divide_are_refused(one_rank):
    with pytest.raises(ShapeError, match=r"3 heads do not divide hidden=8: use heads in \{1, 2, 4, 8\}"):
        SelfAttention(8, 3, Parallelism(one_rank), "attention")


def test_weights_say_how_many_of_their_dims_are_inputs(one_rank):
    layer = SelfAttention(12, 3, Parallelism(one_rank), "attention")
    assert {q.name: q.inputs for q in layer.parameters() if q.name.endswith("weight")} == {
        "attention.qkv.weight": 1,
        "attention.out.weight": 2,
    }


@pytest.fixture
def one_rank():
    from mpi4py import MPI

    from colossal_mpi import Grid

    return Grid(MPI.COMM_SELF)


@pytest.mark.grids({"row": 2})
def test_letters_that_a_template_leaves_out_are_whole(grid, monkeypatch):
    monkeypatch.setattr("colossal_mpi.layers.parallelism.MODES", dict(MODES))
    rows = {"row": "b"}
    register_mode(Mode("rows", Template({"b": ("row",)}, {"b": ("row",)}, rows, rows, ()), ("row",), "Cut samples."))
    p = Parallelism(grid, "rows")
    assert (p.stream(), p.inside("bsf", "f")) == (Layout("row", None, None),) * 2
    assert p.inner({"a": 1, "g": 2}) == p.spread({"a": 1, "g": 2}, "a") == "a"
    assert p.experts().stream("ph") == Layout("row", None)
