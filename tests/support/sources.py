"""Settings with which tests may read any local path and fetch from servers on loopback."""

from runtime.config.schema import RuntimeConfig
from runtime.puller.sources.destinations import Destinations

ANYWHERE = Destinations.parse(("*",))
OPEN = RuntimeConfig(model_roots=("/",), source_hosts=("*",))
