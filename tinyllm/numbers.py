"""Numbers for people: a few digits and a unit; and what divides a batch."""

import math

PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def amount(value: float, unit: str = "") -> str:
    """1234567 as `1.23 M`, with a unit as `1.23 Mtokens`; 12 as `12`."""
    # 999.9 is 1 k: three digits of it are 1000.
    scale, prefix = next((pair for pair in PREFIXES if value >= 0.9995 * pair[0]), (1.0, ""))
    return f"{value / scale:.3g} {prefix}{unit}".rstrip()


def size_of(count: float) -> str:
    """Bytes as `1.23 GB` (10^9)."""
    return amount(count, "B")


def lasting(seconds: float) -> str:
    """Seconds as `24 ms`, `3.1 s`, `12 min`, `5.2 h`, `3.1 days`."""
    units = ((1.0, 1e-3, "ms"), (100.0, 1.0, "s"), (100 * 60.0, 60.0, "min"), (48 * 3600.0, 3600.0, "h"))
    scale, unit = next(((scale, unit) for limit, scale, unit in units if seconds < limit), (24 * 3600.0, "days"))
    value = seconds / scale
    return f"{value:.1f} {unit}" if value < 9.95 else f"{value:,.0f} {unit}"


def divisors(number: int) -> list[int]:
    """In ascending order."""
    low = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*low, *(number // d for d in low)})
