"""Models over several processes: tensor parallelism, and its plan."""

from .parallelize import parallelize
from .parts import own_part
from .plan import tensor_plan

__all__ = ["own_part", "parallelize", "tensor_plan"]
