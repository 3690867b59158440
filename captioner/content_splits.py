"""Splits of images that come without: each image's follows from its content, on every machine and in any order."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from captioner.errors import InputError

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class ContentSplit:
    """Which split an image falls into, by a hash of its file's bytes.

    A number from 0 to 1 is made of the first eight bytes of SHA-256("seed:" and the SHA-256 of the file), with the seed
    in decimal digits. Images below the first share are for training, those below the sum of the first two for
    validation, the others for the test. So an image stays in its split when others come or go, when it is renamed and
    on another machine, and copies of one file never fall into two splits.

    Parameters
    ----------
    shares : sequence of float
        Of "train", "val" and "test", about: their sum is 1.
    seed : int
        Another one gives another split.

    Raises
    ------
    InputError
        Where the shares are none.
    """

    shares: tuple[float, float, float] = (0.8, 0.1, 0.1)
    seed: int = 0

    def __post_init__(self) -> None:
        shares = tuple(self.shares)
        if len(shares) != 3 or not all(share >= 0 for share in shares) or not math.isclose(sum(shares), 1):
            raise InputError(
                f"data.files.shares is {list(shares)}: give those of train, val and test, which together make 1, such "
                "as [0.8, 0.1, 0.1]."
            )

    def of(self, digest: bytes) -> str:
        """Return the split of an image whose file has this SHA-256."""
        number = int.from_bytes(hashlib.sha256(b"%d:%b" % (self.seed, digest)).digest()[:8]) / 2**64
        train, val, _ = self.shares
        return SPLITS[(number >= train) + (number >= train + val)]


def digest_of(path: Path) -> bytes | None:
    """Return the SHA-256 of a file, or None where it cannot be read."""
    if not os.path.isfile(path):  # a device may have no end
        return None
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError:
        return None


def digests_of(paths: Sequence[Path]) -> list[bytes | None]:
    """Return the SHA-256 of each file; threads read several at a time."""
    with ThreadPoolExecutor() as pool:  # reading and hashing go on outside the interpreter's lock
        return list(pool.map(digest_of, paths))
