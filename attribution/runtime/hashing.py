"""Independent random seeds and short cache keys, both from hashes."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def derive_seed(root: int, *path: str | int) -> int:
    """An independent seed for each path, such as ('retrain', 3); 31 bits."""
    text = "/".join(map(str, (root, *path)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big") >> 1


def digest(*parts: Any) -> str:
    """A hash of JSON-like values, 32 hexadecimal digits."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
