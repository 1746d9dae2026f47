"""A byte of a checkpoint that has changed is found before anything is loaded."""

import pickle
import random

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import FileSystemReader

from momoe_titan.components.checkpoint import CheckpointError, read_metadata
from momoe_titan.components.checksums import (
    METADATA,
    METADATA_SUM,
    find_changed_bytes,
    metadata_has_changed,
    write_metadata_sum,
)

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")


def states():
    return {
        "weight": torch.arange(300, dtype=torch.float32).view(20, 15),
        "half": torch.ones(7, dtype=torch.bfloat16),
        "nothing": torch.empty(0),
        "state": {"step": 7, "position": b"x" * 50},
    }


@pytest.fixture
def folder(tmp_path):
    dcp.save(states(), checkpoint_id=tmp_path, no_dist=True)
    write_metadata_sum(str(tmp_path))
    return tmp_path


def find(folder, *args):
    return find_changed_bytes(str(folder), FileSystemReader(folder).read_metadata(), *args)


def load(folder):
    loaded = {k: torch.zeros_like(v) if torch.is_tensor(v) else v for k, v in states().items()}
    dcp.load(loaded, checkpoint_id=folder, no_dist=True)
    return loaded


def equal(a, b):
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def test_every_changed_byte_is_found_or_harms_nothing(folder):
    """What no sum covers are bytes that nobody reads: padding, times, names."""
    file = folder / "__0_0.distcp"
    whole = file.read_bytes()
    found = 0
    for at in random.sample(range(len(whole)), 300):
        changed = bytearray(whole)
        changed[at] ^= 1 << random.randrange(8)
        file.write_bytes(changed)
        if find(folder) is not None:
            found += 1
            continue
        got = load(folder)
        assert all(equal(got[key], want) for key, want in states().items()), at
    assert found > 100
    file.write_bytes(whole)
    assert find(folder) is None


def test_only_what_is_loaded_is_looked_at_and_ranks_share_it(folder):
    stored = FileSystemReader(folder).read_metadata().storage_data
    where = next(info for index, info in stored.items() if index.fqn == "weight")
    file = folder / where.relative_path
    data = bytearray(file.read_bytes())
    data[data.index(torch.tensor([17.0]).numpy().tobytes())] ^= 1
    file.write_bytes(data)
    assert "its bytes of weight in __0_0.distcp" in find(folder)
    assert find(folder, ["half", "state"]) is None
    assert find(folder, ["half", "weight"]) is not None
    found = [find(folder, None, rank, 3) for rank in range(3)]
    assert sum(fault is not None for fault in found) == 1


def test_a_file_that_is_gone_or_short_is_no_traceback(folder):
    file = folder / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:100])
    assert "BadZipFile" in find(folder) or "OSError" in find(folder)
    file.unlink()
    assert "FileNotFoundError" in find(folder)


def test_a_changed_metadata_is_never_unpickled(folder):
    class Evil:
        def __reduce__(self):
            return pytest.fail, ("unpickled",)

    (folder / METADATA).write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError, match="metadata.sha256"):
        read_metadata(str(folder))


def test_a_sum_that_was_not_written_to_its_end_is_none(folder, monkeypatch):
    (folder / METADATA_SUM).unlink()

    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_metadata_sum(str(folder))
    assert not metadata_has_changed(str(folder))


def test_the_sum_is_that_of_sha256sum_and_may_be_missing(folder):
    import hashlib

    text = (folder / METADATA_SUM).read_text()
    assert text == f"{hashlib.sha256((folder / METADATA).read_bytes()).hexdigest()}  .metadata\n"
    (folder / METADATA_SUM).unlink()  # as TorchTitan writes it
    assert read_metadata(str(folder)).storage_data
