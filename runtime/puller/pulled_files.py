"""Lists the files of a remote source, remembers the list for times when the source does not answer, and pulls the files into the disk cache."""

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path

import msgspec

from runtime.puller.cache import Cache, Held
from runtime.puller.download import pull
from runtime.puller.progress import PullJob
from runtime.puller.source import Listing, Source, Unreachable
from runtime.types import ModelSource

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PulledFiles:
    """The pulled files of one disk cache. Methods block.

    Attributes:
        min_rate_bytes: a pull that is slower than this many bytes per second for some time is given up; 0 = no limit.
    """

    cache: Cache
    min_rate_bytes: int

    def listing(self, place: Source, source: ModelSource, job: PullJob) -> Listing:
        """Return what the source lists now; if it does not answer, what it listed last. Raises Unreachable if it never did."""
        # One path may exist in two buckets, so the whole source is the name of what it listed.
        name = hashlib.blake2b(msgspec.json.encode(source, order="sorted"), digest_size=16).hexdigest()
        try:
            listing = place.listing(job)
        except Unreachable as error:
            remembered = self.cache.recall(name)
            if remembered is None:
                raise
            log.warning("%s; using what it listed before", error.message)
            return msgspec.json.decode(remembered, type=Listing)
        # a signature or a password in a URL is a secret, and notes are kept
        if not any("?" in file.location or "@" in file.location for file in listing.files):
            self.cache.remember(name, msgspec.json.encode(listing))
        return listing

    def pull(self, source: Source, listing: Listing, job: PullJob) -> Held:
        """Return the listed files, pulling those that are not in the cache."""

        def reserve(total_bytes: int) -> int:
            return self.cache.grow("pulled", listing.key, total_bytes, listing.origin)

        def fill(work: Path) -> None:
            pull(source, listing, work, job, reserve=reserve, min_bytes_per_s=self.min_rate_bytes)

        return self.cache.obtain("pulled", listing.key, listing.total_bytes, fill, job, listing.origin)
