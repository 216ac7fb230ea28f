"""Kernels: attention, projections and norms as functions of tensors, each with several backends and one choice.

`with backend("reference"):` computes attention with one `Backend`; `tuned(...)` replaces thresholds of the choice.
"""

from .backends import Backend, backend
from .biases import HALF_DTYPES, HIDDEN, as_bias, given_bias, is_fully_masked, scores_dtype
from .cpu_linear import plain_linear_weight, project, project_together
from .dispatch import Kernel
from .inputs import Sinks
from .norms import layer_norm, rms_norm
from .tuning import Tuning, tuned
from .warming import warm_up

__all__ = [
    "HALF_DTYPES",
    "HIDDEN",
    "Backend",
    "Kernel",
    "Sinks",
    "Tuning",
    "as_bias",
    "backend",
    "given_bias",
    "is_fully_masked",
    "layer_norm",
    "plain_linear_weight",
    "project",
    "project_together",
    "rms_norm",
    "scores_dtype",
    "tuned",
    "warm_up",
]
