"""User-visible errors of every layer above the kernels."""


class InputError(ValueError):
    """A mistake in what the user gave: an option, a file or a tensor.

    The message is one line that gives the value, the rule and the fix. Commands print it to stderr and exit with 2; any
    other exception is a failure of ours and exits with 1.
    """
