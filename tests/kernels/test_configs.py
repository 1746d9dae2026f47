import json
import os
import re
import subprocess
import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from momoe_titan.kernels import gemms, gpu, versions
from momoe_titan.kernels import launch as tiling
from momoe_titan.kernels.experts import Experts
from momoe_titan.kernels.hopper import launch as hopper
from momoe_titan.kernels.portable import configs
from momoe_titan.kernels.portable.configs import KERNELS, TileConfig

GPU = "Some GPU"
KEY = configs.cache_key(torch.bfloat16, 1536, 256)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MOMOE_TITAN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(gpu, "device_properties", lambda device: ((9, 0), GPU))
    monkeypatch.setattr(gpu, "interpreting", lambda: False)
    configs._tuned.cache_clear()
    yield
    configs._tuned.cache_clear()


def tiles(d_model=1536, ffn=256, dtype=torch.bfloat16):
    return configs.tile_configs(torch.empty(1, d_model, dtype=dtype), ffn)


def test_tuned_tiles_persist_for_their_bucket_only():
    built_in = tiles()
    tuned = dict(built_in, down_proj=TileConfig(128, 64, 32, 4, 3))
    assert configs.save_tuned(GPU, KEY, tuned)
    other = configs.cache_key(torch.bfloat16, 2048, 1024)
    assert configs.save_tuned(GPU, other, built_in)  # keeps what is there
    assert tiles() == tuned
    assert tiles(ffn=512) == built_in
    assert set(json.loads(configs.cache_path(GPU).read_text())) == {KEY, other}


@pytest.mark.parametrize(
    "content",
    ["{", "[]", json.dumps({KEY: {"up_proj": {}}}), json.dumps({KEY: 3}), "\x00"],
    ids=["truncated", "a_list", "fields_missing", "a_number", "binary"],
)
def test_a_corrupt_cache_warns_once_and_changes_nothing(content):
    built_in = tiles()
    configs._tuned.cache_clear()
    path = configs.cache_path(GPU)
    path.parent.mkdir()
    path.write_text(content)
    with pytest.warns(UserWarning, match="is not usable .* using the built-in tiles"):
        assert tiles() == built_in
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tiles() == built_in
    assert path.read_text() == content


def test_row_tiled_kernels_must_share_their_rows():
    bad = {name: asdict(config) for name, config in tiles().items()}
    bad["down_proj"]["block_m"] = 64
    path = configs.cache_path(GPU)
    path.parent.mkdir()
    path.write_text(json.dumps({KEY: bad}))
    configs._tuned.cache_clear()
    with pytest.warns(UserWarning, match="block_m of the row-tiled kernels must be 128"):
        assert tiles()["down_proj"].block_m == 128


