"""Reads and writes a string inside an encoded protobuf message of unknown type, by its path of field numbers.

The path (1, 2) means field 2 of the message in field 1.
"""

from collections.abc import Iterator, Sequence

_VARINT, _FIXED64, _DELIMITED, _FIXED32 = 0, 1, 2, 5


def extract(message: bytes, path: Sequence[int]) -> str | None:
    """Return the first text at the path; None if it is absent or empty. Raises ValueError if the message is malformed."""
    view = memoryview(message)
    for number in path:
        found = next((value for at, _, value, _ in _fields(view) if at == number and value is not None), None)
        if found is None:
            return None
        view = found
    try:
        return bytes(view).decode() or None
    except UnicodeDecodeError:
        raise ValueError("the field is not UTF-8") from None


def text_tag(number: int) -> int:
    """Return the byte that stands before a text in a field below 16."""
    return number << 3 | _DELIMITED


def inject(message: bytes, path: Sequence[int], text: str) -> bytes:
    """Return the message with the text at the path replaced by `text`; missing messages on the path are added."""
    return _inject(memoryview(message), path, text.encode())


def _inject(view: memoryview, path: Sequence[int], content: bytes) -> bytes:
    number, rest = path[0], path[1:]
    parts: list[bytes | memoryview] = []
    done = False
    for at, start, value, end in _fields(view):
        if at != number or value is None:
            parts.append(view[start:end])
        elif not done:
            done = True
            parts.append(_delimited(number, _inject(value, rest, content) if rest else content))
        elif rest:
            # A reader merges later occurrences of a message into the first, so they must carry the id as well.
            parts.append(_delimited(number, _inject(value, rest, content)))
    if not done:
        parts.append(_delimited(number, _inject(memoryview(b""), rest, content) if rest else content))
    return b"".join(parts)


def _delimited(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | _DELIMITED) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _fields(view: memoryview) -> Iterator[tuple[int, int, memoryview | None, int]]:
    """Yield (number, start, content if length-delimited, end) of each field at this level."""
    at = 0
    while at < len(view):
        start = at
        tag, at = _read_varint(view, at)
        number, kind = tag >> 3, tag & 7
        value: memoryview | None = None
        if kind == _VARINT:
            _, at = _read_varint(view, at)
        elif kind == _FIXED64:
            at += 8
        elif kind == _FIXED32:
            at += 4
        elif kind == _DELIMITED:
            length, at = _read_varint(view, at)
            value = view[at : at + length]
            at += length
        else:
            raise ValueError(f"wire type {kind} is not supported")
        if at > len(view) or number == 0:
            raise ValueError("the message is truncated")
        yield number, start, value, at


def _read_varint(view: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(view) and shift < 70:
        byte = view[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise ValueError("the message is truncated")
