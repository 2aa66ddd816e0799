"""What each client's script is given on its command line, and how it reports what it got."""

import json
import sys
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Arguments:
    url: str
    grpc: str
    model: str
    prompt: str
    num_tokens: int


def read() -> Arguments:
    url, grpc, model, prompt, num_tokens = sys.argv[1:]
    return Arguments(url, grpc, model, prompt, int(num_tokens))


def report(**found: object) -> None:
    """Print the results as the last line of the output, which is what the test reads."""
    print(json.dumps(found), flush=True)
