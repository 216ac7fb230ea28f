"""Models over several processes: tensor parallelism, and its plan."""

from .parts import own_part
from .plan import tensor_plan
from .tensor_parallel import parallelize

__all__ = ["own_part", "parallelize", "tensor_plan"]
