"""Triton's gRPC client: readiness, metadata and inference."""

import numpy as np
import tritonclient.grpc as triton

from tests.e2e.clients.arguments import read, report

given = read()
with triton.InferenceServerClient(given.grpc) as client:
    tensor = triton.InferInput("text_input", [1], "BYTES")
    tensor.set_data_from_numpy(np.array([given.prompt.encode()], dtype=object))
    parameters = {"max_tokens": given.num_tokens, "temperature": 0}
    answer = client.infer(given.model, [tensor], parameters=parameters)
    report(
        live=client.is_server_live(),
        ready=client.is_model_ready(given.model),
        inputs=[each.name for each in client.get_model_metadata(given.model).inputs],
        text=answer.as_numpy("text_output")[0].decode(),
    )