def test_an_unwritable_cache_warns(tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    configs._tuned.cache_clear()
    with pytest.warns(UserWarning, match="can't be written"):
        assert not configs.save_tuned(GPU, KEY, dict.fromkeys(KERNELS, TileConfig(128, 64, 32, 4, 3)))


@pytest.mark.parametrize(
    "d_model, ffn, dtype", [(600, 256, torch.bfloat16), (1536, 97, torch.bfloat16), (512, 512, torch.float32)]
)
def test_small_tiles_for_odd_widths_and_float32(d_model, ffn, dtype):
    assert tiles(d_model, ffn, dtype)["down_proj"].block_n < tiles()["down_proj"].block_n


def test_the_portable_path_says_so_once(monkeypatch, caplog):
    monkeypatch.setattr(versions, "TRITON", (3, 6))
    gemms._say_portable.cache_clear()
    x = SimpleNamespace(device=torch.device("cuda:0"), dtype=torch.bfloat16, shape=(4, 1536), is_cuda=True)
    experts = Experts(torch.empty(1, 1536, 512), torch.empty(1, 256, 1536))
    with caplog.at_level("INFO"):
        assert isinstance(gemms.select_gemms(x, experts), gemms.HopperGemms)
        assert caplog.records == []
        for capability in ((8, 0), (8, 9), (10, 0)):
            monkeypatch.setattr(gpu, "device_properties", lambda device, capability=capability: (capability, GPU))
            for _ in range(2):
                assert isinstance(gemms.select_gemms(x, experts), gemms.PortableGemms)
    (record,) = caplog.records
    assert "portable Triton kernels on Some GPU for torch.bfloat16, D = 1536, F = 256" in record.getMessage()


def test_a_release_without_hopper_kernels_says_so_once(monkeypatch, caplog):
    monkeypatch.setattr(versions, "TRITON", (3, 9))
    gemms._say_portable.cache_clear()
    versions.warn_of_release.cache_clear()
    x = SimpleNamespace(device=torch.device("cuda:0"), dtype=torch.bfloat16, shape=(4, 1536), is_cuda=True)
    experts = Experts(torch.empty(1, 1536, 512), torch.empty(1, 256, 1536))
    with caplog.at_level("WARNING"):
        for _ in range(2):
            assert isinstance(gemms.select_gemms(x, experts), gemms.PortableGemms)
    (record,) = caplog.records
    assert "Hopper kernels are not used under Triton" in record.getMessage()
    assert "3.6 and 3.7" in record.getMessage() and "MOMOE_TITAN_ANY_TRITON=1" in record.getMessage()
    caplog.clear()
    monkeypatch.setenv(versions.ANY_RELEASE, "1")
    assert isinstance(gemms.select_gemms(x, experts), gemms.HopperGemms)
    monkeypatch.delenv(versions.ANY_RELEASE)
    monkeypatch.setattr(gpu, "device_properties", lambda device: ((10, 0), GPU))  # no release has them there
    versions.warn_of_release.cache_clear()
    gemms.select_gemms(x, experts)
    assert caplog.records == []


class OnlyWithGoodCache:
    """Stands for a kernel: fails until Triton's cache is another folder than the one it started with."""

    def __init__(self, error):
        self.error, self.bad, self.launches, self.device_caches = error, tiling.triton.knobs.cache.dir, [], {0: "stale"}

    def __getitem__(self, grid):
        def run(*args, **options):
            if tiling.triton.knobs.cache.dir == self.bad:
                raise self.error
            self.launches.append((grid, args, options))

        return run


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(13, "Permission denied"),
        NotADirectoryError(20, "Not a directory"),
        json.JSONDecodeError("Expecting value", "", 0),
        RuntimeError("Triton Error [CUDA]: device kernel image is invalid"),
    ],
    ids=lambda e: type(e).__name__,
)
def test_a_broken_triton_cache_is_replaced(error, monkeypatch):
    monkeypatch.setattr(tiling.triton.knobs.cache, "dir", "/somewhere/broken")
    kernel = OnlyWithGoodCache(error)
    with pytest.warns(UserWarning, match="/somewhere/broken is not usable"):
        tiling.launch(kernel, (3,), 1, BLOCK=2)
    assert kernel.launches == [((3,), (1,), {"BLOCK": 2})] and kernel.device_caches == {}
    tiling.launch(kernel, (4,), 1)
    tiling.launch(kernel, (0, 4), 1)
    assert len(kernel.launches) == 2


def test_a_compiled_kernel_is_found_by_no_less_than_triton_compiles_for():
    from triton._C.libtriton import native_specialize_impl
    from triton.backends.nvidia.compiler import CUDABackend

    args = [sign * (1 << bits) + more for sign in (1, -1) for bits in (0, 4, 31, 62, 63) for more in (-1, 0, 1, 16)]
    args = [*(arg for arg in args if -(2**63) <= arg < 2**64), None]
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.int32, torch.int64):
        base = torch.empty(4096, dtype=dtype)
        args += base, base[1:], torch.nn.Parameter(base, requires_grad=False)
    tensor = torch.empty(256, 256, dtype=torch.bfloat16)
    for t in (tensor, tensor.half()):
        args += (
            hopper._block(t, 256, 256, 64, 64),
            hopper._block(t, 256, 256, 64, 128),
            hopper._block(t, 256, 256, 256, 64),
        )
        args += (
            hopper._ragged_block(t, 256),
            hopper._ragged_block(t, 256, 64, 256),
            hopper._z_blocks(t, Experts(t[None], t[None, :128])),
        )
    kinds = {}
    for arg in args:
        kinds.setdefault(tuple(tiling._specialisation([arg])), set()).add(
            native_specialize_impl(CUDABackend, arg, False, True, True)
        )
    assert max(len(theirs) for theirs in kinds.values()) == 1
    assert len(kinds) > 20


