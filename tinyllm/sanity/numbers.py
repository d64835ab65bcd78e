"""Numbers for people: a few digits and a unit."""


def amount(value: float) -> str:
    """1234567 as `1.23 M`, 12 as `12 `: a unit may follow."""
    for scale, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value:.3g} "


def size_of(count: float) -> str:
    """Bytes as `1.23 GB` (10^9)."""
    return f"{amount(count)}B"


def lasting(seconds: float) -> str:
    """Seconds as `24 ms`, `3.1 s`, `12 min`, `5.2 h`, `3.1 days`."""
    units = ((1.0, 1e-3, "ms"), (100.0, 1.0, "s"), (100 * 60.0, 60.0, "min"), (48 * 3600.0, 3600.0, "h"))
    scale, unit = next(((scale, unit) for limit, scale, unit in units if seconds < limit), (24 * 3600.0, "days"))
    value = seconds / scale
    return f"{value:.1f} {unit}" if value < 9.95 else f"{value:,.0f} {unit}"
