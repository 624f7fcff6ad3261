"""Tools for the life of a model: pure functions over variables, of linen and of NNX alike."""

from jbn.tools._accumulate import apply_moments as apply_moments
from jbn.tools._average import ema as ema
from jbn.tools._average import merge_replicas as merge_replicas
from jbn.tools._debias import debias as debias
from jbn.tools._drift import LayerReport as LayerReport
from jbn.tools._equinox import from_equinox as from_equinox
from jbn.tools._equinox import to_equinox as to_equinox
from jbn.tools._fold import fold as fold
from jbn.tools._fold_variables import fold_variables as fold_variables
from jbn.tools._haiku import from_haiku as from_haiku
from jbn.tools._haiku import to_haiku as to_haiku
from jbn.tools._keras import from_keras as from_keras
from jbn.tools._keras import to_keras as to_keras
from jbn.tools._masks import freeze as freeze
from jbn.tools._masks import weight_decay_mask as weight_decay_mask
from jbn.tools._plot import plot as plot
from jbn.tools._recalibrate import recalibrate as recalibrate
from jbn.tools._report import report as report
from jbn.tools._settings import settings_from as settings_from
from jbn.tools._settings import settings_to as settings_to
from jbn.tools._table import Report as Report
from jbn.tools._torch import from_torch as from_torch
from jbn.tools._torch import to_torch as to_torch
from jbn.tools._torch_model import from_torch_state_dict as from_torch_state_dict
from jbn.tools._torch_model import torch_state_dict as torch_state_dict

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
