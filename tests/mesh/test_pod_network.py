"""The network of tests and benchmarks in which a pod can be cut from its peers: what is cut and what is not."""

import subprocess
import sys

import pytest

from tests.support.pod_network import may_make_namespaces

_PROGRAM = """
import subprocess, sys
from tests.support.pod_network import HUB, pod_network

def reaches(network, number, host):
    ask = f"import socket; socket.create_connection(({host!r}, 9), 0.5)"
    ended = subprocess.run([*network.within(number), sys.executable, "-c", ask], capture_output=True, text=True)
    return "refused" in ended.stderr

with pod_network(3) as network:
    pairs = ((1, network.host(0)), (0, network.host(1)), (0, network.host(2)), (1, HUB))
    print([reaches(network, *pair) for pair in pairs])
    network.cut(1)
    print([reaches(network, *pair) for pair in pairs])
    network.mend(1)
    print([reaches(network, *pair) for pair in pairs])
"""


@pytest.mark.skipif(not may_make_namespaces(), reason="network namespaces cannot be made here")
def test_pod_network_cuts_a_pod_from_its_peers_only() -> None:
    command = ["unshare", "-rn", sys.executable, "-c", _PROGRAM]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0, ended.stderr
    before, during, after = ended.stdout.splitlines()
    assert before == after == "[True, True, True, True]"
    assert during == "[False, False, True, True]"
