"""Models over several processes: tensor parallelism with its plan, sequences that ranks share, stages of a pipeline."""

from .parts import own_part
from .pipeline import DecoderStage, pipeline_stages
from .plan import tensor_plan
from .sequence import gather_parts, parts_of, share_sequence
from .tensor_parallel import parallelize

__all__ = [
    "DecoderStage",
    "gather_parts",
    "own_part",
    "parallelize",
    "parts_of",
    "pipeline_stages",
    "share_sequence",
    "tensor_plan",
]
