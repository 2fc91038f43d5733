"""Compact text encoding of per-document values: one bit each if all are 0 or 1, else eight bytes.

Otherwise the values of thousands of documents per evaluation would make up most of an archive.
"""

from __future__ import annotations

import base64
import binascii
import math
import struct
from collections.abc import Sequence

_NUMBERS = (0.0, 1.0)


def encode(values: Sequence[float]) -> str:
    """ "bits:COUNT:BASE64" if all values are 0 or 1, else "float64:BASE64" (little-endian).

    No values give the empty string.
    """
    if not values:
        return ""
    if all(value in _NUMBERS for value in values):
        bits = "".join("1" if value else "0" for value in values)
        data = int(bits, 2).to_bytes((len(bits) + 7) // 8, "big")
        return f"bits:{len(bits)}:{base64.b64encode(data).decode()}"
    return f"float64:{base64.b64encode(struct.pack(f'<{len(values)}d', *values)).decode()}"


def decode(text: str) -> tuple[float, ...]:
    """Decodes what `encode` wrote.

    Raises:
        ValueError: it is not such a text, or a number in it is not finite.
    """
    if not text:
        return ()
    kind, _, rest = text.partition(":")
    if kind == "bits":
        digits, _, rest = rest.partition(":")
        data = _bytes(rest)
        if not digits.isascii() or not digits.isdigit() or len(digits) > 18:
            raise ValueError("the count is not a number")
        count = int(digits)
        number = int.from_bytes(data, "big")
        if count == 0 or (count + 7) // 8 != len(data) or number >> count:
            raise ValueError("bits and their count differ")
        return tuple(_NUMBERS[bit == "1"] for bit in f"{number:0{count}b}")
    if kind == "float64":
        data = _bytes(rest)
        if not data or len(data) % 8:
            raise ValueError("the bytes are not float64 numbers")
        values = struct.unpack(f"<{len(data) // 8}d", data)
        if not all(map(math.isfinite, values)):
            raise ValueError("a number is not finite")
        return values
    raise ValueError("values of an unknown kind")


def _bytes(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError("not base64") from error
