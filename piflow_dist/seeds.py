"""Seeds of generators that depend on what they are for, and on no order in which anything is drawn."""

import hashlib


def seed_from(*parts: int | str) -> int:
    """A 63-bit seed that differs wherever any part does."""
    digest = hashlib.blake2b(",".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
