"""The error of every room of this package."""


class DataError(ValueError):
    """Data or a tokenizer that the configuration names cannot be used.

    The message names the field of the configuration, the file and the reason.
    """
