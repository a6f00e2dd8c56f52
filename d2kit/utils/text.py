"""The gate for text of others: class names, file names, captions, messages.

Such text may hold line breaks, escape sequences of a terminal, ``=cmd``, ``../`` or half a
character. It passes one of these functions before it reaches a path, terminal, log, CSV, XML, HTML
or font. In memory and in JSON names stay as they are; what a file cannot hold is written so that it
can be read back (`csv_cell` with `from_csv_cell`, `one_line` and `xml_chars` with `from_one_line`),
or stays distinct (`file_name`).
"""

import hashlib
import html
import re
import unicodedata

__all__ = [
    "csv_cell",
    "drawn",
    "file_name",
    "from_csv_cell",
    "from_one_line",
    "html_text",
    "one_line",
    "text_of",
    "xml_chars",
]

LONGEST_LINE = 400  # characters of a name or message of others in a line of a log
LONGEST_NAME = 120  # bytes of a file name made from text; file systems allow 255, with suffixes
FORMULA = ("=", "+", "-", "@", "\t", "\r", "＝", "＋", "－", "＠")  # as spreadsheets read them
_SHORT = {"\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t"}
_LONG = {short: char for char, short in _SHORT.items()}
# Patterns are text, compiled at the first use: it costs 6 ms, of every import of the library.
_ESCAPED = r"\\(?:\\|[nrt]|x[0-9a-f]{2}|u[0-9a-f]{4}|U[0-9a-f]{8})"
# Control, half of a pair, not assigned; line and paragraph separators. Of the format characters
# only those that turn the direction of a line: joiners are part of scripts and emoji.
_UNSEEN = ("Cc", "Cs", "Cn", "Zl", "Zp")
_TURNING = frozenset("\u061c\u200e\u200f\ufeff") | {
    chr(code) for low, high in ((0x202A, 0x202E), (0x2066, 0x2069)) for code in range(low, high + 1)
}
_RESERVED = r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?"  # devices of Windows
_NOT_IN_XML = "[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]"


def _visible(char: str) -> str:
    """Return a character that is not printed as an escape of Python."""
    code = ord(char)
    short = _SHORT.get(char)
    if short is not None:
        return short
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _is_seen(char: str) -> bool:
    return unicodedata.category(char) not in _UNSEEN and char not in _TURNING


def one_line(text: object, limit: int | None = LONGEST_LINE, *, shown: bool = False) -> str:
    r"""Return text as one line that a terminal shows as it is: ``a\nb`` for a line break.

    Letters of every script, joiners and emoji stay. A backslash is doubled only where the text
    would otherwise be read back as something else, so that paths of Windows stay readable.

    Args:
        text: anything; ``str()`` of it counts.
        limit: characters; longer text is cut, with the number of those left out. None: no limit.
        shown: for reading only: tabs and backslashes stay as they are.

    Returns:
        The line, without a line break.
    """
    raw = str(text)
    if limit is not None and len(raw) > limit:
        raw, cut = raw[:limit], f"... ({len(raw) - limit:,} more characters)"
    else:
        cut = ""
    if raw.isascii() and raw.isprintable() and "\\" not in raw:
        return raw + cut
    if shown:
        return "".join(c if c == "\t" or _is_seen(c) else _visible(c) for c in raw) + cut
    line = "".join(char if _is_seen(char) else _visible(char) for char in raw)
    if from_one_line(line) != raw:
        line = "".join(c if c != "\\" and _is_seen(c) else _visible(c) for c in raw)
    return line + cut


def text_of(error: BaseException) -> str:
    """Return the text of an exception, which a class of others may fail to make."""
    try:
        return str(error)
    except Exception:
        return "(its text cannot be made)"


def from_one_line(line: str) -> str:
    """Return the text of which `one_line` without a limit, or `xml_chars`, made `line`."""
    return re.sub(_ESCAPED, lambda found: _unescaped(found.group()), line)


def _unescaped(escape: str) -> str:
    return _LONG.get(escape) or chr(int(escape[2:], 16))


def drawn(text: object, limit: int = 80) -> str:
    """Return text for a font: `one_line`, cut to a length that a picture can hold.

    Args:
        text: anything; ``str()`` of it counts.
        limit: characters.
    """
    line = one_line(text, None)
    return line if len(line) <= limit else line[: limit - 1] + "…"


def file_name(text: object, limit: int = LONGEST_NAME) -> str:
    """Return text as the name of one file or folder, on Linux, macOS and Windows.

    Text that is a sound name stays as it is. Elsewhere separators, control characters, ``:*?"<>|``,
    dots and blanks at an end become ``_`` and the first 8 digits of the text's SHA-256 are
    appended, so that different texts keep different names.

    Args:
        text: anything; ``str()`` of it counts.
        limit: bytes of the name in UTF-8, at least 24; append a suffix afterwards.

    Returns:
        A name without a folder, never empty, ``.`` or ``..``.

    Raises:
        ValueError: if `limit` is below 24.
    """
    if limit < 24:
        raise ValueError(f"file_name: limit must be at least 24 bytes, got {limit}")
    raw = str(text)
    name = "".join("_" if c in '/\\:*?"<>|' or not _is_seen(c) else c for c in raw)
    name = name.strip(" .")
    if name and name == raw and len(name.encode()) <= limit and not re.fullmatch(_RESERVED, name):
        return name
    digest = hashlib.sha256(raw.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    head = name.encode()[: limit - 9].decode("utf-8", "ignore")
    return f"{head or 'name'}_{digest}"


def csv_cell(text: object) -> str:
    r"""Return text as a cell of a CSV that no spreadsheet takes for a formula.

    Args:
        text: a name; numbers are written as numbers and need no gate.

    Returns:
        `one_line` of it, behind ``'`` where it begins with ``= + - @`` or ``'``.
    """
    line = one_line(text, None)
    return f"'{line}" if line.startswith((*FORMULA, "'")) else line


def from_csv_cell(cell: str) -> str:
    """Return the text of which `csv_cell` made a cell."""
    return from_one_line(cell[1:] if cell.startswith("'") else cell)


def xml_chars(text: object) -> str:
    r"""Return text with characters that XML 1.0 forbids as escapes: ``\x1b``.

    The writer (ElementTree) still replaces ``< & "``.

    Args:
        text: anything; ``str()`` of it counts.
    """
    raw = str(text)
    if raw.isprintable() and not re.search(_NOT_IN_XML, raw) and not re.search(_ESCAPED, raw):
        return raw
    return one_line(raw, None)


def html_text(text: object, limit: int | None = LONGEST_LINE) -> str:
    """Return text for the inside of an HTML element or of a quoted attribute.

    Args:
        text: anything; ``str()`` of it counts.
        limit: characters, see `one_line`.
    """
    return html.escape(one_line(text, limit), quote=True)
