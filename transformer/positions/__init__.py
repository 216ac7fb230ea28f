"""Position schemes, passed to an attention module as `position=`."""

from .alibi import ALiBi
from .relative import RelativePositionBias
from .rotary import RotaryEmbedding
from .scheme import Positions, RotaryTable, Rotation, ScoreBias

__all__ = [
    "ALiBi",
    "Positions",
    "RelativePositionBias",
    "RotaryEmbedding",
    "RotaryTable",
    "Rotation",
    "ScoreBias",
]
