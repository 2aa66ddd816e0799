"""Generates wire/ from proto/: messages with their types, and services with types for grpc.aio.

Run by the generator's own environment (`make proto`); `--check` compares with what is committed and changes nothing.
The generator is pinned and old on purpose: generated code refuses to load on a protobuf or grpcio older than itself.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

import grpc_tools
from google.protobuf import descriptor_pb2
from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
GOOGLES = Path(grpc_tools.__file__).parent / "_proto"  # protobuf's own files, such as google/protobuf/any.proto
HEADER = "# Generated from {source} by scripts/proto.py. Do not edit.\n"


def generate(out_dir: Path) -> None:
    """Write the whole of wire/ into `out_dir`/wire."""
    sources = sorted((ROOT / "proto").rglob("*.proto"))
    descriptors_file = out_dir / "descriptors.bin"
    # the virtual path makes the imports read `from wire.<area> import …`
    names = [f"wire/{source.relative_to(ROOT / 'proto').as_posix()}" for source in sources]
    mapping = f"-Iwire={ROOT / 'proto'}"
    _protoc(
        mapping, f"--python_out={out_dir}", f"--pyi_out={out_dir}", f"--descriptor_set_out={descriptors_file}", *names
    )
    files = descriptor_pb2.FileDescriptorSet.FromString(descriptors_file.read_bytes()).file
    descriptors_file.unlink()
    with_services = [file for file in files if file.service]
    _protoc(mapping, f"--grpc_python_out={out_dir}", *(file.name for file in with_services))
    for file in with_services:
        stub = out_dir / file.name.replace(".proto", "_pb2_grpc.pyi")
        stub.write_text(service_types(file), encoding="utf-8")
    for folder in {out_dir / "wire", *(path.parent for path in (out_dir / "wire").rglob("*.py"))}:
        text = '"""Stubs generated from proto/ by scripts/proto.py; never edited."""\n' if folder.name == "wire" else ""
        (folder / "__init__.py").write_text(text, encoding="utf-8")


def service_types(file: descriptor_pb2.FileDescriptorProto) -> str:
    """The .pyi of a *_pb2_grpc module, as asyncio uses it; messages must come from the same file."""
    module = file.name.removesuffix(".proto").rpartition("/")[2] + "_pb2"
    package = file.name.rpartition("/")[0].replace("/", ".")
    lines = [
        HEADER.format(source=file.name.replace("wire/", "proto/", 1)),
        "from collections.abc import AsyncIterator, Awaitable\n",
        "import grpc.aio\n",
        f"from {package} import {module} as pb\n",
    ]
    for service in file.service:
        stub, servicer = [], []
        for method in service.method:
            if method.client_streaming:
                raise SystemExit(f"{service.name}.{method.name}: no types for a client stream yet")
            request, response = (f"pb.{name.rpartition('.')[2]}" for name in (method.input_type, method.output_type))
            kind = "UnaryStream" if method.server_streaming else "UnaryUnary"
            result = f"AsyncIterator[{response}]" if method.server_streaming else f"Awaitable[{response}]"
            stub.append(f"    {method.name}: grpc.aio.{kind}MultiCallable[{request}, {response}]\n")
            context = f"grpc.aio.ServicerContext[{request}, {response}]"
            servicer.append(f"    def {method.name}(self, request: {request}, context: {context}) -> {result}: ...\n")
        add = f"def add_{service.name}Servicer_to_server(servicer: {service.name}Servicer, server: grpc.aio.Server) -> None: ...\n"
        lines += [
            f"\nclass {service.name}Stub:\n    def __init__(self, channel: grpc.aio.Channel) -> None: ...\n",
            *stub,
            f"\nclass {service.name}Servicer:\n",
            *servicer,
            "\n",
            add,
        ]
    return "".join(lines)


def differences(fresh_dir: Path, committed_dir: Path) -> list[str]:
    """Paths that are not the same in both, in words."""
    fresh, committed = _contents(fresh_dir), _contents(committed_dir)
    found = [f"missing: wire/{path}" for path in sorted(fresh.keys() - committed.keys())]
    found += [f"not generated: wire/{path}" for path in sorted(committed.keys() - fresh.keys())]
    found += [
        f"differs: wire/{path}" for path in sorted(fresh.keys() & committed.keys()) if fresh[path] != committed[path]
    ]
    return found


def _contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.suffix in {".py", ".pyi"}
    }


def _protoc(*arguments: str) -> None:
    if protoc.main(["protoc", f"-I{GOOGLES}", *arguments]) != 0:
        raise SystemExit("protoc failed")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare with the committed wire/ and change nothing")
    check: bool = parser.parse_args().check
    with tempfile.TemporaryDirectory() as name:
        fresh_dir = Path(name)
        generate(fresh_dir)
        if check:
            found = differences(fresh_dir / "wire", ROOT / "wire")
            if found:
                print("wire/ is not what proto/ generates; run `make proto`", *found, sep="\n  ", file=sys.stderr)
                return 1
            print("wire/ is what proto/ generates")
            return 0
        shutil.rmtree(ROOT / "wire", ignore_errors=True)
        shutil.copytree(fresh_dir / "wire", ROOT / "wire")
    return 0


if __name__ == "__main__":
    sys.exit(main())