def test_partial_sums_of_the_hopper_path_have_a_row_for_each_slot(monkeypatch):
    given = []
    monkeypatch.setattr(hopper, "down_proj_backward", lambda *args: given.append(args[-1]))
    z_RZ, experts = torch.empty(70, 128), SimpleNamespace(ffn=64, bias1=None)
    sums, _ = gemms.HopperGemms().down_proj_backward(torch.empty(35, 16), experts, None, z_RZ, z_RZ, None)
    assert sums is given[0] and sums.shape == (70, hopper.dscore_parts(64))


def test_other_errors_of_a_launch_are_not_hidden():
    with pytest.raises(RuntimeError, match="out of memory"):
        tiling.launch(OnlyWithGoodCache(RuntimeError("out of memory")), (3,))


@pytest.mark.gpu
def test_runs_without_a_usable_triton_cache(tmp_path):
    (tmp_path / "file").write_text("")
    code = (
        "import torch; from momoe_titan.kernels import momoe_mlp;"
        "x = torch.randn(64, 64, device='cuda', dtype=torch.bfloat16);"
        "w1 = torch.randn(4, 64, 128, device='cuda', dtype=torch.bfloat16);"
        "w2 = torch.randn(4, 64, 64, device='cuda', dtype=torch.bfloat16);"
        "ids = torch.rand(64, 4, device='cuda').topk(2)[1];"
        "print(momoe_mlp(x, w1, w2, ids, torch.rand(64, 2, device='cuda'))[0].isfinite().all().item())"
    )
    env = os.environ | {
        "TRITON_CACHE_DIR": str(tmp_path / "file" / "cache"),
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    run = subprocess.run([sys.executable, "-W", "always", "-c", code], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.strip() == "True" and "is not usable" in run.stderr


def test_a_tile_that_runs_out_of_memory_is_skipped(monkeypatch, capsys):
    from momoe_titan.kernels import tune

    fits, does_not = configs.TileConfig(64, 64, 64, 4, 3), configs.TileConfig(64, 64, 64, 4, 4)

    def call(config):
        if config == does_not:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(tune, "do_bench", lambda run, **options: run() or 0.5)
    assert tune.times_of("down_proj", call, [fits, does_not, fits]) == {fits: 0.5}
    assert "skipped (OutOfMemoryError)" in capsys.readouterr().out


def test_training_never_tunes():
    """So that no rank makes the others wait in a collective: only the command imports what tunes."""
    package = Path(configs.__file__).parents[2]
    tuning = [path for path in package.rglob("*.py") if path.name != "tune.py" and "tune import" in path.read_text()]
    naming = [path for path in package.rglob("*.py") if re.search(r"import .*\btune\b", path.read_text())]
    assert not tuning and not naming


@pytest.mark.gpu
def test_tuning_finds_tiles_that_run(monkeypatch):
    from momoe_titan.kernels import tune

    monkeypatch.setattr(tune, "_WARPS_AND_STAGES", ((8, 3), (8, 9)))  # nine stages do not fit: skipped
    monkeypatch.setattr(tune, "_TILES", {k: v[:1] for k, v in tune._TILES.items()})
    best = tune.tune(512, 512, 256, 8, 2)
    assert set(best) == set(KERNELS) and all(config.num_stages < 9 for config in best.values())
