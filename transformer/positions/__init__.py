"""Position schemes, for the `position=` of an attention module or for the input of a model."""

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
