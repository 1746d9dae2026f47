"""Jobs' options are read in half of the time: what their help texts are made of is looked for once a process.

The reader of the command line (tyro) looks for the source of each class anew in each reading. For the section that
TorchTitan puts together when it reads a job there is none, and the whole file is parsed again for each of its fields.
"""

try:
    from tyro._docstrings import _ClassTokenization
except ImportError:  # another version
    _ClassTokenization = None


def read_sources_once() -> None:
    """Make it so for this process."""
    if _ClassTokenization is None or not hasattr(_ClassTokenization, "make"):
        return
    make, known = _ClassTokenization.make, {}

    def once(cls):
        if cls not in known:
            try:
                known[cls] = make(cls), None
            except (OSError, TypeError) as e:  # no source
                known[cls] = None, e
        found, error = known[cls]
        if error is not None:
            raise error.with_traceback(None)  # or it would grow by each raise
        return found

    _ClassTokenization.make = staticmethod(once)
