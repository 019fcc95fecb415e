"""Derive every random stream from the run's seed and the stream's address; no random state is stored."""

import hashlib


def derive_seed(seed: int, *address: str | int) -> int:
    """A seed of 32 bits for one random stream: the same for the same run seed and address, whatever else is drawn."""
    text = "\0".join(str(part) for part in (seed, *address))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
