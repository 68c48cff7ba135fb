"""The one exception for input that a person can put right, and how what others wrote is quoted in it."""


class InputError(ValueError):
    """Bad input, told in one line: the parameter, its value, and what would be right."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(" ".join(message.splitlines())))


def printable(text: str) -> str:
    """A text whose control characters are spelled out: names in data may not steer a terminal."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def reason(error: BaseException) -> str:
    """What another library says went wrong, short and in one line."""
    return " ".join(str(error).split())[:160] or type(error).__name__
