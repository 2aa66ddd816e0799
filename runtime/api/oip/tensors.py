"""Checks the BYTES tensors of the Open Inference Protocol, and reads and writes texts in their raw form and in gRPC messages."""

import struct
from collections.abc import Sequence

from runtime.errors import InvalidRequest
from wire.inference import grpc_predict_v2_pb2 as pb

INPUT = "text_input"
OUTPUT = "text_output"
DATATYPE = "BYTES"
_LENGTH = struct.Struct("<I")


def prompts_of(request: pb.ModelInferRequest) -> list[str]:
    """Return the request's prompts. Raises InvalidRequest naming the tensor."""
    check_names([tensor.name for tensor in request.inputs], [tensor.name for tensor in request.outputs])
    tensor = request.inputs[0]
    check_tensor(tensor.datatype, tensor.shape)
    if request.raw_input_contents:
        if tensor.HasField("contents"):
            raise InvalidRequest(f"tensor {INPUT} has contents, and there are raw_input_contents: only one may be used")
        if len(request.raw_input_contents) != 1:
            raise InvalidRequest(
                f"there must be one entry of raw_input_contents, got {len(request.raw_input_contents)}"
            )
        elements = unpack(request.raw_input_contents[0])
    else:
        elements = list(tensor.contents.bytes_contents)
    return texts_of(elements, tensor.shape)


def put_texts(response: pb.ModelInferResponse, texts: Sequence[str], *, raw: bool) -> None:
    tensor = response.outputs.add(name=OUTPUT, datatype=DATATYPE, shape=[len(texts)])
    if raw:
        response.raw_output_contents.append(pack(texts))
    else:
        tensor.contents.bytes_contents.extend(text.encode() for text in texts)


def check_names(inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Raise InvalidRequest unless there is the one input, and no other output is requested."""
    if list(inputs) != [INPUT]:
        raise InvalidRequest(f"the inputs must be one tensor {INPUT}, got {', '.join(inputs) or 'none'}")
    unknown = next((name for name in outputs if name != OUTPUT), None)
    if unknown is not None:
        raise InvalidRequest(f"output {unknown} does not exist, only {OUTPUT}")


def check_tensor(datatype: str, shape: Sequence[int]) -> None:
    """Raise InvalidRequest unless the input is BYTES of shape [n] or [n, 1]."""
    if datatype != DATATYPE:
        raise InvalidRequest(f"tensor {INPUT} must be {DATATYPE}, got {datatype or 'no datatype'}")
    if not shape or len(shape) > 2 or shape[0] < 0 or (len(shape) == 2 and shape[1] != 1):
        raise InvalidRequest(f"tensor {INPUT} must have the shape [n] or [n, 1], got {list(shape)}")


def texts_of(elements: Sequence[bytes], shape: Sequence[int]) -> list[str]:
    """Return the elements as texts. Raises InvalidRequest if their number is not the shape's, or one is not UTF-8."""
    if len(elements) != shape[0]:
        raise InvalidRequest(f"tensor {INPUT} has the shape {list(shape)} and {len(elements)} elements")
    return [_text(element) for element in elements]


def pack(texts: Sequence[str]) -> bytes:
    """Return the raw form: each element after its length of four bytes, little-endian."""
    elements = [text.encode() for text in texts]
    return b"".join(_LENGTH.pack(len(element)) + element for element in elements)


def unpack(data: bytes) -> list[bytes]:
    """Return the elements of the raw form. Raises InvalidRequest."""
    elements: list[bytes] = []
    at = 0
    while at < len(data):
        start = at + _LENGTH.size
        if start > len(data):
            raise InvalidRequest(f"the raw contents of {INPUT} end inside an element's length")
        at = start + _LENGTH.unpack_from(data, at)[0]
        if at > len(data):
            raise InvalidRequest(f"the raw contents of {INPUT} end inside an element")
        elements.append(data[start:at])
    return elements


def _text(element: bytes) -> str:
    try:
        return element.decode()
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"an element of {INPUT} is not UTF-8: {error}") from error
