"""Every random stream by its address: nothing random is kept, all of it is derived from the run's seed."""

import hashlib


def derive_seed(seed: int, *address: str | int) -> int:
    """A seed of 32 bits for one random stream: the same for the same run seed and address, whatever else is drawn."""
    text = "\0".join(str(part) for part in (seed, *address))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
