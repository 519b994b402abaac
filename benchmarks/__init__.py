"""Benchmarks of the package, see docs/benchmarks.md."""
