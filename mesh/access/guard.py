"""Admits requests: recognises peers and keys, and checks the key's rights and limits. Both ports call it before they read a request's body."""

from collections.abc import Callable, Iterable

from mesh.access.caller import ANYBODY, PEER, set_caller
from mesh.access.key_table import KeyTable
from mesh.access.peer_keys import PeerKeys
from mesh.access.quota import Quotas
from mesh.access.scopes import INFERENCE, OPEN, Scopes
from mesh.errors import PermissionDenied, Unauthenticated


class Guard:
    def __init__(self, keys: KeyTable, peers: PeerKeys, quotas: Quotas | None = None) -> None:
        self._keys = keys
        self._peers = peers
        self._quotas = quotas or Quotas()

    @property
    def requires_keys(self) -> bool:
        return self._keys.is_required

    def admit_recognised(self, name: str) -> None:
        """Admit a request whose key Envoy has recognised, by the key's name. Raises Unauthenticated if the key has been removed since."""
        key = self._keys.named(name)
        if key is None:
            raise Unauthenticated(f"key {name} is not valid any more")
        set_caller(key.caller)

    def admit(self, secrets: Iterable[str], peer_key: str, needed: Scopes) -> Callable[[], None] | None:
        """Admit a request with the secrets that it carries, of which the first known one counts, and set the current task's caller.

        Returns the function to call once the request has ended, if there is one. Raises Unauthenticated, PermissionDenied, Overloaded.
        """
        if peer_key and self._peers.recognises(peer_key):
            set_caller(PEER)
            return None
        set_caller(ANYBODY)
        if not self._keys.is_required or needed == OPEN:
            return None
        key = self._keys.find_first(secrets)
        if key is None:
            raise Unauthenticated(
                "a valid API key is needed: send `Authorization: Bearer KEY`, or `x-api-key: KEY` over HTTP"
            )
        set_caller(key.caller)
        if key.scopes.isdisjoint(needed):
            raise PermissionDenied(
                f"key {key.name} has the scopes {', '.join(sorted(key.scopes))}; this needs {' or '.join(sorted(needed))}"
            )
        return self._quotas.begin(key) if needed == INFERENCE else None


def bearer_secret(authorization: str) -> str:
    """Return the secret of an Authorization header; empty if the header is of another kind."""
    scheme, _, secret = authorization.partition(" ")
    return secret.strip() if scheme.lower() == "bearer" else ""
