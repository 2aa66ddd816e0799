"""Lists and reads objects of Azure Blob Storage through azure-storage-blob."""

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from runtime.errors import InvalidRequest
from runtime.puller.source import RemoteFile
from runtime.puller.sources.object_store import missing_extra

_CONNECT_S = 10
_RETRIES = 2  # the library's own; the reader tries again as well
_PAUSE_S = 1
_READ_S = 60
_ACCOUNT = re.compile(r"[A-Za-z0-9-]+")  # it becomes part of a host's name
# of a service principal, a workload identity, an app service's or a container's identity; a bare machine's needs the option
_IDENTITY = ("AZURE_CLIENT_ID", "AZURE_FEDERATED_TOKEN_FILE", "IDENTITY_ENDPOINT", "MSI_ENDPOINT")


class AzureContainer:
    """`options`: connection_string, or account_key, sas_token, or tenant_id, client_id and client_secret; or `managed_identity`, for the identity that
    the machine or the pod has (`client_id` alone: that one of several). Without any, that identity too if the environment names one; else anonymous access, for
    public containers, as with `anonymous`. `endpoint_url`: another server, with the account's name in it if it wants that.
    """

    def __init__(self, account: str, container: str, options: Mapping[str, str]) -> None:
        try:
            from azure.core import MatchConditions
            from azure.core.exceptions import ServiceRequestError, ServiceResponseError
            from azure.storage.blob import ContainerClient, ExponentialRetry
        except ImportError as error:
            raise missing_extra("azure", "azure-storage-blob") from error
        self.origin = f"az://{account}/{container}"
        self.away: tuple[type[Exception], ...] = (ServiceRequestError, ServiceResponseError)
        self._unchanged = MatchConditions.IfNotModified
        if not _ACCOUNT.fullmatch(account):
            shown = re.split("[?#]", account)[0].rpartition("@")[2]
            raise InvalidRequest(
                f"az://{shown}: an account's name has letters, digits and hyphens only", param="modelPath"
            )
        url = options.get("endpoint_url") or f"https://{account}.blob.core.windows.net"
        manners: dict[str, Any] = {
            "retry_policy": ExponentialRetry(
                initial_backoff=_PAUSE_S, increment_base=2, retry_total=_RETRIES, random_jitter_range=0
            ),
            "connection_timeout": _CONNECT_S,
            "read_timeout": _READ_S,
        }
        if "connection_string" in options:
            self._client = ContainerClient.from_connection_string(options["connection_string"], container, **manners)
        else:
            self._client = ContainerClient(url, container, credential=credential_of(account, options), **manners)

    def list(self, prefix: str) -> Iterator[RemoteFile]:
        for blob in self._client.list_blobs(name_starts_with=prefix):
            md5 = blob.content_settings.content_md5
            tag = f'"{str(blob.etag).strip(chr(34))}"'  # lists give it without its quotes
            yield RemoteFile(blob.name, blob.name, blob.size, tag, md5=bytes(md5).hex() if md5 else "")

    def checkable(self, file: RemoteFile) -> RemoteFile:
        return file

    def read(self, file: RemoteFile, start: int, count: int) -> bytes:
        found = self._client.download_blob(
            file.location, offset=start, length=count, etag=file.digest, match_condition=self._unchanged
        )
        return bytes(found.readall())


def credential_of(account: str, options: Mapping[str, str]) -> Any:
    """Return the credential that the options or the environment name; None for anonymous access. Raises InvalidRequest."""
    if "account_key" in options:
        return {"account_name": account, "account_key": options["account_key"]}
    if "sas_token" in options:
        return options["sas_token"]
    if "client_secret" in options:
        for name in ("tenant_id", "client_id"):
            if not options.get(name):
                raise InvalidRequest(f"az://{account}: client_secret is given without {name}", param="storage_params")
        try:
            from azure.identity import ClientSecretCredential
        except ImportError as error:
            raise missing_extra("azure", "azure-identity") from error
        return ClientSecretCredential(options["tenant_id"], options["client_id"], options["client_secret"])
    if options.get("anonymous", "").lower() in ("1", "true", "yes"):
        return None
    if (
        options.get("managed_identity", "").lower() in ("1", "true", "yes")
        or "client_id" in options
        or any(os.environ.get(name) for name in _IDENTITY)
    ):
        try:
            from azure.identity import DefaultAzureCredential
        except ImportError as error:
            raise missing_extra("azure", "azure-identity") from error
        chosen = {"managed_identity_client_id": options["client_id"]} if "client_id" in options else {}
        return DefaultAzureCredential(**chosen)
    return None
