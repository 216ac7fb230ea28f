"""Models over several processes: tensor parallelism, and its plan."""

from .parallelize import parallelize
from .plan import tensor_plan

__all__ = ["parallelize", "tensor_plan"]
