"""Numbers and names as a person reads them, in the terminal, on a page and in Markdown."""

import math
import re


def count(value: float) -> str:
    """A number of things in a few characters.

    >>> count(576), count(134_515_008), count(6_738_415_616)
    ('576', '134.5 M', '6.74 B')
    """
    for unit, scale, digits in ((" B", 1e9, 2), (" M", 1e6, 1), (" K", 1e3, 1)):
        if value >= scale:
            return f"{value / scale:.{digits}f}{unit}"
    return f"{value:,.0f}"


def size(value: float) -> str:
    """Bytes in decimal units.

    >>> size(538_060_032), size(900)
    ('538.1 MB', '900 bytes')
    """
    for unit, scale, digits in (("TB", 1e12, 2), ("GB", 1e9, 2), ("MB", 1e6, 1), ("kB", 1e3, 1)):
        if value >= scale:
            return f"{value / scale:.{digits}f} {unit}"
    return f"{value:.0f} bytes"


def percent(fraction: float) -> str:
    """A fraction in per cent, with a digit after the point below ten.

    >>> percent(0.84), percent(0.0712)
    ('84 %', '7.1 %')
    """
    return f"{100 * fraction:.{1 if abs(fraction) < 0.0995 else 0}f} %"


def number(value: float) -> str:
    """Three significant digits, thousands in full.

    >>> number(17.0), number(0.03124), number(99.96), number(12345.6)
    ('17.0', '0.0312', '100', '12,346')
    """
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:#.3g}".rstrip(".")


def measured(value: float, error: float | None, unit: str = "") -> str:
    """A value with its standard error, to two digits of the error; the value alone where no error is known.

    >>> measured(0.21344, 0.00312), measured(0.52, None), measured(81.2, 0.41, " %"), measured(3.72e-7, 8e-8)
    ('0.2134 ± 0.0031', '0.520', '81.20 ± 0.41 %', '3.7e-07 ± 8e-08')
    """
    if error is None or not (0 < error < math.inf):
        return number(value) + unit
    if max(abs(value), error) < 1e-4:
        return f"{value:.1e} ± {error:.0e}{unit}"
    digits = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:.{digits}f} ± {error:.{digits}f}{unit}"


def duration(seconds: float) -> str:
    """Seconds as a person says them.

    >>> duration(7.25), duration(421), duration(7300)
    ('7.2 s', '7 min 01 s', '2 h 01 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def markdown(text: object) -> str:
    """Text that Markdown shows as it is, on one line, in a table cell too.

    >>> markdown("a|b_c <i>")
    'a\\\\|b\\\\_c &lt;i&gt;'
    """
    plain = " ".join(str(text).split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|#~])", r"\\\1", plain)


def fenced(text: str, language: str = "") -> str:
    """`text` as a code block, in a fence longer than any run of backticks within."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def unbroken(text: str) -> str:
    """`text` with no line break between a figure and its unit.

    >>> unbroken("71 % of 134.5 M parameters")
    '71\\xa0% of 134.5\\xa0M parameters'
    """
    return re.sub(r"(?<=\d) (?=(?:%|[KMB]|[kMG]B|bytes|s|min|h)(?!\w))", "\u00a0", text)
