"""Parses the runtime's command line and loads its RuntimeConfig."""

import argparse
from collections.abc import Mapping, Sequence

from common.config import add_flags, load
from runtime.config.schema import RuntimeConfig


def configure(arguments: Sequence[str], env: Mapping[str, str]) -> RuntimeConfig:
    """Read the configuration.

    Raises ConfigError naming the flag, variable or file and the field, and SystemExit for --help and unknown flags.
    """
    parser = argparse.ArgumentParser(
        prog="repertory serve-runtime",
        usage="%(prog)s [--config FILE] [FLAG …]",  # the list of all flags would exceed 80 columns
        description="One serving runtime: loads models and serves gRPC (TGIS, Open Inference Protocol, mmesh.ModelRuntime) and OpenAI HTTP.",
        epilog="A flag overrides its environment variable (in brackets), which overrides the file. Sizes: 512MiB, 40GiB.",
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="YAML or JSON file, or JSON text, with any of the fields below; the engine's fields belong under `engine:`",
    )
    add_flags(parser, RuntimeConfig)
    given = vars(parser.parse_args(arguments))
    return load(RuntimeConfig, flags=given, env=env, file=given.pop("config"))
