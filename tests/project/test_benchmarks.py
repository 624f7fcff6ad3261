"""The benchmarks: all contestants compute the same, passes are counted right, and the command runs."""

import functools
import itertools
import pathlib
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jbn
from benchmarks import accuracy, contestants, hlo, memory, network, passes, peaks, tables, timing, variances
from benchmarks.__main__ import RESULTS, main
from benchmarks.contestants import LAYERS
from tests.support.cases import loosely

PROGRAM = """\
HloModule tiny, entry_computation_layout={(f32[4,8]{1,0})->f32[4,8]{1,0}}

%sums (p.0: f32[4,8]) -> f32[8] {
  %p.0 = f32[4,8]{1,0} parameter(0)
  %zero = f32[] constant(0)
  ROOT %r = f32[8]{0} reduce(%p.0, %zero), dimensions={0}, to_apply=%add
}

%first_row (p.1: f32[4,8], p.2: f32[8]) -> f32[8] {
  %p.1 = f32[4,8]{1,0} parameter(0)
  %p.2 = f32[8]{0} parameter(1)
  %cut = f32[1,8]{1,0} slice(%p.1), slice={[0:1], [0:8]}
  %row = f32[8]{0} bitcast(%cut)
  ROOT %s = f32[8]{0} add(%row, %p.2)
}

ENTRY %main (x: f32[4,8]) -> (f32[4,8], f32[8]) {
  %x = f32[4,8]{1,0} parameter(0)
  %sum = f32[8]{0} fusion(%x), kind=kInput, calls=%sums
  %all = f32[8]{0} all-reduce(%sum), replica_groups={}, to_apply=%add
  %row.1 = f32[8]{0} fusion(%x, %all), kind=kLoop, calls=%first_row
  %conv = f32[4,8]{1,0} custom-call(%x, %x), custom_call_target="library"
  ROOT %t = (f32[4,8]{1,0}, f32[8]{0}) tuple(%conv, %row.1)
}
"""
WHOLE, ROW = 4 * 8 * 4, 8 * 4  # bytes


def test_passes_are_counted():
    fusions = (WHOLE + ROW) + (ROW + ROW) + 3 * ROW  # of x, the last one reads a row
    assert hlo.moved(PROGRAM, library=False) == fusions
    assert hlo.moved(PROGRAM) == fusions + 3 * WHOLE
    assert hlo.collectives(PROGRAM) == [("all-reduce", ROW)]


def test_the_cheapest_branch_of_a_conditional_is_counted():
    program = """\
%dear (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %q = f32[8]{0} negate(%p)
  ROOT %r = f32[8]{0} negate(%q)
}

%cheap (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %r = f32[8]{0} negate(%p)
}

ENTRY %main (c: pred[], x: f32[8]) -> f32[8] {
  %c = pred[] parameter(0)
  %x = f32[8]{0} parameter(1)
  ROOT %y = f32[8]{0} conditional(%c, %x, %x), true_computation=%dear, false_computation=%cheap
}
"""
    assert hlo.moved(program) == 2 * ROW


def test_a_layer_that_moves_more_than_its_limit_ends_with_the_numbers(monkeypatch, capsys):
    """Without the compiler for an H100, which `.ci/run passes` installs."""
    found = {name: list(limits) for name, limits in passes.LIMITS.items()}
    monkeypatch.setattr(passes.targets, "missing", lambda target: None)
    monkeypatch.setattr(passes, "apart", lambda *_: found)
    with pytest.raises(SystemExit) as end:
        passes.main()
    assert end.value.code is None
    row = "| training | 3.10 of 3.1 | 8.10 of 8.1 | 3.10 of 3.1 | 8.10 of 8.1 |"
    assert row in capsys.readouterr().out.splitlines()
    found["training"][1] = 9.01
    with pytest.raises(SystemExit) as end:
        passes.main()
    assert end.value.code == (
        "training, bfloat16, forward + backward: 9.01 passes, and at most 8.1 are allowed"
    )


def test_contestants_compute_the_same():
    random = np.random.default_rng(0)
    x, dy = (random.standard_normal((16, 4, 4, 8)).astype(np.float32) for _ in range(2))
    with loosely():
        outcomes = accuracy.outcomes(x, dy)
    assert {"jbn", "Flax", "Flax safe", "NNX"} <= set(outcomes)
    for found in outcomes.values():
        for value, exact in zip(found, accuracy.reference(x, dy), strict=True):
            np.testing.assert_allclose(value, exact, atol=1e-5)


# Of the published networks, less the bias of the dense layer, of 1000.
PARAMETERS = {"ResNet50": 25_556_032, "MobileNetV2": 3_503_872, "DenseNet121": 7_977_856}


