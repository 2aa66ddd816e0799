"""The peer of bench.cpu: transformers `generate` on a static batch. Reads a JSON job per line, writes tokens per second."""

import json
import random
import sys
import time

import torch
from transformers import AutoModelForCausalLM


def main() -> None:
    path = sys.argv[1]
    folder, _, file = path.rpartition("/")
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    print("ready", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        rng = random.Random(job["seed"])
        ids = [
            [rng.randrange(100, model.config.vocab_size) for _ in range(job["input_tokens"])]
            for _ in range(job["rows"])
        ]
        started = time.perf_counter()
        with torch.inference_mode():
            model.generate(
                torch.tensor(ids),
                attention_mask=torch.ones(len(ids), job["input_tokens"], dtype=torch.long),
                do_sample=False,
                max_new_tokens=job["output_tokens"],
                min_new_tokens=job["output_tokens"],
                pad_token_id=0,
            )
        print(job["rows"] * job["output_tokens"] / (time.perf_counter() - started), flush=True)


if __name__ == "__main__":
    main()
