"""Parses the location of the store: a URL or ModelMesh's KV_STORE value, which may name a JSON file."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import msgspec

from mesh.errors import InvalidRequest

_HOST_PORT = re.compile(r"[\w.\-\[\]:]+:\d+([,/].*)?")


@dataclass(frozen=True, slots=True)
class EtcdLocation:
    """`endpoints` are HOST:PORT. TLS is used if `tls`; `ca_pem` None then means the system's roots."""

    endpoints: tuple[str, ...]
    root_prefix: str = ""
    user: str = ""
    password: str = field(default="", repr=False)
    tls: bool = False
    ca_pem: bytes | None = field(default=None, repr=False)
    client_cert_pem: bytes | None = field(default=None, repr=False)
    client_key_pem: bytes | None = field(default=None, repr=False)
    override_authority: str = ""
    files: tuple[str, ...] = field(default=(), compare=False)  # from which the location was read


@dataclass(frozen=True, slots=True)
class EmbeddedLocation:
    """A directory of this machine. It is not shared, so its root prefix is empty."""

    directory: Path
    root_prefix: str = ""


StoreLocation = EtcdLocation | EmbeddedLocation


class _KvStoreFile(msgspec.Struct, frozen=True):
    """ModelMesh's etcd configuration file, by its own property names."""

    endpoints: str
    userid: str = ""
    password: str = ""
    root_prefix: str = ""
    certificate: str = ""
    certificate_file: str = ""
    override_authority: str = ""
    client_key: str = ""
    client_key_file: str = ""
    client_certificate: str = ""
    client_certificate_file: str = ""


def parse_store(text: str) -> StoreLocation:
    """Parse one of
    `etcd://[USER:PASSWORD@]HOST:PORT[,HOST2:PORT]/PREFIX[?ca=FILE&cert=FILE&key=FILE&authority=NAME]`, `etcds://…` (TLS),
    `etcd:HOST:PORT,…` and `etcd:/FILE.json` (ModelMesh's KV_STORE), `embedded:DIRECTORY` or a plain directory.

    Raises InvalidRequest, which names the invalid part and never the password.
    """
    if text.startswith(("etcd://", "etcds://")):
        return _from_url(text)
    if text.startswith("etcd:"):
        rest = text.removeprefix("etcd:")
        if rest.startswith(("/", "./", "~")) or rest.endswith(".json"):
            return _from_file(Path(rest).expanduser())
        return EtcdLocation(_endpoints(rest)[0])
    if text.startswith("zookeeper:"):
        raise InvalidRequest("store: zookeeper is not supported; use etcd://HOST:PORT or a directory")
    path = text.removeprefix("embedded:")
    if not path or "://" in path:
        raise InvalidRequest(
            f"store: {text.split('://')[0]!r} is neither etcd://HOST:PORT/PREFIX, etcd:/FILE.json nor a directory"
        )
    if text == path and _HOST_PORT.fullmatch(text) and not Path(text).exists():
        raise InvalidRequest(f"store: {text} is neither a directory nor a URL; write etcd://{text} for etcd")
    return EmbeddedLocation(Path(path).expanduser())


def _from_url(text: str) -> EtcdLocation:
    parts = urlsplit(text)
    user_info, _, hosts = parts.netloc.rpartition("@")
    user, _, password = user_info.partition(":")
    query = parse_qs(parts.query)
    unknown = sorted(query.keys() - {"ca", "cert", "key", "authority"})
    if unknown:
        raise InvalidRequest(
            f"store: unknown parameter {unknown[0]!r} in the etcd URL (known: ca, cert, key, authority)"
        )
    paths = {name: Path(values[-1]) for name, values in query.items() if name != "authority"}
    file = {name: _read(path, name) for name, path in paths.items()}
    endpoints, https = _endpoints(hosts)
    return EtcdLocation(
        endpoints,
        root_prefix=parts.path.rstrip("/"),
        user=unquote(user),
        password=unquote(password),
        tls=parts.scheme == "etcds" or https or bool(file),
        ca_pem=file.get("ca"),
        client_cert_pem=file.get("cert"),
        client_key_pem=file.get("key"),
        override_authority=query.get("authority", [""])[-1],
        files=tuple(map(str, paths.values())),
    )


def _from_file(path: Path) -> EtcdLocation:
    try:
        config = msgspec.json.decode(_read(path, "KV_STORE"), type=_KvStoreFile)
    except msgspec.MsgspecError as error:
        raise InvalidRequest(f"store: {path}: {error}") from None

    def pem(inline: str, file: str, name: str) -> bytes | None:
        if inline:
            return inline.encode()
        # File names are relative to the JSON file, because both come from one mounted secret.
        return _read(path.parent / file, name) if file else None

    named = (config.certificate_file, config.client_certificate_file, config.client_key_file)
    endpoints, https = _endpoints(config.endpoints)
    ca = pem(config.certificate, config.certificate_file, "certificate_file")
    return EtcdLocation(
        endpoints,
        root_prefix=config.root_prefix.rstrip("/"),
        user=config.userid,
        password=config.password,
        tls=https or ca is not None,
        ca_pem=ca,
        client_cert_pem=pem(config.client_certificate, config.client_certificate_file, "client_certificate_file"),
        client_key_pem=pem(config.client_key, config.client_key_file, "client_key_file"),
        override_authority=config.override_authority,
        files=(str(path), *(str(path.parent / name) for name in named if name)),
    )


def _endpoints(text: str) -> tuple[tuple[str, ...], bool]:
    """Return the HOST:PORT of each member of a comma list, and whether one of them begins with https://."""
    found: list[str] = []
    https = False
    for item in filter(None, (part.strip() for part in text.split(","))):
        https = https or item.startswith("https://")
        address = item.removeprefix("https://").removeprefix("http://").rstrip("/")
        host, colon, port = address.rpartition(":")
        if not colon:
            address, host, port = f"{address}:2379", address, "2379"
        if not host or not port.isdigit():
            raise InvalidRequest(f"store: etcd endpoint {address!r} is not HOST:PORT")
        found.append(address)
    if not found:
        raise InvalidRequest("store: the etcd address names no endpoint")
    return tuple(found), https


def _read(path: Path, name: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidRequest(f"store: {name}: {path}: {error.strerror}") from None
