"""User-visible errors of every layer above the kernels."""

_MAX_CHARACTERS = 1000


def first_line(error: BaseException) -> str:
    """What an error of another library says, its first line alone; its type where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


class InputError(ValueError):
    """A mistake in what the user gave: an option, a file or a tensor.

    The message is one line that gives the value, the rule and the fix. Commands print it to stderr and exit with 2; any
    other exception is a failure of ours and exits with 1. A value comes from a file that anybody may have written, so
    what would break the line is made visible, and what is too long is cut in its middle.

    Args:
        message: The line.
    """

    def __init__(self, message: str) -> None:
        super().__init__(_one_line(message))


def _one_line(message: str) -> str:
    # What other libraries say may have several lines; a control character may move the cursor.
    text = " ".join(line.strip() for line in message.splitlines())
    text = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
    if len(text) <= _MAX_CHARACTERS:
        return text
    half = _MAX_CHARACTERS // 2
    return f"{text[:half]} ... {text[-half:]}"
