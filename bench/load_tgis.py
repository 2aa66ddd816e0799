"""Generates load for fmaas.GenerationService: N concurrent GenerateStream calls, like bench.load.run over gRPC."""

import asyncio
import time

import grpc.aio

from bench.load import Answer, Outcome, Workload
from wire.fmaas import generation_pb2 as pb
from wire.fmaas.generation_pb2_grpc import GenerationServiceStub


async def run(address: str, model: str, workload: Workload, metadata: tuple[tuple[str, str], ...] = ()) -> Outcome:
    """Run the workload. Raises RuntimeError if a stream ends early."""
    async with grpc.aio.insecure_channel(address) as channel:
        stub = GenerationServiceStub(channel)
        prompts = [" ".join(f"w{token}" for token in prompt) for prompt in workload.prompts()]
        return Outcome.of(
            list(
                await asyncio.gather(
                    *(_one(stub, model, prompt, workload.output_tokens, metadata) for prompt in prompts)
                )
            )
        )


async def _one(
    stub: GenerationServiceStub, model: str, prompt: str, output_tokens: int, metadata: tuple[tuple[str, str], ...]
) -> Answer:
    stopping = pb.StoppingCriteria(max_new_tokens=output_tokens, min_new_tokens=output_tokens)
    request = pb.SingleGenerationRequest(
        model_id=model, request=pb.GenerationRequest(text=prompt), params=pb.Parameters(stopping=stopping)
    )
    sent = time.perf_counter()
    events: list[float] = []
    tokens = 0
    async for message in stub.GenerateStream(request, metadata=metadata):
        tokens = message.generated_token_count or tokens
        if message.text:
            events.append(time.perf_counter())
    if tokens != output_tokens:
        raise RuntimeError(f"asked for {output_tokens} tokens, got {tokens}")
    return Answer(sent, tuple(events), time.perf_counter(), tokens)
