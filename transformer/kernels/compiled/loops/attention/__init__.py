"""Loops of attention of a few queries: blocks of keys in registers, written as vectors of LLVM.

Dependencies go one way: vectors, then products, records, rows and weights, places, values, blocks, chunks.
"""
