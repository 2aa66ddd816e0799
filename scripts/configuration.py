"""Generates docs/configuration.md from the configuration structs and flags: `python scripts/configuration.py [--check]`."""

import argparse
import sys
from pathlib import Path

import msgspec

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common.model_key import registrable_fields  # noqa: E402 - the script runs from a checkout
from common.struct_schema import Field  # noqa: E402
from mesh.cli import serve_flags  # noqa: E402
from mesh.config.schema import MeshConfig  # noqa: E402
from runtime.config.schema import EngineConfig, RuntimeConfig  # noqa: E402

PAGE = ROOT / "docs" / "configuration.md"

HEAD = """\
# Configuration

A flag overrides an environment variable, which overrides the YAML file, which overrides the default, for every program. Sizes are bytes, or
`512MiB` and `40GiB`. Times are seconds. Addresses are `HOST:PORT` or `unix:PATH`. Lists are comma separated.

| program | flags | environment | file |
| --- | --- | --- | --- |
| `repertory serve` | first table | `REPERTORY_<FLAG>`, and `REPERTORY_<FIELD>` of any field below | sections `mesh:` and `runtime:` |
| `repertory serve-mesh` | `--<field>` (without `-bytes`, `-s`) | `REPERTORY_<FIELD>` | the fields of the mesh |
| `repertory serve-runtime` | the same, the engine's fields included | `REPERTORY_<FIELD>` | the fields of the runtime, the engine's under `engine:` |

`--config FILE` names the file. The sections of the file of `serve` each take any field of their table.

A `REPERTORY_…` variable that sets nothing is named in a warning at the start. `serve` itself sets `listen`, `runtime_grpc` and `runtime_http`.

Secrets never go into a registration: `HF_TOKEN` and the cloud libraries' own variables belong to the runtime's environment, other stores' keys into files of
`storage_config_dir` (ModelMesh's `storage-config` secret, one JSON object per file), named by `--storage-key` at registration.

| store | install | credentials without a file |
| --- | --- | --- |
| `s3://BUCKET/PATH` | `repertory[s3]` | boto3's own chain |
| `gs://BUCKET/PATH` | `repertory[gcs]` | the machine's credentials, or public buckets |
| `az://ACCOUNT/CONTAINER/PATH` | `repertory[azure]` | the identity that the environment names, or public containers |
| `http(s)://…` | | |

The keys of a store's file, or of `storage_params`:

- `s3`: `access_key_id`, `secret_access_key`, `region`, `endpoint_url`, `anonymous`, and `certificate` (PEM) or `ca_bundle` (a file) or `verify_ssl`
- `gs`: those of a service account's key file; `endpoint_url`, `anonymous`
- `az`: `connection_string`, or `account_key`, `sas_token`, or `tenant_id`, `client_id`, `client_secret`, or `managed_identity`; `endpoint_url`,
  `anonymous`
- `http(s)`: `headers` (a JSON object) and their `url`, `certificate`, `client_certificate`, `client_key` (PEM)

A registration's `storage_params` override the file, except for the fields that decide where its credentials are sent (`url`, `endpoint_url`,
`token_uri`, `verify_ssl`, `ca_bundle`). A file with `headers` must name the `url` of the site that receives them. The machine's own identity at
Google's or Azure's store is never sent to an `endpoint_url` that a registration names. Without a `storage_key`, the files `default_<type>` and
`default` are used if they match the URI's type and, with headers, its site.
"""


def page() -> str:
    parser = argparse.ArgumentParser(add_help=False)
    serve_flags.add_flags(parser)
    parts = [HEAD, "## `repertory serve`\n", "| flag | default | meaning |\n| --- | --- | --- |"]
    for action in parser._actions:
        default = "" if action.default in (None, "", False) else f"`{action.default}`".replace(str(Path.home()), "~")
        text = (action.help or "").replace("%%", "%").split(" [REPERTORY_")[0]
        parts.append(f"| `{action.option_strings[0]}` | {default} | {_cell(text)} |")
    for title, kind in (
        ("The mesh", MeshConfig),
        ("The runtime", RuntimeConfig),
        ("The engine (`engine:` in the runtime's file)", EngineConfig),
    ):
        parts += [f"\n## {title}\n", "| field | default | meaning |\n| --- | --- | --- |", *_rows(kind)]
    parts += [
        "\n## A model\n\nGiven at registration: flags of `repertory register` and `fit`, fields of `POST /admin/v1/models`, and fields of a\n"
        "ModelMesh model key.\n",
        "| setting | default | value | meaning |\n| --- | --- | --- | --- |",
        *(row for field in registrable_fields() for row in _settings_rows(field)),
    ]
    return "\n".join(parts) + "\n"


def _settings_rows(field: Field) -> list[str]:
    if field.fields:
        return [
            f"| `{field.name}.{inner.name}` |  | {inner.allowed} | {field.about if index == 0 else ''} |"
            for index, inner in enumerate(field.fields)
        ]
    default = "" if field.default in (None, dict) else f"`{_shown('', field.default)}`"
    return [f"| `{field.name}` | {default} | {field.allowed} | {_cell(field.about)} |"]


def _rows(kind: type[msgspec.Struct]) -> list[str]:
    info = msgspec.inspect.type_info(kind)
    assert isinstance(info, msgspec.inspect.StructType)
    rows = []
    for field in info.fields:
        if not isinstance(field.type, msgspec.inspect.Metadata):
            continue
        text = str((field.type.extra_json_schema or {}).get("description", ""))
        inner = isinstance(field.default, msgspec.Struct)  # a section has its own table
        default = (
            ""
            if inner or field.default in ("", (), None, msgspec.NODEFAULT)
            else f"`{_shown(field.name, field.default)}`"
        )
        rows.append(f"| `{field.name}` | {default} | {_cell(text)} |")
    return rows


def _shown(name: str, value: object) -> object:
    if isinstance(value, bool):
        return str(value).lower()
    if name.endswith("_bytes") and isinstance(value, int) and value and value % 2**20 == 0:
        return f"{value // 2**30}GiB" if value % 2**30 == 0 else f"{value // 2**20}MiB"
    return ", ".join(map(str, value)) if isinstance(value, tuple) else value


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def main() -> int:
    check = "--check" in sys.argv[1:]
    if check:
        if PAGE.read_text() != page():
            print(f"{PAGE.relative_to(ROOT)} is out of date; run scripts/configuration.py", file=sys.stderr)
            return 1
        return 0
    PAGE.write_text(page())
    return 0


if __name__ == "__main__":
    sys.exit(main())
