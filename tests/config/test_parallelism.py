"""Which `[parallelism]` is refused when the configuration is read, with a message that says why."""

import pytest

from momoe_titan.config.machine import Machine, checking_for
from tests.support.tiny import job_config, tiny_args


def read(monkeypatch, settings, world=None, **fields):
    """Read a configuration for the tiny model: 4 heads, 2 of keys and values, 3 layers."""
    config = job_config()
    config.training.local_batch_size = 4
    for name, value in settings.items():
        section, _, field = name.rpartition(".")
        section = getattr(config, section or "parallelism")
        assert hasattr(section, field), name
        setattr(section, field, value)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if world is not None:
        monkeypatch.setenv("WORLD_SIZE", str(world))
    args = tiny_args(**fields)
    args.update_from_config(config)
    return args


PP = {"pipeline_parallel_degree": 2}
INTERLEAVED = {**PP, "pipeline_parallel_schedule": "Interleaved1F1B"}


@pytest.mark.parametrize(
    "settings, fields, message",
    [
        ({"tensor_parallel_degree": 0}, {}, "tensor_parallel_degree is 0"),
        ({"tensor_parallel_degree": 4}, {}, "does not divide n_kv_heads, 2"),
        ({"tensor_parallel_degree": 2}, {"moe_hidden_dim": 9}, "moe_hidden_dim, 9"),
        ({"tensor_parallel_degree": 2}, {"dense_hidden_dim": 9}, "dense_hidden_dim, 9"),
        ({"tensor_parallel_degree": 2}, {"qk_norm": "full"}, "must be 1 with qk_norm 'full'"),
        ({"tensor_parallel_degree": 2, "training.seq_len": 15}, {}, "multiple of 2"),
        (
            {"tensor_parallel_degree": 2, "validation.enable": True, "validation.seq_len": 15},
            {},
            "validation.seq_len is 15, must be a multiple of 2",
        ),
        (
            {"tensor_parallel_degree": 2, "enable_async_tensor_parallel": True},
            {},
            "enable_async_tensor_parallel is True, which needs compile.enable",
        ),
        ({"context_parallel_degree": 2, "training.seq_len": 6}, {}, "seq_len is 6, .* of 4"),
        (
            {"context_parallel_degree": 2, "tensor_parallel_degree": 2, "training.seq_len": 12},
            {},
            "seq_len is 12, .* of 8",
        ),
        ({"context_parallel_degree": 2}, {"attn_type": "flex"}, "attn_type 'flex'"),
        (
            {"context_parallel_degree": 2, "context_parallel_load_balancer": "ptrr"},
            {},
            "context_parallel_load_balancer is 'ptrr'",
        ),
        ({**PP, "pipeline_parallel_schedule": "2F2B"}, {}, "Unknown schedule name '2F2B'"),
        ({**PP, "pipeline_parallel_microbatch_size": 3}, {}, "microbatch_size is 3, must divide"),
        ({**PP, "pipeline_parallel_microbatch_size": 4}, {}, "a microbatch per stage, 2, .* 1:"),
        ({**PP, "pipeline_parallel_layers_per_stage": 1}, {}, "makes 5 pipeline stages"),
        ({**PP, "module_fqns_per_model_part": [["output"]]}, {}, "makes 1 pipeline stages"),
        (
            {
                **PP,
                "module_fqns_per_model_part": [
                    ["tok_embeddings", "layers.0"],
                    ["layer.1", "layers.2", "norm", "output"],
                ],
            },
            {},
            "module_fqns_per_model_part names .*, must name each of .* layers.1, ",
        ),
        (
            {
                **PP,
                "module_fqns_per_model_part": [
                    ["tok_embeddings", "layers.1"],
                    ["layers.0", "layers.2", "norm", "output"],
                ],
            },
            {},
            "stage by stage in this order",
        ),
        (
            {**PP, "validation.enable": True, "validation.seq_len": 16, "validation.local_batch_size": 6},
            {},
            "validation.local_batch_size is 6, must be a multiple of the 4 microbatches",
        ),
        (
            {"data_parallel_shard_degree": 1, "training.global_batch_size": 6},
            {},
            "global_batch_size is 6, .* multiple of 4",
        ),
        ({"data_parallel_shard_degree": 2, "training.global_batch_size": 4}, {}, "multiple of 8"),
        (
            {"data_parallel_replicate_degree": 2, "data_parallel_shard_degree": 2} | {"training.global_batch_size": 8},
            {},
            "multiple of 16",
        ),
        (
            {"data_parallel_shard_degree": 1, "training.global_batch_size": 0},
            {},
            "global_batch_size is 0, must be -1 or",
        ),
        (
            {
                "data_parallel_shard_degree": 1,
                "training.global_batch_size": 8,
                "optimizer.early_step_in_backward": True,
            },
            {},
            "early_step_in_backward is True with training.global_batch_size 8",
        ),
        ({"pipeline_parallel_degree": 6}, {}, "degree is 6: Number of stages"),
        ({**PP, "optimizer.early_step_in_backward": True}, {}, "early_step_in_backward is True"),
        ({**INTERLEAVED, "training.local_batch_size": 5}, {}, "multiple of 2, the rounds"),
        ({**INTERLEAVED, "pipeline_parallel_layers_per_stage": 3}, {}, "at least 4"),
    ],
)
def test_refuses(monkeypatch, settings, fields, message):
    with pytest.raises(ValueError, match=message):
        read(monkeypatch, settings, **fields)


