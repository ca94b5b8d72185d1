"""Small words of messages, and how often they are said."""

import time
from collections.abc import Callable

SECONDS_BETWEEN = 10.0


def now_and_then(say: Callable[[str], object]) -> Callable[[str], None]:
    """Says of what it is told only what comes SECONDS_BETWEEN after the last: for a log file, where lines stay and nobody waits."""
    said = time.monotonic()

    def tell(text: str) -> None:
        nonlocal said
        if (now := time.monotonic()) >= said + SECONDS_BETWEEN:
            said = now
            say(text)

    return tell


def counted(number: int, thing: str, things: str = "") -> str:
    """`1 row`, `2 rows`, `1,200 rows`; `things` where the plural is not made with an s."""
    return f"{number:,} {thing if number == 1 else things or thing + 's'}"


def gb(count: int) -> str:
    """Bytes in units of 10^9, or of 10^6 where that is less than a tenth of one."""
    return f"{count / 1e9:.1f} GB" if abs(count) >= 1e8 else f"{count / 1e6:.0f} MB"


def gb_enough(count: int) -> str:
    """The same, rounded up: so much is enough."""
    step = 10**8 if count >= 1e8 else 10**6
    return gb(-(-count // step) * step)


def gb_of(count: int, limit: int) -> str:
    """`24.1 GB of 24.0 GB`; with up to six digits where these would say the same of two that differ."""
    if gb(count) != gb(limit) or count == limit:
        return f"{gb(count)} of {gb(limit)}"
    digits = next((digits for digits in (2, 3) if round(count / 1e9, digits) != round(limit / 1e9, digits)), 6)
    return f"{count / 1e9:.{digits}f} GB of {limit / 1e9:.{digits}f} GB"
