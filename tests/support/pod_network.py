"""Gives each pod a network namespace and an address of its own, so that pods can be cut from each other. The process must run in `unshare -rn`."""

import contextlib
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HUB = "10.9.0.254"  # this process, which all pods reach always
_NOBODY = "02:00:00:00:00:01"  # a link-layer address that no interface has


def may_make_namespaces() -> bool:
    if not all(shutil.which(tool) for tool in ("unshare", "nsenter", "ip")):
        return False
    script = "ip link add hub type bridge && ip link add va type veth peer name vb && unshare -n true"
    return subprocess.run(["unshare", "-rn", "sh", "-c", script], capture_output=True, check=False).returncode == 0


@dataclass(frozen=True, slots=True)
class PodNetwork:
    """`holders`: the ids of the processes that hold the pods' namespaces."""

    holders: tuple[int, ...]

    def host(self, number: int) -> str:
        return f"10.9.0.{number + 1}"

    def within(self, number: int) -> tuple[str, ...]:
        """Return the beginning of a command line that runs in the pod's namespace."""
        return ("nsenter", "-t", str(self.holders[number]), "-n")

    def cut(self, number: int) -> None:
        """Cut a pod from its peers: what it sends them vanishes, answers included. It still reaches the hub, and the hub the pod."""
        for other in range(len(self.holders)):
            if other != number:
                _run(*self._neighbour(number, "replace", other), "lladdr", _NOBODY, "nud", "permanent")

    def mend(self, number: int) -> None:
        for other in range(len(self.holders)):
            if other != number:
                _run(*self._neighbour(number, "del", other))

    def _neighbour(self, number: int, verb: str, other: int) -> tuple[str, ...]:
        return (*self.within(number), "ip", "neigh", verb, self.host(other), "dev", "pod")


@contextlib.contextmanager
def pod_network(num_pods: int) -> Iterator[PodNetwork]:
    """Make the namespaces and join them with a bridge."""
    _run("ip", "link", "set", "lo", "up")
    _run("ip", "link", "add", "hub", "type", "bridge")
    _run("ip", "addr", "add", f"{HUB}/24", "dev", "hub")
    _run("ip", "link", "set", "hub", "up")
    with contextlib.ExitStack() as stack:
        holders = tuple(stack.enter_context(_namespace()) for _ in range(num_pods))
        network = PodNetwork(holders)
        for number, holder in enumerate(holders):
            _run(
                *("ip", "link", "add", f"hub{number}", "type", "veth", "peer", "name", "pod", "netns", str(holder)),
            )
            _run("ip", "link", "set", f"hub{number}", "master", "hub", "up")
            inside = (*network.within(number), "ip")
            _run(*inside, "addr", "add", f"{network.host(number)}/24", "dev", "pod")
            _run(*inside, "link", "set", "pod", "up")
            _run(*inside, "link", "set", "lo", "up")
        yield network


@contextlib.contextmanager
def _namespace() -> Iterator[int]:
    with subprocess.Popen(["unshare", "-n", "sleep", "infinity"]) as holder:
        own = Path("/proc/self/ns/net").readlink()
        while Path(f"/proc/{holder.pid}/ns/net").readlink() == own:
            time.sleep(0.01)
        try:
            yield holder.pid
        finally:
            holder.kill()


def _run(*words: str) -> None:
    subprocess.run(words, check=True)
