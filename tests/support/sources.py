"""Makes sources and pull jobs, with settings that let tests read any local path and fetch from servers on loopback."""

from pathlib import Path

from runtime.config.schema import RuntimeConfig
from runtime.puller.progress import PullJob
from runtime.puller.source import Source
from runtime.puller.sources.destinations import Destinations
from runtime.puller.sources.resolve import locate
from runtime.types import ModelSource

ANYWHERE = Destinations.parse(("*",))
OPEN = RuntimeConfig(model_roots=("/",), source_hosts=("*",))


def job() -> PullJob:
    """Return a pull whose progress goes nowhere."""
    return PullJob(lambda progress: None)


def source_of(uri: str, config: RuntimeConfig = OPEN, storage_key: str | None = None, **params: str) -> Source:
    """Return the remote source of a URI. `params`: its storage parameters."""
    place = locate(ModelSource(uri, storage_key, params), config)
    assert not isinstance(place, Path)
    return place
