"""Names the sockets and files that a mesh and its Envoy share, and writes the files so that Envoy sees each change as a whole."""

import os
import stat
from dataclasses import dataclass
from pathlib import Path

from common.errors import ConfigError

_LONGEST_SOCKET = 107  # of sockaddr_un


@dataclass(frozen=True, slots=True)
class EnvoyFiles:
    """`directory` is the setting `envoy_dir`. Only the user of mesh and Envoy may enter it: its sockets trust who connects."""

    directory: Path

    @property
    def bootstrap(self) -> Path:
        return self.directory / "envoy.json"

    @property
    def mesh_settings(self) -> Path:
        """The merged settings of a mesh that `serve-mesh --envoy` starts."""
        return self.directory / "mesh.json"

    def routes(self, carrier: str) -> Path:
        return self.directory / f"{carrier}-routes.json"

    def secret(self, name: str) -> Path:
        """A certificate with its key, or an authority, which Envoy reads again when the file is replaced."""
        return self.directory / f"{name}.json"

    @property
    def control(self) -> str:
        return self._socket("control.sock")

    @property
    def admin(self) -> str:
        return self._socket("admin.sock")

    def mesh(self, carrier: str) -> str:
        return self._socket(f"mesh-{carrier}.sock")

    def _socket(self, name: str) -> str:
        return f"unix:{self.directory / name}"

    def make_directory(self) -> None:
        """Make the directory. Raises ConfigError if its path is too long for sockets or other users can write to it, OSError if it cannot be made."""
        if (longest := len(os.fsencode(self.mesh("grpc").removeprefix("unix:")))) > _LONGEST_SOCKET:
            raise ConfigError(
                f"envoy_dir {self.directory}: its sockets' paths have {longest} bytes; the limit is {_LONGEST_SOCKET}. Choose a shorter path"
            )
        self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = self.directory.stat()
        if status.st_uid not in (0, os.geteuid()) or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise ConfigError(
                f"envoy_dir {self.directory}: other users can write to it (owner {status.st_uid}, mode {stat.S_IMODE(status.st_mode):o}), "
                "so they could take the place of mesh or Envoy. Run `chmod 700` on it as the user of both, or choose another path"
            )


def write_whole(path: Path, text: str) -> bool:
    """Replace a file in one step unless it has the text already, and return whether it was replaced. Only this user can read it."""
    try:
        if path.read_text(encoding="utf-8") == text:
            return False
    except OSError:
        pass
    fresh = path.with_name(f".{path.name}.new")
    fresh.unlink(missing_ok=True)
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
    fresh.replace(path)
    return True
