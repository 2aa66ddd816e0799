"""What libraries would import and we never use: left out, because imports are most of a start. Knows names; imports none of them.

To be called before the first import of torch or transformers. A name that looks absent is handled by those libraries as not installed.
"""

import sys

_ABSENT = ("sklearn", "scipy", "pandas", "torchvision", "torchaudio", "librosa", "accelerate", "boto3")


def leave_out() -> None:
    """Make what serves no text model look absent, unless it is here already."""
    for name in _ABSENT:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]


def compile_nothing() -> None:
    """bitsandbytes wraps functions in torch.compile as it is imported, which brings torch's whole compiler in for nothing that we call."""
    import torch

    def as_it_is(function: object = None, **options: object) -> object:
        return function if function is not None else lambda decorated: decorated

    torch.compile = as_it_is  # type: ignore[assignment]
