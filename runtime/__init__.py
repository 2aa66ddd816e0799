"""The serving runtime of one machine: pulls, packs, loads and runs language models."""
