"""The serving runtime of one machine: pulls, packs, loads and runs language models; knows nothing of etcd or of other pods."""
