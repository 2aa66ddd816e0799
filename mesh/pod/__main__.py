"""Runs a pod from a file of merged settings, which `serve-mesh --envoy` writes: `python -m mesh.pod FILE`."""

import sys
from pathlib import Path

import msgspec

from mesh.config.schema import MeshConfig
from mesh.pod.process import run_pod

if __name__ == "__main__":
    sys.exit(run_pod(msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=MeshConfig)))
