"""Computes the least time of a workload on an H200 from bytes, operations and the ceilings in docs/benchmarks/README.md."""

from bench.checkpoints import Shape

COPY_BYTES_PER_S = 4.2e12  # device-to-device copy, bytes read + written
BF16_FLOP_PER_S = 790e12  # 8192³ product of random bf16 matrices
HOST_TO_DEVICE_BYTES_PER_S = 55.5e9
BODY_BYTES_PER_PARAMETER = {"bf16": 2.0, "int8": 1.0, "fp8": 1.0, "nf4": 0.5 + 4 / 64, "fp4": 0.5 + 4 / 64}


def decode_step_s(shape: Shape, format_: str, rows: int, context: float, num_gpus: int = 1) -> float:
    """Return the least time of one decode step of `rows` rows with `context` cached tokens each: bytes or arithmetic, whichever takes longer.

    Several GPUs divide the layers and the KV cache, and each computes the output projection whole. The time of their all-reduces is not counted.
    """
    head = shape.vocab * shape.hidden
    body_bytes = shape.body_parameters * BODY_BYTES_PER_PARAMETER[format_] + rows * context * shape.kv_bytes_per_token
    num_bytes = body_bytes / num_gpus + 2.0 * head
    operations = 2.0 * rows * (shape.body_parameters / num_gpus + head)
    return max(num_bytes / COPY_BYTES_PER_S, operations / BF16_FLOP_PER_S)


def workload_s(
    shape: Shape, format_: str, rows: int, input_tokens: int, output_tokens: int, num_gpus: int = 1
) -> float:
    """Return the least time of a whole offline workload: every prompt's arithmetic once, then `output_tokens - 1` decode steps of all rows."""
    prefill = 2.0 * rows * input_tokens * shape.body_parameters / num_gpus / BF16_FLOP_PER_S
    decode = sum(decode_step_s(shape, format_, rows, input_tokens + k, num_gpus) for k in range(1, output_tokens))
    return prefill + decode
