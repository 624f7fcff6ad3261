"""Wrong calls of report and plot, and the whole text of each error."""

import sys
import unittest.mock

import jax
import jax.numpy as jnp
from flax import nnx

from jbn.tools import plot, report
from tests.support.report_models import BATCH, HEALTHY, VARIABLES, NNXNet, array, moments_of, variables_of

FORMS = "Expected a mapping from path to jbn.Moments, or variables or an NNX module with batch_moments. "
TRAIN = (
    "Run the model in training mode: linen with mutable=['batch_stats', 'batch_moments'], NNX after "
    "jbn.nnx.keep_batch_moments(model)."
)
UNREADABLE = (
    "Expected an array of numbers that can be read. "
    "Call it outside of jit, grad and scan, and not on what eval_shape returns."
)
PICTURE = "Expected the path of a picture that matplotlib can write. For example 'drift.png'."


def plot_without_matplotlib():
    with unittest.mock.patch.dict(sys.modules, {"matplotlib.figure": None}):
        plot(VARIABLES)


TEXTS = {
    "no variables": (
        lambda: report([VARIABLES]),
        f"jbn.tools.report: variables is {' '.join(repr([VARIABLES]).split())[:157]}.... Expected linen "
        "variables or an NNX module. For a linen model pass {'params': params, 'batch_stats': batch_stats}.",
    ),
    "no batch norm": (
        lambda: report({"params": {}}),
        "jbn.tools.report: variables is a model without arrays. Expected one with a batch norm: "
        "a mean and a var in batch_stats. Pass all variables of the model, {'params': params, 'batch_stats': "
        "batch_stats}.",
    ),
    "epsilon below 0": (
        lambda: report(VARIABLES, epsilon=-1.0),
        "jbn.tools.report: epsilon is -1.0. Expected a static number from 0 up. The usual one is 1e-5.",
    ),
    "traced": (
        lambda: jax.jit(lambda variables: report(variables).rows[0].dead)(VARIABLES),
        f"jbn.tools.report: mean of 'bn' is traced float32[2]. {UNREADABLE}",
    ),
    "abstract": (
        lambda: report(jax.eval_shape(lambda: jax.tree.map(jnp.asarray, VARIABLES))),
        f"jbn.tools.report: mean of 'bn' is float32[2]. {UNREADABLE}",
    ),
    "keys for numbers": (
        lambda: report(variables_of(bn=(*HEALTHY[:2], jax.random.key(0)))),
        f"jbn.tools.report: scale of 'bn' is key<fry>[]. {UNREADABLE}",
    ),
    "shapes": (
        lambda: report(VARIABLES, {"bn": moments_of(array(1.0), array(1.0))}),
        "jbn.tools.report: batch count of 'bn' is of shape (1,). Expected (2,), or the last axes of it, as "
        "for the others. Take moments and variables from the same model.",
    ),
    "shapes of a model that is one batch norm": (
        lambda: report({"batch_stats": VARIABLES["batch_stats"]["bn"]}, {"": moments_of(*(array(1.0),) * 2)}),
        "jbn.tools.report: batch count is of shape (1,). Expected (2,), or the last axes of it, as for the "
        "others. Take moments and variables from the same model.",
    ),
    "statistics of another model": (
        lambda: report(VARIABLES, variables_of(other=HEALTHY)),
        "jbn.tools.report: moments is one with other. Expected paths of batch norms: bn. Take moments and "
        "variables from the same model.",
    ),
    "unknown path": (
        lambda: report(VARIABLES, {"bn_1": BATCH, ("bn",): BATCH}),
        "jbn.tools.report: moments is one with bn_1. Expected paths of batch norms: bn. Take moments and "
        "variables from the same model.",
    ),
    "variables without moments": (
        lambda: report(VARIABLES, {"params": {}}),
        f"jbn.tools.report: moments is a mapping without jbn.Moments at params. {FORMS}{TRAIN}",
    ),
    "empty moments": (
        lambda: report(VARIABLES, {}),
        f"jbn.tools.report: moments is a mapping with nothing. {FORMS}{TRAIN}",
    ),
    "NNX without moments": (
        lambda: report(NNXNet(), nnx.Linear(2, 2, rngs=nnx.Rngs(0))),
        f"jbn.tools.report: moments is a Linear without batch_moments. {FORMS}{TRAIN}",
    ),
    "moments of one layer": (
        lambda: report(VARIABLES, BATCH),
        f"jbn.tools.report: moments is a Moments without batch_moments. {FORMS}{TRAIN}",
    ),
    "a number as a file": (
        lambda: report(VARIABLES).to_csv(3),
        "jbn.tools.Report.to_csv: file is 3. Expected a path or an open text file. For example 'report.csv'.",
    ),
    "a prefix that is no text": (
        lambda: report(VARIABLES).to_dict(("norms",)),
        "jbn.tools.Report.to_dict: prefix is ('norms',). Expected a text. For example 'batch_norm/'.",
    ),
    "an unknown kind of picture": (
        lambda: plot(VARIABLES, path="drift.foo"),
        f"jbn.tools.plot: path is 'drift.foo'. {PICTURE}",
    ),
    "a number as a path": (
        lambda: plot(VARIABLES, path=3),
        f"jbn.tools.plot: path is 3. {PICTURE}",
    ),
    "moments beside a report": (
        lambda: plot(report(VARIABLES), {"bn": BATCH}),
        "jbn.tools.plot: moments is given beside a report. Expected None, for a report has its own. Pass the "
        "variables, or make the report with the moments.",
    ),
    "a picture without matplotlib": (
        plot_without_matplotlib,
        "jbn.tools.plot: matplotlib is not installed. Expected it for a picture. "
        "Install it: pip install 'jbn[examples]', or pip install matplotlib.",
    ),
}
