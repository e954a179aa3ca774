"""Measurements of the ops, what their kernels compile to, and what GPUs have shown of them (docs/benchmarks.md).

A part imports nothing of a part below it, and a module nothing that imports it; tests/test_benchmarks_parts.py reads this map:

    shared        families record built
    measuring     clock case memory harness bench_* suite dispatch recipes recipe_rows quote __main__
    machine code  machine_code aot_triton aot_cuda triton_* aot tune
    GPU evidence  processes pytest_record prove sanitize carry primitives planted_faults gpu_take gpu_steps gpu_run
"""

from pathlib import Path

#: The checkout.
ROOT = Path(__file__).resolve().parents[1]