def affine_alone(setting):
    """A layer that is quickly traced: scale, bias and statistics, and no batch norm."""
    params, state = jbn.init(setting.shape[-1])

    def apply(params, state, x, residual=None, relu=False, mask=None):
        y = (x * params["scale"] + params["bias"]).astype(x.dtype)
        return y if residual is None else y + residual, jax.tree.map(lambda leaf: leaf + 1, state)

    return contestants.Layer(params, state, apply)


@pytest.mark.parametrize("name", memory.NETWORKS)
def test_networks_are_the_published_ones_and_regions_return_the_statistics(name):
    layer = contestants.Contestant("affine alone", "jbn", affine_alone)
    with loosely():
        for kind in ("block", "stage", "whole"):
            made = getattr(network, name)(layer, jnp.float32, around={kind: jax.checkpoint})
            size = sum(leaf.size for leaf in jax.tree.leaves(made.params))
            assert size == PARAMETERS.get(name, size)
            variables = made.params, made.state
            program, (*new, _) = jax.make_jaxpr(made.step, return_shape=True)(*variables, *made.inputs)
            assert any(one.primitive.name == "remat2" for one in program.jaxpr.eqns)
            chex.assert_trees_all_equal_shapes_and_dtypes(tuple(new), variables)


def test_the_command_runs(monkeypatch, capsys):
    """For one contestant: that the others compute the same is tested above, and each takes its time here."""
    monkeypatch.chdir(pathlib.Path(__file__).parents[2])  # each table is made by a process of its own
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv(LAYERS, "[]")  # which the command sets
    monkeypatch.setattr(sys, "argv", ["benchmarks", "accuracy", "gpu", "--quick", "--layers", "jbn"])
    main()
    out = capsys.readouterr().out
    assert "\n| jbn | " in out
    assert "\n| Flax" not in out
    assert "Not measured: JAX finds no GPU on this machine" in out


@pytest.mark.usefixtures("standard_promotion")
def test_the_picture_shows_what_the_readme_says(tmp_path):
    """At an offset of 1 Flax is right on one device, and on many its mean of the means is not."""
    found = variances.errors([1.0, 1e4])
    alone, cut = np.array(list(found["Flax's default"]))
    assert alone[0] < 1e-6 < 1 < alone[1]
    assert cut[0] > 0.1
    assert 0 < np.max(found["jbn"]) < 1e-6
    variances.draw([1.0, 1e4], found, tmp_path / "variances.png")
    assert (tmp_path / "variances.png").read_bytes().startswith(b"\x89PNG")


def test_the_peaks_are_drawn_from_the_results(tmp_path):
    found = peaks.peaks(RESULTS.read_text(encoding="utf-8"))
    assert set(found) == set(memory.NETWORKS)
    for of_network in found.values():
        again = [gb for (layer, _), gb in of_network.items() if layer == memory.JBN and gb is not None]
        assert min(again) < of_network[memory.JBN, memory.NOTHING]
    peaks.draw(found, tmp_path / "peaks.png")
    assert (tmp_path / "peaks.png").read_bytes().startswith(b"\x89PNG")


def test_a_table_is_markdown():
    assert tables.grid(["a", "b"], [["x", 0.5], [None, 1e-7]]) == (
        "| a | b |\n| --- | --- |\n| x | 0.50 |\n| - | 1.0e-07 |"
    )


def test_one_section_is_replaced_and_the_others_stay():
    document = "# Results\n\n## cpu\n\nold\n\n## gpu\n\nkept\n"
    expected = "# Results\n\n## traffic\n\nfirst\n\n## cpu\n\nnew\n\n## gpu\n\nkept\n"
    for name, text in (("cpu", "## cpu\n\nnew"), ("traffic", "## traffic\n\nfirst\n")):
        document = tables.replaced(document, name, text, ["traffic", "cpu", "gpu"])
    assert document == expected


def test_a_ratio_is_that_of_the_medians():
    assert timing.ratio({"a": [1.0, 2.0, 9.0], "b": [2.0, 4.0, 4.0]}, "a", "b")[0] == 0.5


def test_every_round_runs_each_once_and_none_always_behind_the_same():
    ran = []
    names = "abcd"
    times = timing.interleaved({name: functools.partial(ran.append, name) for name in names}, 20, before=1)
    assert all(len(seconds) == 20 for seconds in times.values())
    assert all(sorted(ran[i : i + 4]) == list(names) for i in range(0, len(ran), 4))
    before = {ahead for ahead, name in itertools.pairwise(ran) if name == "a"}
    assert before >= set("bcd")
