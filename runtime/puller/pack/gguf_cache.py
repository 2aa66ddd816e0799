"""Reading a GGUF file's header once. transformers parses it for the configuration, the weights and the tokenizer anew, a hundred thousand strings each
time, and makes the library's table of tensor names once for every module: two thirds of the time that a small file takes. Knows nothing of models."""

import contextlib
import functools
from collections.abc import Iterator


@contextlib.contextmanager
def read_once() -> Iterator[None]:
    """In this block a file's reader, and an architecture's table of names, are made once. The file must stay as it is."""
    import gguf

    reader, names = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader = functools.cache(reader)
    gguf.get_tensor_name_map = functools.cache(names)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = reader, names
