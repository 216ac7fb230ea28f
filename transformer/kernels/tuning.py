"""Thresholds of the kernels: from which size on one way is faster than another, where that was measured, and when.

The figures come from machines of two cores: *EPYC*, an AMD EPYC with AVX-512, up to 2026-11-27 without 16-bit products
and on 2026-11-28 one with those of bfloat16, where nothing else is said; and *Xeon*, an Intel Xeon with AMX. They hold
for two threads where a field does not say one. A date is that of the change that set the number. Each field names the
benchmark with calls that it decides. `docs/performance.md` has the figures in full. On another machine measure first,
then replace numbers for the process: `tuned(min_matmul_keys=4096)`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from ..errors import require_count
from . import private_operators


@dataclass(frozen=True)
class Tuning:
    """All thresholds. Each says what it limits, in which unit, where the number comes from, and how to measure it."""

    max_matmul_rows: int = 64
    """Query rows per key/value head up to which matrix products are faster than SDPA on the CPU. EPYC, 2026-11-22;
    the figures of that day were not kept. `python -m benchmarks chunks`."""

    min_matmul_keys: int = 1024
    """Keys from which on the same holds in float32 and float64; over fewer SDPA has less overhead. EPYC, 2026-11-22;
    the figures of that day were not kept. `python -m benchmarks decode_step`."""

    min_half_matmul_keys: int = 1024
    """Keys of all key/value heads together from which on the same holds in 16 bits, on processors without 16-bit
    products. EPYC, 2026-11-25: 3 times at 2,048 keys of 16 heads, 1.5 times at 128. Where the processor has such
    products SDPA is 3 to 6 times as fast (Xeon). `python -m benchmarks decode_step`."""

    tile_bytes: int = 9 << 20
    """Bytes of scores, or of upcast keys, formed at once: larger ones are new pages in every call, half of a step.
    EPYC, 2026-11-25, 8 rows of 65,536 tokens over 4 key/value heads: 61 instead of 127 ms. `python -m benchmarks
    decode_step`."""

    upcast_keys: int = 2048
    """Keys upcast at once: 16 heads of head_dim 64 then take `tile_bytes`. EPYC, 2026-11-25: 652 instead of 1,957
    microseconds for 16 heads of 2,048 bfloat16 keys. `python -m benchmarks decode_step`."""

    min_onednn_keys: int = 20_000
    """Keys from which on oneDNN sums the values of one head with all threads. EPYC, 2026-11-25: 1.1 to 1.6 times as
    fast for a few query rows; one row is limited by memory either way. `python -m benchmarks decode_step`."""

    min_split_threads: int = 2
    """Threads from which on keys are split: only a thread that has no head of its own gains by it. EPYC, 2026-11-27,
    one thread of a busy machine, in turns: split keys take 108 microseconds, SDPA 67 (one row over 4,096 keys of one
    head); 896 and 723 (8 rows over 16,384). `python -m benchmarks decode_step --threads 1`, and 2."""

    split_kv_heads: tuple[int, ...] = (1, 3)
    """Key/value heads of the whole batch that leave one of two threads idle unless keys are split, for two threads.
    EPYC, 2026-11-25, as `split_kv_parts`. With more threads keys are split if that leaves the busiest thread at most
    three quarters of its keys, as for three heads and two threads; not measured. `python -m benchmarks decode_step`."""

    split_kv_parts: int = 4
    """Parts of the keys of such heads, next to each other; with more than four threads too, where it was not measured.
    EPYC, 2026-11-25, two threads: 1.0 instead of 1.15 ms over 16,384 keys. `python -m benchmarks decode_step`."""

    min_split_keys: int = 4096
    """Keys from which on that is faster. EPYC, 2026-11-25: up to 1.5 times at 16,384 keys.
    `python -m benchmarks decode_step`."""

    max_matmul_rows_over_long_keys: int = 16
    """Query rows of such a head up to which matrix products are faster again over `min_onednn_keys` float32 keys. EPYC,
    2026-11-25: 3.4 instead of 3.9 ms. `python -m benchmarks decode_step`."""

    min_shared_head_keys: int = 16_384
    """bfloat16 keys of one head from which on two threads each take half of its query rows. Xeon, 2026-11-27: 569
    instead of 711 microseconds for 8 rows. `python -m benchmarks decode_step`."""

    min_prefix: int = 1024
    """Keys before a chunk from which on causal order is faster than a mask. EPYC, 2026-11-25, 256 tokens over 16,384
    float32 keys, 4 key/value heads: 115 instead of 167 ms; Xeon, 2026-11-27, bfloat16: 62 instead of 92 ms.
    `python -m benchmarks chunks`."""

    half_causal_rows: int = 1024
    """Queries of one SDPA call of a 16-bit chunk: each block reads the keys up to its own end, so that few hidden keys
    are read. Xeon, 2026-11-27; its own figures were not kept. Nearest: `python -m benchmarks chunks`, which has
    no 16-bit chunk of this length."""

    max_sliced_numbers: int = 3072
    """Numbers of all rows together up to which a projection of float32 rows is faster in slices: they stay in the
    core's cache. EPYC, 2026-11-25: 4 rows of 512 are 1.5 times as fast in slices, 4 of 1,024 1.3 times by oneDNN.
    `python -m benchmarks decode_step`."""

    linear_slices: int = 8
    """Slices of the outputs of such a projection, computed next to each other. EPYC, 2026-11-22: one row by 1024 x 1024
    weights from memory takes 84 instead of 272 microseconds. `python -m benchmarks decode_step`."""

    min_linear_weights: int = 1 << 22 if private_operators.MKL_IS_QUICK else 1 << 17
    """Weights from which on a projection has a faster way than `F.linear`: smaller ones stay in the CPU's cache. EPYC,
    2026-11-22. The library behind `F.linear` is quick on the processors of its maker: there 16 rows by 576 x 576 take
    169 microseconds instead of 196, 4 rows by 1,536 x 576 324 instead of 435, 16 by 49,152 x 576 41 instead of 34 ms
    (Intel Xeon without AMX, one thread of a busy machine, 2026-11-28). `python -m benchmarks decode_step`."""

    min_compiled_linear_weights: int = 1 << 15
    """Weights from which on the same holds in a compiled step, whose own linear of one row is slow. EPYC, 2026-11-25: a
    step of 16 to 20 instead of 50 ms. `python -m benchmarks compiled`."""

    max_few_rows: int = 8
    """Rows up to which a compiled kernel multiplies them by weights. EPYC, 2026-11-28, one thread, weights of 576 x 576
    from memory: 8 rows take 124 microseconds in float32 instead of 183, 104 in bfloat16 instead of 119. `python -m
    benchmarks models`."""

    max_emulated_rows: int = 64
    """The same for bfloat16 rows by such weights on a processor with AVX-512 that does not multiply bfloat16 itself.
    Intel Xeon, 2026-11-28, one thread of a busy machine, its own microseconds: 4 rows by 1024 x 1024 take 230 instead
    of 560 by `F.linear`, 16 rows 650 instead of 1,490, 64 rows 1,690 instead of 4,900; 0.33 to 0.69 of its time for 2
    to 64 rows of 576 x 576 to 2048 x 2048. More rows were not measured. `python -m benchmarks shared_prefix`."""

    max_few_rows_int8: int = 64
    """The same for float32 rows by int8 weights. EPYC, 2026-11-28, two threads, 1536 x 576: 16 rows take 271 instead of
    1,273 microseconds by torchao, 64 rows 888 instead of 2,063. `python -m benchmarks models`."""

    max_few_rows_numbers: int = 5120
    """Numbers of several such rows together up to which it does, where PyTorch's own linear is quick: more leave
    a core's first cache. EPYC, 2026-11-28, two threads, bfloat16: 4 rows of 1,024 take 130 instead of 199 microseconds,
    4 rows of 3,072 take 585 instead of 440. `python -m benchmarks released`."""

    min_few_rows_weights: int = 1 << 22 if private_operators.MKL_IS_QUICK else 3 << 14
    """float32 weights from which on it does, of all layers that share the call: fewer are in the CPU's cache. EPYC,
    2026-11-28, one thread, one row, 256 x 256: 9.6 microseconds instead of 6.9; but with AVX2 alone a step of 8 layers
    of 128 takes 6.8 ms instead of 7.3 at 1 << 17, of 8 layers of 256 9.7 instead of 10.9. At 3 << 14 the queries, keys
    and values of 128 dimensions share one: 6.9 instead of 7.8 ms at 1 << 16. Where MKL is quick, two threads, by
    `F.linear` and compiled: one row by 576 x 576 52 and 61 microseconds, by 1,536 x 576 108 and 118, by 49,152 x 576 17
    and 18 ms, 4 rows 43 and 23 (Intel Xeon, as above). `python -m benchmarks host_time`."""

    min_half_few_rows_weights: int = 6 << 10
    """16-bit and int8 weights from which on the same holds. EPYC, 2026-11-28, one thread, one row of bfloat16, 64 x 64:
    6.6 microseconds instead of 4.1; 64 x 100: 6.9 instead of 17.2. `python -m benchmarks models`."""

    min_parallel_bytes: int = 1 << 17
    """Bytes from which on a compiled kernel uses several threads: of weights, of keys and values, of the rows of a
    norm, of the heads that are rotated. EPYC, 2026-11-28, two threads, for weights; its figures were not kept, and the
    others use the same number. `python -m benchmarks models`."""

    max_compiled_query_rows: int = 256
    """Query rows per key/value head up to which the compiled kernel is used. EPYC, 2026-11-28: at this limit it still
    takes 0.5 to 0.8 of the others' time, with one thread and with two. `python -m benchmarks chunks`."""

    max_compiled_query_rows_beside_amx: int = 16
    """The same in bfloat16 where the processor multiplies tiles of numbers (AMX), as SDPA does for many rows. Not yet
    measured with AMX; 2026-11-27 and 28: 8 rows over 16,384 keys of one head took the Xeon 569 microseconds by SDPA, 16
    rows over 8,192 keys one thread of the EPYC 288 by the compiled kernel. `python -m benchmarks chunks`."""

    min_part_keys: int = 256
    """Keys of a part of them at least, in compiled attention: a part costs about as much as 20 keys. EPYC, 2026-11-28;
    smaller parts were not measured. `python -m benchmarks decode_step`."""

    min_cudnn_queries: int = 8192
    """Queries of a prompt on a GPU from which on SDPA may take cuDNN, which compiles for each new length, once for all
    layers. NVIDIA H200, 2026-11-28: 43 to 46 ms, then 0.92 instead of 1.75 ms a layer at 8,184 queries of 32
    heads of 128, 3.3 instead of 6.7 at 16,376, 0.10 instead of 0.20 at 2,040. `python -m benchmarks.gpu prefill`."""

    max_norm_rows: int = 8
    """Rows up to which the norm of one token each is four operations instead of eight, where it is not compiled. EPYC,
    2026-11-25, together with matrices side by side: 22.7 instead of 25.1 ms a token of a 135M model. One row: `python
    -m benchmarks models`."""

    max_upcast_keys: int = 512
    """Keys up to which SDPA that is recorded for gradients, or that takes the rows of a padded batch one by one, takes
    bfloat16 as float32 on a CPU that multiplies bfloat16 itself; other CPUs always do. EPYC with 16-bit products,
    2026-11-28, one thread, forward and backward, as given / as float32: 3 to 4 at 16 to 64 keys, 1.4 at 256, 1.0 at
    512, 0.8 at 1,024; float16, which it lacks, 2 to 8 at all. `python -m benchmarks padded`."""

    max_upcast_head_dim: int = 64
    """head_dim up to which the rows of a padded batch do so without gradients. EPYC with 16-bit products,
    2026-11-28, one thread, one row of 16 to 512 tokens, as given / as float32 with the casts: 1.0 to 1.2 at 32 and 64,
    0.8 to 1.0 at 128; float16 1.9 to 2.8 at all. Not where the processor multiplies tiles (AMX), which was not
    measured. `python -m benchmarks padded`."""

    min_row_tokens: int = 16
    """Real tokens per row of a padded batch, in the mean, from which on attention takes row by row instead of all rows
    with a mask. EPYC, 2026-11-28, one thread, three calls of a module with one plan, all rows / row by row: 0.5 to 1.0
    for 64 rows of 2 to 6 tokens, 0.7 to 1.3 at a mean of 12, 0.9 to 1.1 at 16, 1.2 to 1.5 at 24, 1.3 to 1.5 at 36,
    float32 and bfloat16, widths 64 to 384. `python -m benchmarks ragged`."""

    min_shared_bytes: int = 4 << 20
    """Bytes of keys and values of a layer that `select` saves at least where it lets repeated rows share them instead
    of copying: with fewer the second kernel call takes longer than it saves. Xeon, 2026-11-28, two threads, the best of
    turns on a busy machine, time of a step beside copies: 1.2 to 1.6 below 1 MiB, 0.8 to 1.3 at 2, 0.8 to 1.05 at 4 to
    8, 0.2 at 240. `python -m benchmarks shared_prefix`."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            numbers = value if isinstance(value, tuple) else (value,)
            for number in numbers:
                require_count(name, number, least=0 if name.startswith(("min", "max")) else 1)


DEFAULT = Tuning()

active = DEFAULT
"""The thresholds of this process: they describe the machine, so they are the same in all threads."""


@contextmanager
def tuned(**changes: int | tuple[int, ...]) -> Iterator[Tuning]:
    """Replaces thresholds of the whole process within a `with` block, as benchmarks and tests do; gives the new ones.

    Defaults were measured with one or two threads; one thread splits no keys, and more than two split them by a rule
    that was not measured (`split_kv_heads`). With `torch.set_num_threads` above two, measure before you rely on them.

    Raises TypeError for a name that `Tuning` lacks, and ConfigurationError for anything but whole numbers: from 0 on,
    and from 1 on for parts, slices, blocks and tiles.
    """
    global active
    before = active
    active = replace(before, **changes)  # type: ignore[arg-type]
    try:
        yield active
    finally:
        active = before
