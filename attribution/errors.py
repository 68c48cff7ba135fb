"""The one exception for input that a person can put right."""


class InputError(ValueError):
    """Bad input, told in one line: the parameter, its value, and what would be right."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))
