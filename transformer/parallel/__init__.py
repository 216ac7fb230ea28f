"""Models over several processes: tensor parallelism with its plan, and sequences that ranks share."""

from .parts import own_part
from .plan import tensor_plan
from .sequence import gather_parts, parts_of, share_sequence
from .tensor_parallel import parallelize

__all__ = ["gather_parts", "own_part", "parallelize", "parts_of", "share_sequence", "tensor_plan"]
