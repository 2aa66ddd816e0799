"""KServe's client: the Open Inference Protocol over HTTP and gRPC."""

import asyncio

from kserve import InferenceGRPCClient, InferenceRESTClient, InferInput, InferRequest, RESTConfig

from tests.e2e.clients.arguments import Arguments, read, report


def request(given: Arguments) -> InferRequest:
    return InferRequest(
        model_name=given.model,
        infer_inputs=[InferInput(name="text_input", shape=[1], datatype="BYTES", data=[given.prompt])],
        parameters={"max_tokens": given.num_tokens, "temperature": 0},
    )


def text_in(answer: object) -> str:
    [text] = answer.outputs[0].data  # type: ignore[attr-defined]
    return text.decode() if isinstance(text, bytes) else str(text)


async def main(given: Arguments) -> None:
    rest = InferenceRESTClient(RESTConfig(protocol="v2", retries=0))
    grpc = InferenceGRPCClient(given.grpc)
    report(
        live=await rest.is_server_live(given.url),
        ready=await rest.is_server_ready(given.url),
        model_ready=await rest.is_model_ready(given.url, given.model),
        rest=text_in(await rest.infer(given.url, request(given), model_name=given.model)),
        grpc_ready=await grpc.is_model_ready(given.model),
        grpc=text_in(await grpc.infer(request(given))),
    )
    await rest.close()
    await grpc.close()


asyncio.run(main(read()))
