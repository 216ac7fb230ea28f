"""Kernels: attention, projections and norms as functions of tensors, each with several backends and one choice.

`with backend("reference"):` computes attention with one `Backend`; `tuned(...)` replaces thresholds of the choice.
"""

from .attention_state import AttentionState, attention_state, biased_attention_state, serves_parts
from .backends import Backend, backend
from .biases import HALF_DTYPES, HIDDEN, ScoreChange, as_bias, given_bias, is_fully_masked, scores_dtype
from .cpu_linear import multiply_together, plain_linear_weight, project, project_together
from .dispatch import Kernel
from .encoding import encoded
from .few_queries import attend_few
from .inputs import Sinks
from .linear_weights import LinearWeight
from .norms import layer_norm, rms_norm
from .position_inputs import DistanceBias, Positioned, PositionedSinks, Positions
from .positioned import by_positions, by_positions_on_gpu, reads_positions
from .rotation import rotate_in_one_pass
from .sdpa import use_float32
from .split_kv import merge_attention_states
from .tuning import Tuning, tuned
from .warming import warm_up

__all__ = [
    "HALF_DTYPES",
    "HIDDEN",
    "AttentionState",
    "Backend",
    "DistanceBias",
    "Kernel",
    "LinearWeight",
    "Positioned",
    "PositionedSinks",
    "Positions",
    "ScoreChange",
    "Sinks",
    "Tuning",
    "as_bias",
    "attend_few",
    "attention_state",
    "backend",
    "biased_attention_state",
    "by_positions",
    "by_positions_on_gpu",
    "encoded",
    "given_bias",
    "is_fully_masked",
    "layer_norm",
    "merge_attention_states",
    "multiply_together",
    "plain_linear_weight",
    "project",
    "project_together",
    "reads_positions",
    "rms_norm",
    "rotate_in_one_pass",
    "scores_dtype",
    "serves_parts",
    "tuned",
    "use_float32",
    "warm_up",
]
