"""Tools for whole models: pure functions over linen variables and NNX modules alike."""

from jbn.tools._convert.equinox import from_equinox as from_equinox
from jbn.tools._convert.equinox import to_equinox as to_equinox
from jbn.tools._convert.haiku import from_haiku as from_haiku
from jbn.tools._convert.haiku import to_haiku as to_haiku
from jbn.tools._convert.keras import from_keras as from_keras
from jbn.tools._convert.keras import to_keras as to_keras
from jbn.tools._convert.settings import settings_from as settings_from
from jbn.tools._convert.settings import settings_to as settings_to
from jbn.tools._convert.torch import from_torch as from_torch
from jbn.tools._convert.torch import to_torch as to_torch
from jbn.tools._convert.torch_model import from_torch_state_dict as from_torch_state_dict
from jbn.tools._convert.torch_model import torch_state_dict as torch_state_dict
from jbn.tools._fold.arrays import fold as fold
from jbn.tools._fold.model import fold_variables as fold_variables
from jbn.tools._optax import freeze as freeze
from jbn.tools._optax import weight_decay_mask as weight_decay_mask
from jbn.tools._report.channels import LayerReport as LayerReport
from jbn.tools._report.plot import plot as plot
from jbn.tools._report.report import report as report
from jbn.tools._report.table import Report as Report
from jbn.tools._statistics.accumulate import apply_moments as apply_moments
from jbn.tools._statistics.average import ema as ema
from jbn.tools._statistics.average import merge_replicas as merge_replicas
from jbn.tools._statistics.debias import debias as debias
from jbn.tools._statistics.recalibrate import recalibrate as recalibrate

__all__ = [
    "LayerReport",
    "Report",
    "apply_moments",
    "debias",
    "ema",
    "fold",
    "fold_variables",
    "freeze",
    "from_equinox",
    "from_haiku",
    "from_keras",
    "from_torch",
    "from_torch_state_dict",
    "merge_replicas",
    "plot",
    "recalibrate",
    "report",
    "settings_from",
    "settings_to",
    "to_equinox",
    "to_haiku",
    "to_keras",
    "to_torch",
    "torch_state_dict",
    "weight_decay_mask",
]
