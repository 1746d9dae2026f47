"""`DataError`, which everything in this folder raises for bad data."""


class DataError(ValueError):
    """Data or a tokenizer that the configuration names cannot be used.

    The message names the field of the configuration, the file and the reason.
    """
