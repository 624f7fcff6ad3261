"""The report as text and as CSV."""

import csv
import io

import numpy as np
import pytest
from rich.console import Console

import jbn
from jbn.tools import report
from jbn.tools._report.channels import LayerReport
from tests.support.report_models import BATCH, HEALTHY, VARIABLES, array, moments_of, variables_of


def test_csv_comes_back_as_the_rows(tmp_path):
    variables = variables_of(old=HEALTHY, bare=(array(0.1), array(1e-30)), broken=(array(np.nan), array(1.0)))
    variables["batch_stats"]["old"]["count"] = np.int32(7)
    found = report(variables, {"old": moments_of(array(0.1, 0.2), HEALTHY[1])})
    text = found.to_csv()
    read = list(csv.DictReader(io.StringIO(text, newline="")))
    kinds = LayerReport.__annotations__
    assert [set(line) for line in read] == [set(kinds)] * 3
    for line, row in zip(read, found.rows, strict=True):
        for name, kind in kinds.items():
            value = getattr(row, name)
            wanted = "" if value is None else str(value) if kind in (str, bool) else value
            got = line[name] if value is None or kind in (str, bool) else float(line[name])
            assert got == wanted or (np.isnan(got) and np.isnan(wanted)), name
    found.to_csv(tmp_path / "a.csv")
    with (tmp_path / "b.csv").open("w", newline="", encoding="utf-8") as file:
        assert found.to_csv(file) == text
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes() == text.encode()


@pytest.mark.parametrize("prefix", ["", "norms/"])
def test_numbers_by_name_for_loggers(prefix):
    found = report(variables_of(a=HEALTHY, b=HEALTHY), {"a": moments_of(array(0.1, 0.2), HEALTHY[1])})
    numbers = found.to_dict(prefix=prefix)
    assert {type(value) for value in numbers.values()} == {float}
    known = [name for name in LayerReport.__annotations__ if name != "path"]
    wanted = {
        f"{prefix}{row.path}/{name}": getattr(row, name)
        for row in found.rows
        for name in known
        if getattr(row, name) is not None
    }
    assert numbers == wanted
    assert f"{prefix}a/drift" in numbers
    assert f"{prefix}b/drift" not in numbers


def test_numbers_of_a_model_that_is_one_batch_norm():
    params, batch_stats = jbn.init(2)
    alone = report({"params": params, "batch_stats": batch_stats})
    assert alone.to_dict()["never_updated"] == 1.0


SMALL = variables_of(
    block=(array(-0.0, -0.0, -0.0), array(1.0, 1.0, 1.0), array(1.0, -0.5, 0.0)),
    last=(array(-12.5, 150.0, 3.0), array(0.001, 4.0, 7e-8)),
)
SMALL["batch_stats"]["last"]["count"] = np.int32(1200)


def test_text_without_moments():
    assert str(report(SMALL)) == (
        "layer  channels  updates      mean      var  |scale|  dead\n"
        "block         3    never      0..0     1..1     0..1     1\n"
        "last          3     1200  -12..150  7e-8..4              0\n"
        "\n"
        "1 of 2 layers was never updated: block. Keep the batch_stats that training returns.\n"
        "\n"
        "1 of 6 channels is dead: the output does not depend on the input."
    )


def test_text_with_moments():
    near = moments_of(array(-12.5, 150.0, 2.9), array(0.001, 4.0, np.inf))
    far = moments_of(array(2.0, 0.5, 1.0), array(1.0, 4.0, 0.25))
    assert repr(report(SMALL, {"last": near, "block": far})) == (
        "layer  channels  updates  drift   mean drift     log2 var  dead  non-finite\n"
        "last          3     1200   0.00  0.00 / 0.00  0.00 / 0.00     0           1\n"
        "block         3    never   1.86  2.00 / 2.00  2.00 / 2.00     1\n"
        "\n"
        "drift: root mean square of y by running less y by batch statistics, in standard deviations of y;\n"
        "mean drift, in standard deviations of the batch, and log2 variance: worst channel / median.\n"
        "\n"
        "layer      mean      var  |scale|\n"
        "last   -12..150  7e-8..4\n"
        "block      0..0     1..1     0..1\n"
        "\n"
        "1 of 2 layers has NaN or inf: last. Go back to statistics that are finite.\n"
        "\n"
        "1 of 2 layers was never updated: block. Keep the batch_stats that training returns.\n"
        "\n"
        "1 of 2 layers differs by more than half a standard deviation between running and batch statistics:\n"
        "evaluation will be worse than training. Run jbn.tools.recalibrate, lower momentum, or check that\n"
        "evaluation data is preprocessed as training data.\n"
        "\n"
        "1 of 6 channels is dead: the output does not depend on the input."
    )


def test_rich_text_colours_the_worst_layers():
    layers = {"[red]far": HEALTHY, "fine": HEALTHY, "new": (array(0.0, 0.0), array(1.0, 1.0))}
    found = report(
        variables_of(**layers), {"[red]far": moments_of(array(9.0, 9.0), HEALTHY[1]), "fine": BATCH}
    )
    lines = {}
    for colours in ("standard", None):
        file = io.StringIO()
        Console(file=file, force_terminal=True, width=100, color_system=colours).print(found)
        lines[colours] = file.getvalue().splitlines()
    told, plain = " ".join(lines[None]).split(), str(found).split()
    assert [word for word in told if "\u2500" not in word] == plain  # a line below the head
    for name, code in (("far", "\x1b[31m"), ("new", "\x1b[33m"), ("fine", None)):
        (first, *_) = [line for line in lines["standard"] if name in line]
        assert code in first if code else "\x1b[3" not in first


def test_no_sentence_where_nothing_is_wrong():
    assert report(VARIABLES, {"bn": BATCH}).notes == ()


def test_many_layers_are_named_in_part():
    new = {f"bn_{i}": (array(0.0), array(1.0)) for i in range(12)}
    assert report(variables_of(**new)).notes == (
        "12 of 12 layers were never updated: bn_0, bn_1, bn_2, bn_3, and 8 more. "
        "Keep the batch_stats that training returns.",
    )


def test_text_fits_into_100_columns():
    long = "/".join(f"block_{i}" for i in range(20))
    wide = array(-1.234e-5, 5.678e-5), array(1.2e-4, 6.5e-4), array(-1.2e-4, 3.4e-4)
    variables = variables_of(bn=wide)
    for name in variables:
        variables[name][long] = variables[name]["bn"]
    for found in (report(variables), report(variables, {"bn": BATCH, long: BATCH})):
        lines = str(found).splitlines()
        assert max(map(len, lines)) <= 100
        table = "\n\n".join(str(found).split("\n\n")[:3])
        assert "".join(line.split(" ")[0] for line in table.splitlines()).count(long) >= 1
