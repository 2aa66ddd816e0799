"""Benchmarks: each prints one table, with its peer's figure and the share of the limit beside ours. See bench/README.md."""
