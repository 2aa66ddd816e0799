"""Clients whose requirements clash with the project's, each as a process of an environment of its own (`make clients`)."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import greedy
from tests.support import stack

ROOT = Path(__file__).parents[2]
CLIENTS = ROOT / ".env-clients" / "bin" / "python"
OLD_OPENAI = ROOT / ".env-openai1" / "bin" / "python"
PROMPT = "The company keeps many plays ready"
NUM_TOKENS = 16
NAME = "org/ada"


@pytest.fixture(scope="module")
def named(served: stack.Stack, models: dict[str, Path]) -> stack.Stack:
    served.admin.register({"name": NAME, "uri": str(models["ada"])})
    return served


@pytest.fixture(scope="module")
def expected(models: dict[str, Path]) -> str:
    return greedy(models["ada"], PROMPT, NUM_TOKENS)


def run(named: stack.Stack, python: Path, client: str) -> dict[str, Any]:
    """Run a client's script and return what it reports. Skips if its environment was not made."""
    if not python.exists():
        pytest.skip(f"{python.parent.parent.name} is missing: `make clients` makes it")
    module = f"tests.e2e.clients.{client}"
    command = [str(python), "-m", module, named.url, named.grpc, NAME, PROMPT, str(NUM_TOKENS)]
    # litellm would download a list of prices.
    environment = {**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True", "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert ended.returncode == 0, ended.stderr[-3000:]
    found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return found


def test_kserve_client_infers_over_both_protocols(named: stack.Stack, expected: str) -> None:
    found = run(named, CLIENTS, "kserve_client")
    assert found == {
        "live": True,
        "ready": True,
        "model_ready": True,
        "rest": expected,
        "grpc_ready": True,
        "grpc": expected,
    }


def test_text_generation_client_generates(named: stack.Stack, expected: str) -> None:
    found = run(named, CLIENTS, "text_generation_client")
    assert (found["whole"], found["streamed"]) == (expected, expected)
    assert found["num_tokens"] == found["num_events"] == NUM_TOKENS
    assert "max_new_tokens" in found["refusal"]


def test_triton_grpc_client_infers(named: stack.Stack, expected: str) -> None:
    found = run(named, CLIENTS, "triton_grpc_client")
    assert found == {"live": True, "ready": True, "inputs": ["text_input"], "text": expected}


def test_litellm_recognises_overflow_and_unknown_models(named: stack.Stack, expected: str) -> None:
    found = run(named, CLIENTS, "litellm_client")
    assert found == {"text": expected, "overflow": "ContextWindowExceededError", "unknown": "NotFoundError"}


def test_langchain_recognises_overflow(named: stack.Stack, expected: str) -> None:
    found = run(named, CLIENTS, "langchain_client")
    assert found["text"] == expected
    assert found["overflow"] in ("OpenAIContextOverflowError", "OpenAIAPIContextOverflowError")


@pytest.mark.parametrize(("python", "is_first"), [(OLD_OPENAI, True), (Path(sys.executable), False)], ids=["1", "own"])
def test_openai_client_of_two_major_versions(named: stack.Stack, expected: str, python: Path, is_first: bool) -> None:
    found = run(named, python, "openai_client")
    assert found["version"].startswith("1.") is is_first
    assert (found["whole"], found["streamed"]) == (expected, expected)
    assert (found["overflow"], found["unknown"]) == ("context_length_exceeded", "model_not_found")
    assert (found["num_tokens"], found["reasons"]) == (4, ["length"])
    assert NAME in found["models"]
