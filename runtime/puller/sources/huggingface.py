"""Lists models of the Hugging Face hub, or of a mirror (HF_ENDPOINT), with the hub's library. Files are fetched by HttpClient, which can be cancelled."""

import os
import urllib.parse
from pathlib import Path

from runtime.errors import InvalidRequest, LoadFailed
from runtime.puller.progress import PullJob
from runtime.puller.source import Arrived, Listing, RemoteFile, Unreachable, checked_name, refuse_split, wanted
from runtime.puller.sources.destinations import Destinations
from runtime.puller.sources.http_client import AGAIN, HttpClient


class HubSource:
    """`hf://owner/name[:revision | @revision][/file.gguf]`. `token` None = HF_TOKEN or what the hub's own tools have stored."""

    def __init__(
        self,
        reference: str,
        token: str | None,
        *,
        allow_pickle: bool,
        destinations: Destinations,
    ) -> None:
        parts = reference.strip("/").split("/")
        if len(parts) not in (2, 3) or not all(parts):
            raise InvalidRequest(
                f"hf://{reference}: owner/name is needed, with :revision if not the main one", param="modelPath"
            )
        name, separator, revision = parts[1].partition("@" if "@" in parts[1] else ":")
        if not name or (separator and not revision):
            raise InvalidRequest(f"hf://{reference}: the revision is empty", param="modelPath")
        self._repo = f"{parts[0]}/{name}"
        self._revision = revision or "main"
        self._file = parts[2] if len(parts) == 3 else None
        self._token = token
        self._allow_pickle = allow_pickle
        self._destinations = destinations
        self._client = HttpClient()

    def listing(self, job: PullJob) -> Listing:
        from huggingface_hub import HfApi, constants, get_token, hf_hub_url
        from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

        origin = f"hf://{self._repo}@{self._revision}"
        endpoint = (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
        try:
            info = HfApi(endpoint=endpoint, token=self._token).model_info(
                self._repo, revision=self._revision, files_metadata=True, timeout=30
            )
        except RevisionNotFoundError as error:
            raise LoadFailed(f"{origin}: the repository has no revision {self._revision!r}") from error
        except RepositoryNotFoundError as error:
            raise LoadFailed(
                f"{origin}: no such repository, or it is private or gated and HF_TOKEN gives no access"
            ) from error
        except (HfHubHTTPError, OSError, ValueError) as error:
            first_line, *_ = str(error).splitlines() or [""]
            # If the hub is offline or failing, the last listing still holds.
            status = error.response.status_code if isinstance(error, HfHubHTTPError) else 0
            if status in (401, 403):
                raise LoadFailed(
                    f"{origin}: the hub refuses access ({status}); is HF_TOKEN, or the storage's token, the right one?"
                ) from error
            away = status in AGAIN or isinstance(error, ConnectionError | TimeoutError)
            raise (Unreachable if away else LoadFailed)(
                f"{origin}: the hub's answer cannot be used: {type(error).__name__}: {first_line}"
            ) from error
        except (
            Exception
        ) as error:  # The library's HTTP client has exceptions of its own, which change with its major versions.
            raise Unreachable(f"{origin}: the hub cannot be reached: {type(error).__name__}") from error
        token = self._token or get_token()
        # The operator chose the endpoint, which may be a mirror in the private network.
        self._client = HttpClient(
            {"Authorization": f"Bearer {token}"} if token else {},
            destinations=self._destinations.trusting(urllib.parse.urlsplit(endpoint).hostname or ""),
        )
        files = [
            RemoteFile(
                checked_name(sibling.rfilename, origin),
                hf_hub_url(self._repo, sibling.rfilename, revision=info.sha, endpoint=endpoint),
                -1 if sibling.size is None else sibling.size,
                sibling.blob_id or "",
                sibling.lfs.sha256 if sibling.lfs is not None else "",
            )
            for sibling in info.siblings or []
        ]
        if self._file is not None:
            refuse_split(self._file, origin)
            chosen = [file for file in files if file.name == self._file]
            if not chosen:
                raise LoadFailed(f"{origin} has no file {self._file}")
            return Listing(f"hf://{self._repo}@{info.sha}/{self._file}", chosen)
        return Listing(f"hf://{self._repo}@{info.sha}", wanted(files, origin, allow_pickle=self._allow_pickle))

    def fetch(self, file: RemoteFile, target: Path, job: PullJob, arrived: Arrived) -> None:
        self._client.fetch(file, target, job, arrived)

    def read(self, file: RemoteFile, start: int, count: int, job: PullJob) -> bytes:
        return self._client.read(file.location, start, count, job)
