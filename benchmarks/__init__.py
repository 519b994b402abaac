"""Benchmarks of the package, see docs/benchmarks.md."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a process that has used two OpenMP threads cannot be forked safely
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # gloo warns about host names at every connection
