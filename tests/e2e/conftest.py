"""A whole Repertory as processes, once for all modules of a worker, and what Hugging Face says to the same prompts."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support import stack
from tests.support.checkpoints import tiny_llama
from tests.support.edge import Edge
from tests.support.web import WebServer

API_KEY, HUB_TOKEN, STORE_SECRET = "key-nobody-may-read", "hf_tokenNobodyMayRead", "store-secret-nobody-may-read"
_GUARDS: dict[str, dict[str, object]] = {
    "mesh": {"max_held": 4, "keep_alive_s": 0.3},
    "runtime": {"engine": {"max_rows": 2, "max_waiting": 4, "debug_checks": True, "num_threads": 1}},
}


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three checkpoints with different weights, so that an answer shows which model gave it."""
    base = tmp_path_factory.mktemp("models")
    return {name: tiny_llama(base / name, seed) for seed, name in enumerate(("ada", "bob", "cyd"))}


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[stack.Stack]:
    """Shared: modules register names of their own, or those of `models` at the paths of `models`."""
    log = tmp_path_factory.mktemp("log") / "serve.log"
    with stack.serve("--device", "cpu", "--memory", "64MiB", log=log) as running:
        yield running


@dataclass(frozen=True, slots=True)
class Guarded:
    """A Repertory with keys, roots, small queues and a small disk cache, and the web server of slow files that it may pull from."""

    edge: Edge
    grpc: str
    pid: int
    base: Path
    home: Path
    log: Path
    web: WebServer


@pytest.fixture(scope="session")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    base = tmp_path_factory.mktemp("guarded")
    models, home, log = base / "models", base / "home", base / "serve.log"
    tiny_llama(models / "ada")
    secrets = base / "storage-config"
    secrets.mkdir()
    (secrets / "mine").write_text(
        json.dumps({"type": "s3", "secret_access_key": STORE_SECRET, "endpoint_url": "http://127.0.0.1:9"})
    )
    config = base / "config.yaml"
    config.write_text(
        yaml.safe_dump(
            _GUARDS
            | {
                "runtime": _GUARDS["runtime"]
                | {"model_roots": [str(models)], "source_hosts": ["127.0.0.1"], "storage_config_dir": str(secrets)}
            }
        )
    )
    web = WebServer(models)
    flags = (
        "--device",
        "cpu",
        "--memory",
        "40MiB",
        "--cache-size",
        "3MiB",
        "--wait-budget",
        "3",
        "--config",
        str(config),
    )
    environment = {"REPERTORY_API_KEYS": f"another,{API_KEY}", "HF_TOKEN": HUB_TOKEN}
    with stack.serve(*flags, home=home, environment=environment, log=log, model_roots="") as running:
        edge = Edge(running.url, API_KEY)
        assert edge.register("ada", models / "ada").status == 200
        yield Guarded(edge, running.grpc, running.pid, base, home, log, web)
    web.close()


def greedy(folder: Path, prompt: str, max_new_tokens: int) -> str:
    """transformers' answer to a text prompt, special tokens left out."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([tokenizer(prompt, add_special_tokens=False)["input_ids"]])
    with torch.inference_mode():
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=max_new_tokens, pad_token_id=0
        )
    return str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
