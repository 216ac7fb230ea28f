"""Loops of the compiled kernels, and what numba needs for them: each file here imports numba, so each is imported late.

Dependencies go one way: pointers, dtypes, then a file for each kind of kernel.
"""
