"""Jobs' options are read in half of the time: what their help texts are made of is looked for once a process.

The reader of the command line (tyro) looks for the source of each class anew in each reading. For the section that
TorchTitan puts together when it reads a job there is none, and the whole file is parsed again for each of its fields.
"""

from tyro import _docstrings


def read_sources_once() -> None:
    """Make it so for this process."""
    tokens_of = getattr(_docstrings, "_ClassTokenization", None)
    if tokens_of is None or not hasattr(tokens_of, "make"):
        return  # in another version
    make, known = tokens_of.make, {}

    def once(cls):
        if cls not in known:
            try:
                known[cls] = make(cls), None
            except (OSError, TypeError) as e:  # no source
                known[cls] = None, e
        found, error = known[cls]
        if error is not None:
            raise error
        return found

    tokens_of.make = staticmethod(once)
