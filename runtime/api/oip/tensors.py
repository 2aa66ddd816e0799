"""Reads prompts from the BYTES tensors of the Open Inference Protocol and writes texts to them, as typed or raw contents."""

import struct
from collections.abc import Sequence

from runtime.errors import InvalidRequest
from wire.inference import grpc_predict_v2_pb2 as pb

INPUT = "text_input"
OUTPUT = "text_output"
_LENGTH = struct.Struct("<I")


def prompts_of(request: pb.ModelInferRequest) -> list[str]:
    """Return the request's prompts. Raises InvalidRequest naming the tensor."""
    if len(request.inputs) != 1 or request.inputs[0].name != INPUT:
        names = ", ".join(tensor.name for tensor in request.inputs) or "none"
        raise InvalidRequest(f"the inputs must be one tensor {INPUT}, got {names}")
    unknown = [tensor.name for tensor in request.outputs if tensor.name != OUTPUT]
    if unknown:
        raise InvalidRequest(f"output {unknown[0]} does not exist, only {OUTPUT}")
    tensor = request.inputs[0]
    if tensor.datatype != "BYTES":
        raise InvalidRequest(f"tensor {INPUT} must be BYTES, got {tensor.datatype or 'no datatype'}")
    shape = list(tensor.shape)
    if not shape or len(shape) > 2 or shape[0] < 0 or (len(shape) == 2 and shape[1] != 1):
        raise InvalidRequest(f"tensor {INPUT} must have the shape [n] or [n, 1], got {shape}")
    if request.raw_input_contents:
        if tensor.HasField("contents"):
            raise InvalidRequest(f"tensor {INPUT} has contents, and there are raw_input_contents: only one may be used")
        if len(request.raw_input_contents) != 1:
            raise InvalidRequest(
                f"there must be one entry of raw_input_contents, got {len(request.raw_input_contents)}"
            )
        elements = _unpack(request.raw_input_contents[0])
    else:
        elements = list(tensor.contents.bytes_contents)
    if len(elements) != shape[0]:
        raise InvalidRequest(f"tensor {INPUT} has the shape {shape} and {len(elements)} elements")
    return [_text(element) for element in elements]


def put_texts(response: pb.ModelInferResponse, texts: Sequence[str], *, raw: bool) -> None:
    tensor = response.outputs.add(name=OUTPUT, datatype="BYTES", shape=[len(texts)])
    elements = [text.encode() for text in texts]
    if raw:
        response.raw_output_contents.append(b"".join(_LENGTH.pack(len(element)) + element for element in elements))
    else:
        tensor.contents.bytes_contents.extend(elements)


def _unpack(data: bytes) -> list[bytes]:
    elements: list[bytes] = []
    at = 0
    while at < len(data):
        start = at + _LENGTH.size
        if start > len(data):
            raise InvalidRequest(f"raw_input_contents of {INPUT} ends inside an element's length")
        at = start + _LENGTH.unpack_from(data, at)[0]
        if at > len(data):
            raise InvalidRequest(f"raw_input_contents of {INPUT} ends inside an element")
        elements.append(data[start:at])
    return elements


def _text(element: bytes) -> str:
    try:
        return element.decode()
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"an element of {INPUT} is not UTF-8: {error}") from error
