"""Benchmarks. Each prints a table with a peer's figure and the share of the physical limit. See bench/README.md."""
