"""Reads and writes the bodies of REST inference, with Triton's binary tensor data after the JSON."""

from typing import Any

import msgspec

from runtime.api.oip.rest_types import InferAnswer, InferBody, TensorOut
from runtime.api.oip.tensors import DATATYPE, INPUT, OUTPUT, check_names, check_tensor, pack, texts_of, unpack
from runtime.errors import InvalidRequest

JSON_LENGTH_HEADER = "Inference-Header-Content-Length"
BINARY_EXTENSION = "binary_tensor_data"
_WANTS_BINARY = "binary_data_output"


def split_body(raw: bytes, json_length: str | None) -> tuple[bytes, bytes]:
    """Return the JSON and what follows it. `json_length` is the header's value, None if there is none. Raises InvalidRequest."""
    if json_length is None:
        return raw, b""
    if not json_length.isascii() or not json_length.isdigit() or int(json_length) > len(raw):
        raise InvalidRequest(
            f"{JSON_LENGTH_HEADER} must be the length of the JSON, 0 to {len(raw)} here, got {json_length!r}"
        )
    return raw[: int(json_length)], raw[int(json_length) :]


def texts_in(body: InferBody, binary: bytes) -> list[str]:
    """Return the request's prompts. Raises InvalidRequest naming the tensor."""
    check_names([tensor.name for tensor in body.inputs], [output.name for output in body.outputs])
    tensor = body.inputs[0]
    check_tensor(tensor.datatype, tensor.shape)
    size = tensor.parameters.get("binary_data_size")
    if size is None:
        if binary:
            raise InvalidRequest(f"{len(binary)} bytes follow the JSON, and tensor {INPUT} has no binary_data_size")
        return texts_of(_elements(tensor.data), tensor.shape)
    if tensor.data is not None:
        raise InvalidRequest(f"tensor {INPUT} has data and a binary_data_size: only one may be used")
    if size != len(binary):
        raise InvalidRequest(f"tensor {INPUT} has the binary_data_size {size}, and {len(binary)} bytes follow the JSON")
    return texts_of(unpack(binary), tensor.shape)


def _elements(data: list[Any] | None) -> list[bytes]:
    if data is None:
        raise InvalidRequest(f"tensor {INPUT} has neither data nor a binary_data_size")
    flat = [element for row in data for element in (row if isinstance(row, list) else [row])]
    wrong = next((element for element in flat if not isinstance(element, str)), None)
    if wrong is not None:
        raise InvalidRequest(f"the data of {INPUT} must be strings, got {type(wrong).__name__}")
    return [element.encode() for element in flat]


def generation_parameters(body: InferBody) -> dict[str, Any]:
    """Return the parameters that concern generation, not the form of the answer."""
    return {name: value for name, value in body.parameters.items() if name != _WANTS_BINARY}


def answer_body(name: str, version: str, body: InferBody, texts: list[str]) -> tuple[bytes, int | None]:
    """Return the answer, and the length of its JSON if binary data follow it, as the request asked."""
    wanted = [output.parameters.get("binary_data") for output in body.outputs]
    in_binary = next((value for value in wanted if value is not None), body.parameters.get(_WANTS_BINARY))
    data = pack(texts) if in_binary is True else b""
    tensor = TensorOut(
        OUTPUT,
        DATATYPE,
        [len(texts)],
        parameters={"binary_data_size": len(data)} if in_binary is True else msgspec.UNSET,
        data=msgspec.UNSET if in_binary is True else texts,
    )
    encoded = msgspec.json.encode(InferAnswer(name, version, [tensor], body.id or msgspec.UNSET))
    return encoded + data, len(encoded) if in_binary is True else None
