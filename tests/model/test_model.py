"""The transformer, its arguments, and what TorchTitan does to it on one process."""

import dataclasses
import importlib
from functools import partial

import pytest
import torch
from torchtitan.protocols import train_spec

import momoe_titan.register
from momoe_titan.model import MomoeLlama, flavors, parallelize_momoe_llama
from momoe_titan.model.model import MomoeAttention
from tests.support.tiny import (
    ONE_PROCESS,
    VOCAB,
    assert_same_run,
    batch,
    build,
    job_config,
    loss_of,
    moes,
    tiny_args,
    train,
)


def parallelized(config):
    return partial(parallelize_momoe_llama, parallel_dims=ONE_PROCESS, job_config=config)


class TestTraining:
    def test_loss_falls(self):
        run = train(build(tiny_args()), steps=2)
        model = build(tiny_args())
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(20):
            loss = loss_of(model, *batch(0))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert loss < run["losses"][0] - 1

    @pytest.mark.parametrize("moe", [{}, {"score_func": "softmax", "num_shared_experts": 0}], ids=str)
    def test_stock_moe_gives_the_same_run(self, moe):
        ours, stock = (train(build(tiny_args(moe, backend=backend))) for backend in ("torch", "torchtitan"))
        assert_same_run(ours, stock, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("shape", [(1, 1), (1, 7), (3, 15)], ids=str)
    def test_few_tokens(self, shape):
        """1, 7 and 45 of them: less than a tile, and experts without any."""
        grads = []
        for backend in ("torch", "torchtitan"):
            model = build(tiny_args(backend=backend, save_percent=[50.0]))
            rows, length = shape
            tokens, labels = (t[:rows, :length] for t in batch(0))
            loss_of(model, tokens, labels).backward()
            assert all(moe.tokens_per_expert.sum() == 2 * rows * length for moe in moes(model))
            grads.append([model.tok_embeddings.weight.grad, moes(model)[0].router.gate.weight.grad])
        torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-6)

    def test_same_seed_twice(self):
        assert_same_run(train(build(tiny_args())), train(build(tiny_args())))

    @pytest.mark.parametrize("qk_norm", ["per_head", "full"])
    def test_normalised_queries_and_keys(self, qk_norm):
        """Trained, and the same run under checkpointing and torch.compile."""
        args = tiny_args(qk_norm=qk_norm)
        model = build(args)
        loss_of(model, *batch(0)).backward()
        heads = {"per_head": (1, 1), "full": (4, 2)}[qk_norm]
        for block in model.layers.values():
            norms = block.attention.q_norm, block.attention.k_norm
            assert [norm.weight.numel() for norm in norms] == [8 * n for n in heads]
            assert all(norm.weight.grad.any() for norm in norms)
        plain = train(build(args))
        config = job_config()
        config.activation_checkpoint.mode = "full"
        assert_same_run(train(build(args, parallelize=parallelized(config))), plain)
        config.compile.enable = True
        config.compile.backend = "aot_eager"
        torch._dynamo.reset()
        compiled = train(build(args, parallelize=parallelized(config)))
        assert_same_run(compiled, plain, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("backend", ["torch", "torchtitan"])
    def test_autocast_with_float32_parameters(self, backend):
        model = build(tiny_args(backend=backend))
        want = loss_of(model, *batch(0))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(model, *batch(0))
        loss.backward()
        torch.testing.assert_close(loss, want, rtol=2e-2, atol=0)
        assert loss != want
        for parameter in model.parameters():
            assert parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all()

    def test_bfloat16_model(self):
        model = build(tiny_args())
        want = loss_of(model, *batch(0))
        model.bfloat16()
        model.freqs_cis = model._precompute_freqs_cis()
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        assert moes(model)[0].expert_bias.dtype == torch.float32
        torch.testing.assert_close(loss_of(model, *batch(0)), want, rtol=2e-2, atol=0)


def test_save_percent_and_backend_reach_their_layers():
    model = build(tiny_args(save_percent=[12.5, 100], check_ids=True, backend="torch"))
    experts = [moe.experts for moe in moes(model)]
    assert [e.save_percent for e in experts] == [12.5, 100]
    assert all(e.backend == "torch" and e.check_ids for e in experts)
    assert [block.moe_enabled for block in model.layers.values()] == [False, True, True]


def test_attention_with_wide_heads():
    """32 heads of 128 on 2048 columns, as Qwen3-30B-A3B has, in small."""
    torch.manual_seed(0)
    args = tiny_args()  # 4 heads of 8 on 24 columns, 2 of keys and values
    attention = MomoeAttention(args)
    with torch.device("meta"):
        model = MomoeLlama(args)
    model.freqs_cis = freqs = torch.polar(
        torch.ones(16, 4), torch.outer(torch.arange(16.0), 1e4 ** (-torch.arange(4.0) / 4))
    )
    torch.testing.assert_close(model.to_empty(device="cpu")._precompute_freqs_cis(), freqs)

    x = torch.randn(2, 16, 24)
    q, k, v = (
        (x @ w.weight.t()).view(2, 16, -1, 8).transpose(1, 2) for w in (attention.wq, attention.wk, attention.wv)
    )
    assert q.shape[1] == 4 and k.shape[1] == 2

    def turned(t):
        pairs = torch.view_as_complex(t.reshape(*t.shape[:-1], 4, 2).contiguous())
        return torch.view_as_real(pairs * freqs).flatten(-2)

    q, k, v = turned(q), turned(k).repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
    weights = (q @ k.transpose(-1, -2) / 8**0.5).masked_fill(torch.ones(16, 16).triu(1).bool(), float("-inf"))
    want = (weights.softmax(-1) @ v).transpose(1, 2).reshape(2, 16, 32) @ attention.wo.weight.t()
    torch.testing.assert_close(attention(x, freqs, None), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["torch", "torchtitan"])
def test_parameter_and_flop_count(backend):
    args = tiny_args(backend=backend)
    with torch.device("meta"):
        model = MomoeLlama(args)
    attention = 24 * 8 * (4 + 2 + 2 + 4)
    expert = 3 * 24 * 10
    norms = 24 * (2 * 3 + 1)
    dense = 3 * attention + 3 * 24 * 32 + norms + 24 * VOCAB  # the output layer
    per_moe = 24 * 5 + expert  # router, shared expert
    total = dense + 24 * VOCAB + 2 * (per_moe + 5 * expert)
    active = dense + 2 * (per_moe + 2 * expert)
    nparams, flops = args.get_nparams_and_flops(model, seq_len=16)
    assert nparams == total == sum(p.numel() for p in model.parameters())
    # 6 per active parameter; attention 6 * layers * heads * (query + value width) * length
    assert flops == 6 * active + 6 * 3 * 4 * 16 * 16


def test_init_does_not_depend_on_the_backend():
    ours, stock = (build(tiny_args(backend=b)).state_dict() for b in ("torch", "torchtitan"))
    assert stock.keys() - ours.keys() == {f"layers.{i}.moe.experts.w3" for i in (1, 2)}
    for name in ours:
        if "moe.experts" not in name:
            assert torch.equal(ours[name], stock[name]), name
    for i in (1, 2):
        experts = f"layers.{i}.moe.experts."
        assert torch.equal(ours[experts + "w2"], stock[experts + "w2"].transpose(1, 2))
        assert torch.equal(ours[experts + "w1"][:, :, 0], stock[experts + "w3"].transpose(1, 2))
        assert torch.equal(ours[experts + "w1"][:, :, 1], stock[experts + "w1"].transpose(1, 2))


class TestTrainSpec:
    def test_registers_once(self):
        spec = train_spec.get_train_spec("momoe_llama")
        momoe_titan.register.register()
        importlib.reload(momoe_titan.register)
        assert train_spec.get_train_spec("momoe_llama") is spec
        assert spec.model_cls is MomoeLlama

    def test_refuses_a_taken_name(self, monkeypatch):
        other = dataclasses.replace(train_spec.get_train_spec("llama3"))
        monkeypatch.setitem(train_spec._extra_train_specs, "momoe_llama", other)
        with pytest.raises(ValueError, match="momoe_llama is already registered"):
            momoe_titan.register.register()

    def test_jobs_do_not_share_arguments(self):
        args = flavors["debugmodel"]
        args.update_from_config(job_config(save_percent=[100.0], vocab_size=999))
        assert args.vocab_size == 999
        assert flavors["debugmodel"].save_percent == [0.0]
        assert flavors["debugmodel"].vocab_size == 2048

    @pytest.mark.parametrize("flavor", [f for f in flavors if f != "hf"])
    def test_flavors_are_valid(self, flavor):
        args = flavors[flavor]
        args.update_from_config(job_config(save_percent=[50.0]))
        assert args.save_percent == [50.0] and args.backend == "auto"


class TestUpdateFromConfig:
    def test_takes_over_the_section(self):
        args, config = (
            tiny_args(),
            job_config(
                save_percent=[0.0, 50.0],
                backend="torch",
                load_balance_rate=0.5,
                load_balance_rule="proportional",
                load_balance_off_layers=[2],
                vocab_size=128,
                check_ids=True,
            ),
        )
        config.debug.moe_force_load_balance = True
        config.training.seq_len = 8
        args.update_from_config(config)
        assert args.save_percent == [0.0, 50.0] and args.backend == "torch"
        assert args.layer_load_balance_rate(1) == 0.5 and args.layer_load_balance_rate(2) == 0
        assert args.load_balance_rule == "proportional" and args.check_ids
        assert args.vocab_size == 128 and args.max_seq_len == 8
        assert args.moe_args._debug_force_load_balance

    def test_without_the_section(self):
        args = tiny_args(save_percent=[25.0])
        args.update_from_config(job_config())
        assert args.save_percent == [25.0] and args.vocab_size == VOCAB

    @pytest.mark.parametrize(
        ("momoe", "message"),
        [
            ({"save_percent": [1.0, 2.0, 3.0]}, r"momoe.save_percent has 3 numbers.* 2"),
            ({"save_percent": []}, r"momoe.save_percent must be a number or a list .*, got \[\]"),
            ({"save_percent": [0.0, 101]}, r"momoe.save_percent\[1\].*101"),
            ({"save_percent": ["50"]}, r"momoe.save_percent\[0\].*'50'"),
            ({"save_percent": [float("nan")]}, r"momoe.save_percent\[0\].*nan"),
            ({"save_percent": -1}, r"momoe.save_percent must be a number .*-1"),
            ({"backend": "cuda"}, r"momoe.backend is 'cuda'"),
            ({"load_balance_rule": "cosine"}, r"momoe.load_balance_rule is 'cosine'"),
            ({"load_balance_rate": -0.1}, r"momoe.load_balance_rate is -0.1"),
            ({"load_balance_off_layers": [0, 1]}, r"load_balance_off_layers names \[0\].*\[1, 2\]"),
            ({"vocab_size": -5}, r"vocab_size is -5"),
        ],
        ids=str,
    )
    def test_refuses_the_section(self, momoe, message):
        with pytest.raises(ValueError, match=message):
            tiny_args().update_from_config(job_config(**momoe))

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"n_dense_layers": 4}, "n_dense_layers is 4, more than n_layers, 3"),
            ({"dense_hidden_dim": 0}, "dense_hidden_dim is 0"),
            ({"moe_hidden_dim": 0}, "moe_hidden_dim is 0"),
            ({"n_kv_heads": 3}, "n_heads is 4, must be a multiple of n_kv_heads, 3"),
            ({"head_dim": 7}, "head_dim is 7"),
            ({"head_dim": 0}, "head_dim is 0"),
            ({"head_dim": None, "dim": 30}, "dim is 30, must be a multiple of n_heads, 4"),
            ({"head_dim": None, "dim": 12}, "head_dim is 3"),
            ({"qk_norm": "heads"}, "qk_norm is 'heads'"),
            ({"qk_norm": "full", "attn_type": "flex"}, "qk_norm is 'full' and attn_type is 'flex'"),
            ({"moe": {"top_k": 6}}, "top_k is 6, more than moe_args.num_experts, 5"),
            ({"moe": {"top_k": 0}}, "top_k is 0"),
            ({"moe": {"num_shared_experts": -1}}, "num_shared_experts is -1"),
            ({"moe": {"score_func": "relu"}}, "score_func is 'relu'"),
            ({"moe": {"score_before_experts": True}}, "score_before_experts is True"),
            ({"moe": {"num_expert_groups": 5}}, "num_expert_groups is 5"),
        ],
        ids=str,
    )
    def test_refuses_a_model(self, fields, message):
        args = tiny_args(**fields)
        with pytest.raises(ValueError, match=message):
            args.update_from_config(job_config())
        with pytest.raises(ValueError, match=message):
            MomoeLlama(args)

    def test_refuses_converters(self):
        config = job_config()
        config.model.converters = ["float8"]
        with pytest.raises(ValueError, match="model.converters"):
            tiny_args().update_from_config(config)

    def test_refuses_to_validate_beyond_the_model_s_positions(self):
        config = job_config()
        config.validation.seq_len = 2 * config.training.seq_len
        tiny_args().update_from_config(config)
        config.validation.enable = True
        with pytest.raises(ValueError, match="validation.seq_len is 32, .* training.seq_len, 16"):
            tiny_args().update_from_config(config)
        config.validation.seq_len = config.training.seq_len
        tiny_args().update_from_config(config)

    def test_stock_backend_warns_of_settings_without_effect(self, caplog):
        tiny_args().update_from_config(job_config(backend="torchtitan", save_percent=[50.0], check_ids=True))
        assert "momoe.save_percent has no effect" in caplog.text
        assert "momoe.check_ids has no effect" in caplog.text
        caplog.clear()
        tiny_args().update_from_config(job_config(backend="torchtitan"))
        tiny_args().update_from_config(job_config(backend="triton", save_percent=[50.0], check_ids=True))
        assert "has no effect" not in caplog.text