def test_a_batch_of_an_unknown_number_of_ranks_is_not_refused(monkeypatch):
    settings = {"data_parallel_shard_degree": -1, "training.global_batch_size": 6}
    assert read(monkeypatch, settings).max_seq_len == job_config().training.seq_len
    with pytest.raises(ValueError, match="global_batch_size is 6, must be .*multiple of 8"):
        read(monkeypatch, settings, world=2)


def test_degrees_have_to_make_up_the_number_of_processes(monkeypatch):
    read(monkeypatch, {"tensor_parallel_degree": 2}, world=6)
    with pytest.raises(ValueError, match="must be the number of processes, 5"):
        read(monkeypatch, {"tensor_parallel_degree": 2}, world=5)
    with pytest.raises(ValueError, match="1 \\* 2 \\* 2 \\* 1 \\* 1, must be the number"):
        degrees = {"tensor_parallel_degree": 2, "data_parallel_shard_degree": 2}
        read(monkeypatch, degrees, world=8)


@pytest.mark.parametrize("kind", ["tensor", "pipeline"])
@pytest.mark.parametrize("shard, world", [(1, None), (-1, 4)])
def test_ddp_composes_with_nothing(monkeypatch, kind, shard, world):
    degrees = {"data_parallel_replicate_degree": 2, f"{kind}_parallel_degree": 2}
    with pytest.raises(ValueError, match="DistributedDataParallel does not compose"):
        read(monkeypatch, {**degrees, "data_parallel_shard_degree": shard}, world)
    read(monkeypatch, {**degrees, "data_parallel_shard_degree": 2}, 8)  # HSDP


def test_warns_where_loss_parallel_cannot_be_switched_off(monkeypatch, caplog):
    settings = {"tensor_parallel_degree": 2, "disable_loss_parallel": True}
    read(monkeypatch, settings, 2)
    assert "disable_loss_parallel = true HAS NO EFFECT" in caplog.text
    caplog.clear()
    whole_logits = job_config(loss_chunk_mib=0)
    monkeypatch.setattr("tests.config.test_parallelism.job_config", lambda: whole_logits)
    read(monkeypatch, settings, 2)
    assert "disable_loss_parallel" not in caplog.text


@pytest.mark.parametrize("backend, dispatch, warns", [("torchtitan", "all_ranks", True), ("torchtitan", "auto", False)])
def test_warns_where_tokens_are_sent_as_torchtitan_does(monkeypatch, caplog, backend, dispatch, warns):
    config = job_config(backend=backend, expert_dispatch=dispatch)
    monkeypatch.setattr("tests.config.test_parallelism.job_config", lambda: config)
    with checking_for(Machine(world_size=2, has_gpu=True)):
        read(monkeypatch, {"expert_parallel_degree": 2, "data_parallel_shard_degree": 2}, 2, moe={"num_experts": 6})
    assert ("momoe.expert_dispatch has no effect with momoe.backend = 'torchtitan'" in caplog.text) == warns


def test_accepts_what_composes(monkeypatch):
    degrees = {"tensor_parallel_degree": 2, "context_parallel_degree": 2, **INTERLEAVED}
    stages = {
        "pipeline_parallel_layers_per_stage": 1,
        "pipeline_parallel_first_stage_less_layers": 0,
    }
    settings = {**degrees, **stages, "data_parallel_shard_degree": -1}
    assert read(monkeypatch, settings, 16).n_layers == 3
    with pytest.raises(ValueError, match="must be the number of processes, 17"):
        read(monkeypatch, settings, 17)
    in_any_order = [["layers.0", "tok_embeddings"], ["output", "layers.2", "layers.1", "norm"]]
    read(monkeypatch, {**PP, "module_fqns_per_model_part": in_any_order}, 2)
