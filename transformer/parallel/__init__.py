"""Models over several processes: the plan of tensor parallelism."""

from .plan import tensor_plan

__all__ = ["tensor_plan"]
