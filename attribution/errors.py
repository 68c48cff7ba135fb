"""The exception for input that the user can correct, and how texts from elsewhere appear in messages."""

import re
from pathlib import Path

# A secret of a URL, between `start` and what follows it.
_SECRETS = [
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"(?P<start>://)[^\s/]+(?=@)",  # user and password
        r"(?P<start>://)[^\s/:@]*:(?!\d+/)((?!://)[^\s@])+(?=@)",  # with slashes; not a port
        # percent-encoded, also more than once
        r"(?P<start>%(?P<level>(25)*)3A(%(?P=level)2F){2})((?!%(?P=level)2F)[^\s/&])+(?=%(?P=level)40)",
        r"(?P<start>[?&][\w.-]*(password|token|secret|signature|credential|sig)=)[^&\s'\"]+",
    )
]


class InputError(ValueError):
    """Bad input, reported in one line: the parameter, its value, and what would be right."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(redact(" ".join(message.splitlines()))))


def redact(text: str) -> str:
    """Replace the credentials of every URL in a text by `***`: `scheme://***@host`."""
    for pattern in _SECRETS:
        text = pattern.sub(r"\g<start>***", text)
    return text


def printable(text: str) -> str:
    """Spell out control characters, so that names in data cannot steer a terminal."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def reason(error: BaseException) -> str:
    """The message of another library's error, shortened to one line, without credentials."""
    return redact(" ".join(str(error).split()))[:160] or type(error).__name__


class StoreFailure(Exception):
    """The tracking store or a disk failed.

    Attributes:
        kept: the folder with the work that is finished.
    """

    def __init__(self, reason: str, kept: Path) -> None:
        super().__init__(reason)
        self.kept = kept
