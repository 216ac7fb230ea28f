"""Position schemes: passed to an attention module as `position=`, or added to a model's input."""

from .absolute import LearnedPositions, SinusoidalPositions
from .alibi import ALiBi
from .longrope import LongRoPEScaling
from .relative import RelativePositionBias
from .rotary import RotaryEmbedding
from .scaling import DynamicNTKScaling, LinearScaling, Llama3Scaling, RotaryScaling
from .scheme import AbsolutePositions, Positions, RotaryTable, Rotation, ScoreBias, TokenPositions
from .yarn import YaRNScaling

__all__ = [
    "ALiBi",
    "AbsolutePositions",
    "DynamicNTKScaling",
    "LearnedPositions",
    "LinearScaling",
    "Llama3Scaling",
    "LongRoPEScaling",
    "Positions",
    "RelativePositionBias",
    "RotaryEmbedding",
    "RotaryScaling",
    "RotaryTable",
    "Rotation",
    "ScoreBias",
    "SinusoidalPositions",
    "TokenPositions",
    "YaRNScaling",
]
