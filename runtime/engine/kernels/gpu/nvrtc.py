"""Compiles CUDA C++ kernels with NVRTC, once per source and GPU architecture, keeps the machine code on disk, and
launches kernels on torch's stream.

A kernel takes one struct. Every launch may overlap with the end of the kernel before it (`pdl.py`). Without NVRTC,
its bindings or a supported architecture no module is made: one warning is logged, and callers use Triton.
"""

import ctypes
import functools
import hashlib
import logging
import os
import pathlib
import re
import tempfile
from dataclasses import dataclass
from typing import Any

import torch

_LOG = logging.getLogger(__name__)
_OLDEST = (9, 0)  # the first compute capability whose launches can overlap
SHARED_BYTES = 227 << 10  # the most shared memory that a launch can request for a block (Hopper)


class NvrtcError(RuntimeError):
    """A compiler or driver call failed."""


def _checked(call: str, result: tuple[Any, ...]) -> Any:
    status, *values = result
    if int(status) != 0:
        raise NvrtcError(f"{call}: {status.name}")
    return values[0] if values else None


@dataclass(frozen=True)
class Module:
    """The functions of one source on one device."""

    driver: Any
    functions: dict[str, Any]

    def launch(
        self, name: str, grid: tuple[int, int, int], threads: int, shared_bytes: int, arguments: ctypes.Structure
    ) -> None:
        """Launch the kernel on torch's current stream. `arguments` is copied."""
        driver = self.driver
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = grid
        config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
        config.sharedMemBytes = shared_bytes
        config.hStream = driver.CUstream(torch.cuda.current_stream().cuda_stream)
        attribute = driver.CUlaunchAttribute()
        attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.value.programmaticStreamSerializationAllowed = 1
        config.attrs = [attribute]
        config.numAttrs = 1
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
        _checked(
            f"launch of {name}", driver.cuLaunchKernelEx(config, self.functions[name], ctypes.addressof(pointers), 0)
        )


@functools.cache
def module(source: str, names: tuple[str, ...], device: torch.device, defines: tuple[str, ...] = ()) -> Module | None:
    """Return the module of `source`, a file in this folder, with the functions `names`. `defines` are NAME=value.

    Returns None if it cannot be compiled or loaded.
    """
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability < _OLDEST:
        _LOG.warning(
            "%s needs a GPU of compute capability 9.0 or later, this one has %d.%d; using Triton instead",
            source,
            *capability,
        )
        return None
    try:
        from cuda.bindings import driver

        image = cubin(source, architecture(device), defines)
        torch.zeros(1, device=device)  # Makes the device's context current.
        held = _checked("cuModuleLoadData", driver.cuModuleLoadData(image))
        functions = {
            name: _checked(f"cuModuleGetFunction {name}", driver.cuModuleGetFunction(held, name.encode()))
            for name in names
        }
        limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        for function in functions.values():
            _checked("cuFuncSetAttribute", driver.cuFuncSetAttribute(function, limit, SHARED_BYTES))
    except (ImportError, RuntimeError, OSError) as error:
        _LOG.warning("%s cannot be compiled or loaded (%s); using Triton instead", source, error)
        return None
    return Module(driver, functions)


def architecture(device: torch.device) -> str:
    """Return the compiler's name of this GPU's architecture, for Hopper with its architecture-specific instructions."""
    major, minor = torch.cuda.get_device_capability(device)
    return "sm_90a" if (major, minor) == (9, 0) else f"sm_{major}{minor}"


def cubin(source: str, architecture: str, defines: tuple[str, ...] = ()) -> bytes:
    """Return the machine code of `source`, from disk if it was compiled before."""
    text = source_text(source)
    home = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "repertory" / "kernels"
    kept = home / f"{hashlib.sha256(text + ' '.join(('', *defines)).encode()).hexdigest()[:32]}-{architecture}.cubin"
    if kept.exists():
        return kept.read_bytes()
    image = compile_source(source, text, architecture, defines)
    try:
        home.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=home, delete=False) as file:
            file.write(image)
        pathlib.Path(file.name).replace(kept)
    except OSError as error:
        _LOG.warning("compiled kernels cannot be cached on disk and are compiled again at the next start: %s", error)
    return image


def source_text(source: str) -> bytes:
    """Return a source with its includes from this folder expanded."""
    text = (pathlib.Path(__file__).parent / source).read_text()
    return re.sub(r'^#include "(.+)"$', lambda found: source_text(found[1]).decode(), text, flags=re.MULTILINE).encode()


def compile_source(name: str, text: bytes, architecture: str, defines: tuple[str, ...] = ()) -> bytes:
    """Compile a source with NVRTC for one architecture. Raises NvrtcError with the compiler's log."""
    from cuda.bindings import nvrtc

    program = _checked("nvrtcCreateProgram", nvrtc.nvrtcCreateProgram(text, name.encode(), 0, [], []))
    options = [
        f"--gpu-architecture={architecture}".encode(),
        b"--std=c++17",
        *(f"--define-macro={define}".encode() for define in defines),
    ]
    status = nvrtc.nvrtcCompileProgram(program, len(options), options)[0]
    if int(status) != 0:
        log = b" " * _checked("nvrtcGetProgramLogSize", nvrtc.nvrtcGetProgramLogSize(program))
        nvrtc.nvrtcGetProgramLog(program, log)
        raise NvrtcError(f"{name} does not compile for {architecture}: {log.decode(errors='replace')}")
    image: bytes = b" " * _checked("nvrtcGetCUBINSize", nvrtc.nvrtcGetCUBINSize(program))
    _checked("nvrtcGetCUBIN", nvrtc.nvrtcGetCUBIN(program, image))
    nvrtc.nvrtcDestroyProgram(program)
    return image
