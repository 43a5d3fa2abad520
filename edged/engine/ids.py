"""ULIDs: ids that sort by time (https://github.com/ulid/spec)."""

from __future__ import annotations

import secrets
from datetime import datetime

_ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"


def ulid(now: datetime) -> str:
    """26 characters: 48 bits of milliseconds, 80 random bits, in Crockford's base 32."""
    number = int(now.timestamp() * 1000) << 80 | secrets.randbits(80)
    return "".join(_ALPHABET[number >> shift & 31] for shift in range(125, -1, -5))
