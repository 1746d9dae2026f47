"""From a short training run to text: the commands export and generate, and transformers."""

import io
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import safetensors.torch as safetensors_torch
import torch
import torch.distributed.checkpoint as dcp
import transformers
from tokenizers import Tokenizer
from tokenizers.processors import ByteLevel, TemplateProcessing
from torch import nn
from torchtitan.components.tokenizer import HuggingFaceTokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from momoe_titan import export as export_hf
from momoe_titan import generate as generate_script
from momoe_titan.inference.export import convert
from momoe_titan.inference.load import find_checkpoint, load_model, read_job, with_positions
from momoe_titan.inference.sampling import _sample, attention_caches, generate, stream_text
from momoe_titan.model import flavors
from momoe_titan.model.args import args_from_hf_config, read_hf_args
from momoe_titan.model.hugging_face.config import BIAS_FILE, write_hf_config
from tests.model.test_hugging_face_weights import MODELS, randomise
from tests.support import commands
from tests.support.tiny import build, moes, tiny_args
from tests.test_train import train

ROOT = Path(__file__).parents[2]
TOKENIZER = ROOT / "momoe_titan/assets/tokenizer"
JOB = ["--job.config_file", str(ROOT / "train_configs/debug_model.toml")]
PROMPT = "def main("


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of some steps with its checkpoint, and that as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("run")
    options = ["--training.steps=6", "--checkpoint.enable", "--validation.no_enable"]
    train(folder, *options, "--momoe.load_balance_rule=sign", "--momoe.load_balance_rate=0.1")
    export_hf.main([str(folder / "checkpoint"), str(folder / "hf"), *JOB, "--shard_gib", "0.008"])
    return folder


def ours_greedy(path, args, n=12) -> list[int]:
    model = load_model(str(path), with_positions(args, 32), "cpu", torch.float32)
    return list(generate(model, prompt_ids(), n, temperature=0))


def prompt_ids() -> list[int]:
    return HuggingFaceTokenizer(str(TOKENIZER)).encode(PROMPT, add_bos=True, add_eos=False)


def test_transformers_continues_as_we_do(run, capsys):
    theirs, info = AutoModelForCausalLM.from_pretrained(run / "hf", output_loading_info=True)
    assert not any(info.values()), info
    files = sorted(path.name for path in (run / "hf").glob("*.safetensors"))
    assert files == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    biases = [layer.mlp.gate.e_score_correction_bias for layer in theirs.model.layers[1:]]
    assert torch.stack(biases).abs().max() > 0.09

    ids = prompt_ids()
    tokenizer = AutoTokenizer.from_pretrained(run / "hf")
    assert tokenizer.encode(PROMPT) == ids
    assert HuggingFaceTokenizer(str(run / "hf")).encode(PROMPT, add_bos=True, add_eos=False) == ids
    args, assets = read_job(JOB)
    path, is_hf = find_checkpoint(str(run / "checkpoint"))
    assert path == str(run / "checkpoint/step-6") and not is_hf
    ours = ours_greedy(path, args)
    model = load_model(path, args, "cpu", torch.float32)
    with torch.no_grad():
        tokens = torch.tensor([ids])
        torch.testing.assert_close(model(tokens), theirs(tokens).logits, rtol=0, atol=1e-4)
    answer = theirs.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0]
    assert answer[len(ids) :].tolist() == ours
    assert ours_greedy(run / "hf", read_hf_args(str(run / "hf"))) == ours

    capsys.readouterr()
    for checkpoint in ([str(run / "checkpoint"), *JOB], [str(run / "hf")]):
        generate_script.main([*checkpoint, "--prompt", PROMPT, "--max_tokens=12", "--temperature=0"])
        shown = capsys.readouterr()
        assert shown.out == PROMPT + tokenizer.decode(ours, skip_special_tokens=True) + "\n"
        assert "12 tokens after a prompt of" in shown.err


@pytest.mark.slow
def test_training_goes_on_from_hugging_face_and_back(run, tmp_path):
    checkpoint = ("enable", "initial_load_in_hf", "last_save_in_hf", "last_save_model_only")
    output = train(
        tmp_path,
        *(f"--checkpoint.{field}" for field in checkpoint),
        "--checkpoint.export_dtype=bfloat16",
        "--model.flavor=hf",
        f"--model.hf_assets_path={run / 'hf'}",
        "--training.steps=1",
        "--optimizer.lr=0",
        "--momoe.load_balance_rate=0",
        "--validation.no_enable",
    )
    assert "STARTS AT ZERO" not in output
    back, info = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint/step-1", output_loading_info=True)
    assert not any(info.values()) and back.dtype == torch.bfloat16
    before = AutoModelForCausalLM.from_pretrained(run / "hf").bfloat16()
    for name, weight in before.state_dict().items():
        assert torch.equal(back.state_dict()[name].bfloat16(), weight), name
    assert AutoTokenizer.from_pretrained(tmp_path / "checkpoint/step-1").eos_token_id == 1


def test_export_in_another_dtype_and_one_file(run, tmp_path):
    export_hf.main([str(run / "checkpoint/step-6"), str(tmp_path / "out"), *JOB, "--dtype=bfloat16"])
    weights = safetensors_torch.load_file(tmp_path / "out/model.safetensors")
    for name, weight in weights.items():
        kept = torch.float32 if name.endswith("e_score_correction_bias") else torch.bfloat16
        assert weight.dtype == kept, name
    assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_the_newest_whole_checkpoint_is_taken(tmp_path, caplog):
    args = tiny_args()
    state_dict = build(args).state_dict()
    for step in (2, 9, 10):
        dcp.save(state_dict, checkpoint_id=tmp_path / f"step-{step}", no_dist=True)
    assert find_checkpoint(str(tmp_path)) == (str(tmp_path / "step-10"), False)
    convert(str(tmp_path / "step-2"), str(tmp_path / "step-2"), args, None, 10**9)
    (tmp_path / "step-2/.metadata").unlink()
    (tmp_path / "step-2").rename(tmp_path / "step-11")  # the last one, in Hugging Face's format
    assert find_checkpoint(str(tmp_path)) == (str(tmp_path / "step-11"), True)
    assert "PASSED OVER" not in caplog.text
    weights = tmp_path / "step-11/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    (tmp_path / "step-12").mkdir()
    file = next((tmp_path / "step-10").glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-1])
    assert find_checkpoint(str(tmp_path)) == (str(tmp_path / "step-9"), False)
    assert all(f"PASSED OVER the checkpoint {tmp_path}/step-{step}: " in caplog.text for step in (10, 11, 12))


class Intruder:
    """What runs code when it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def test_nothing_but_tensors_is_unpickled(tmp_path):
    """Of all that training puts into a checkpoint beside the weights."""
    args, trace = tiny_args(), tmp_path / "was here"
    state_dict = {**build(args).state_dict(), "dataloader.dp_rank_0": Intruder(trace), "train_state": Intruder(trace)}
    dcp.save(state_dict, checkpoint_id=tmp_path / "step-1", no_dist=True)
    path, _ = find_checkpoint(str(tmp_path))
    load_model(path, args, "cpu", torch.float32)
    (tmp_path / "out").mkdir()
    convert(path, str(tmp_path / "out"), args, None, 10**9)
    assert not trace.exists()
    dcp.load({"train_state": None}, checkpoint_id=path, no_dist=True)  # as a resumed run does
    assert trace.exists()


def test_how_the_job_trained_is_not_asked_for(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    training = ["--optimizer.early_step_in_backward", "--training.global_batch_size=64"]
    args, _ = read_job([*JOB, *training, "--validation.seq_len=4096", "--validation.enable"])
    assert args.max_seq_len == read_job(JOB)[0].max_seq_len


def test_flavor_of_an_own_module(run, tmp_path, monkeypatch):
    """Not momoe_titan.register, but a module of the user's."""
    (tmp_path / "own_flavor.py").write_text(
        "import copy\nfrom momoe_titan.model import flavors\nflavors['own'] = copy.deepcopy(flavors['debugmodel'])\n"
    )
    own = ["--model.flavor=own", "--experimental.custom_import=own_flavor"]
    with pytest.raises(ValueError, match="experimental.custom_import 'own_flavor': .*PYTHONPATH"):
        read_job([*JOB, *own])
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(flavors, "own", None)  # takes the module's away at the end
    export_hf.main([str(run / "checkpoint"), str(tmp_path / "out"), *JOB, *own])
    assert read_hf_args(str(tmp_path / "out")) == read_hf_args(str(run / "hf"))


@pytest.mark.parametrize("backend", ["torch", "torchtitan"])
def test_bias_beside_a_format_that_cannot_hold_it(tmp_path, backend):
    args = tiny_args({"score_func": "softmax", "num_shared_experts": 0}, n_dense_layers=0, backend=backend)
    model = build(args).eval()
    dcp.save(model.state_dict(), checkpoint_id=tmp_path / "dcp", no_dist=True)
    for name in ("zero", "biased"):
        (tmp_path / name).mkdir()
        lost, dtype = convert(str(tmp_path / "dcp"), str(tmp_path / name), args, None, 10_000)
        assert (lost, dtype) == (name == "biased", torch.float32)
        assert (tmp_path / name / BIAS_FILE).exists() == lost
        ours = load_model(str(tmp_path / name), args, "cpu", torch.float32)
        for got, moe in zip(moes(ours), moes(model), strict=True):
            assert torch.equal(got.expert_bias, moe.expert_bias)
            moe.expert_bias.normal_()
        tokens = torch.arange(16)[None]
        assert lost or torch.equal(ours(tokens), build(args).eval()(tokens))
        dcp.save(model.state_dict(), checkpoint_id=tmp_path / "dcp", no_dist=True)


@pytest.mark.parametrize("name", MODELS)
def test_verify_finds_every_format_equal_and_a_changed_weight(name, tmp_path, monkeypatch, capsys):
    config_class, fields = MODELS[name]
    fields = fields | {"vocab_size": 2048, "max_position_embeddings": 256}
    args = args_from_hf_config(getattr(transformers, config_class)(**fields).to_dict())
    monkeypatch.setitem(flavors, "own", args)
    model = build(args)
    randomise(model, 0)
    dcp.save(model.state_dict(), checkpoint_id=tmp_path / "step-1", no_dist=True)
    out = tmp_path / "out"
    command = [str(tmp_path), str(out), *JOB, "--model.flavor=own", "--training.seq_len=64", "--verify"]
    assert export_hf.main([*command, "--dtype=bfloat16"]) == 0
    shown = capsys.readouterr()
    assert "largest difference of logits: " in shown.out and "computes the same model" in shown.out
    assert json.loads((out / "config.json").read_text())["max_position_embeddings"] == 256
    assert export_hf.main([str(out), "--verify"]) == 0

    file = out / "model.safetensors"
    weights = safetensors_torch.load_file(file)
    weights["model.layers.1.self_attn.k_proj.weight"].neg_()
    safetensors_torch.save_file(weights, file, {"format": "pt"})
    assert export_hf.main(command) == 1
    shown = capsys.readouterr()
    assert f"was exported before, and is left as it is; compared with {tmp_path / 'step-1'}" in shown.out
    assert "TRANSFORMERS COMPUTES ANOTHER MODEL" in shown.err and "before" not in shown.err
    os.utime(tmp_path / "step-1/.metadata", (later := os.path.getmtime(out / "config.json") + 1, later))
    assert export_hf.main(command) == 1
    assert f"{out} was exported before {tmp_path / 'step-1'} was saved" in capsys.readouterr().err


def test_verify_says_what_the_format_cannot_hold(tmp_path, monkeypatch, capsys):
    args = tiny_args(
        {"score_func": "softmax", "num_shared_experts": 0}, n_dense_layers=0, vocab_size=2048, dim=32, moe_hidden_dim=12
    )
    monkeypatch.setitem(flavors, "own", args)
    model = build(args)
    for moe in moes(model):
        moe.expert_bias.normal_()
        nn.init.normal_(moe.experts.w2)
    dcp.save(model.state_dict(), checkpoint_id=tmp_path / "step-1", no_dist=True)
    command = [str(tmp_path), str(tmp_path / "out"), *JOB, "--model.flavor=own", "--verify"]
    assert export_hf.main(command) == 1
    assert "ANOTHER MODEL: the format cannot hold the load-balancing bias" in capsys.readouterr().err


def test_verify_compares_the_ids_of_a_text(run, tmp_path, capsys):
    assert export_hf.main([str(run / "hf"), "--verify"]) == 0
    shutil.copytree(run / "hf", tmp_path / "hf")
    for name, field, value in (
        ("tokenizer_config.json", "add_bos_token", False),
        ("tokenizer.json", "post_processor", None),
    ):
        path = tmp_path / "hf" / name
        path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    assert export_hf.main([str(tmp_path / "hf"), "--verify"]) == 1
    assert "gives the text other ids than ours" in capsys.readouterr().out


def tokenizer_folders(folder):
    """Kinds of tokenizers, by what adds a token that begins a text."""
    plain = Tokenizer.from_file(str(TOKENIZER / "tokenizer.json"))
    config = json.loads((TOKENIZER / "tokenizer_config.json").read_text())
    begin = TemplateProcessing(single="<|begin_of_text|> $A", pair="$A $B", special_tokens=[("<|begin_of_text|>", 0)])
    kinds = {}
    for name, processor, fields in (
        ("nothing", None, {}),
        ("another processor", ByteLevel(), {}),
        ("tokenizer.json", begin, {}),
        ("tokenizer.json, denied", begin, {"add_bos_token": False}),
        ("the field", None, {"add_bos_token": True, "add_eos_token": True}),
        ("no such token", None, {"bos_token": None}),
    ):
        path = folder / name
        path.mkdir()
        if processor is not None:
            plain.post_processor = processor
        plain.save(str(path / "tokenizer.json"))
        (path / "tokenizer_config.json").write_text(json.dumps(config | fields))
        plain = Tokenizer.from_file(str(TOKENIZER / "tokenizer.json"))
        kinds[name] = path
    return kinds


def test_exported_tokenizers_give_a_text_our_ids(tmp_path):
    for name, assets in tokenizer_folders(tmp_path).items():
        ours = HuggingFaceTokenizer(str(assets))
        ids = ours.encode(PROMPT, add_bos=True, add_eos=False)
        out = tmp_path / "out" / name
        write_hf_config(str(out), tiny_args(), str(assets), torch.float32)
        assert AutoTokenizer.from_pretrained(out).encode(PROMPT) == ids, name
        back = HuggingFaceTokenizer(str(out))
        assert back.encode(PROMPT, add_bos=True, add_eos=False) == ids, name
        assert back.encode(PROMPT, add_bos=True, add_eos=True) == ours.encode(PROMPT, add_bos=True, add_eos=True)


def test_sampling(tmp_path):
    model = build(tiny_args({"score_func": "softmax"}, max_seq_len=40, qk_norm="per_head")).eval()
    prompt = [3, 1, 4, 1, 5]

    def sample(**options):
        return list(generate(model, prompt, 24, **options))

    greedy = sample(temperature=0)
    whole = list(prompt)  # without a cache
    for _ in greedy:
        with torch.no_grad():
            whole.append(int(model(torch.tensor([whole]))[0, -1].argmax()))
    assert whole[len(prompt) :] == greedy
    assert sample(top_k=1, seed=0) == sample(top_p=1e-9, seed=1) == greedy
    assert sample(seed=7) == sample(seed=7) != sample(seed=8)
    assert sample(temperature=100.0, seed=7) != sample(temperature=0.5, seed=7)
    assert sample(temperature=0, eos_id=greedy[4]) == greedy[: greedy.index(greedy[4])]
    # 2000 draws from few candidates: the likeliest ones, as often as they should be
    logits_V = torch.tensor([0.1, 0.5, 0.15, 0.25]).log()
    for options, expected in (
        ((1.0, 0, 0.7), [0, 0.5, 0, 0.25]),
        ((1.0, 3, 1.0), [0, 0.5, 0.15, 0.25]),
        ((0.5, 2, 1.0), [0, 0.25, 0, 0.0625]),
    ):
        generator = torch.Generator().manual_seed(0)
        counts_V = torch.zeros(4)
        for _ in range(2000):
            counts_V[_sample(logits_V, *options, generator)] += 1
        expected_V = torch.tensor(expected) / sum(expected)
        torch.testing.assert_close(counts_V / 2000, expected_V, rtol=0, atol=0.05)


def test_an_answer_that_is_not_read_to_its_end_leaves_no_cache():
    model = build(tiny_args()).eval()
    keys = set(model.state_dict())
    whole = list(generate(model, [3, 1], 8, temperature=0))
    answer = generate(model, [3, 1, 4], 8, temperature=0)
    next(answer)
    assert all(cache.length == 3 and cache.keys.numel() for cache in attention_caches(model))
    answer.close()
    assert not any(cache.max_len or cache.keys.numel() for cache in attention_caches(model))
    assert list(generate(model, [3, 1], 8, temperature=0)) == whole
    assert set(model.state_dict()) == keys


@pytest.mark.parametrize(
    "prompt, options, named",
    [
        ([], {}, "prompt is empty"),
        ([1], {"max_tokens": 0}, "max_tokens is 0"),
        ([1], {"temperature": -1.0}, "temperature is -1.0"),
        ([1], {"temperature": float("nan")}, "temperature is nan"),
        ([1], {"top_k": -1}, "top_k is -1"),
        ([1], {"top_p": 0.0}, "top_p is 0.0"),
        ([1], {"max_tokens": 100}, "101 tokens, the model has positions for 16"),
        ([64], {}, "has token 64, the model embeds 64"),
    ],
)
def test_unusable_arguments_are_named(prompt, options, named):
    with pytest.raises(ValueError, match=named):
        next(generate(build(tiny_args()), prompt, **{"max_tokens": 1, **options}))


def test_text_comes_in_whole_characters():
    tokenizer = HuggingFaceTokenizer(str(TOKENIZER))
    text = "x = 'naïve 日本 🙂'\n    return  x"
    ids = tokenizer.encode(text, add_bos=False, add_eos=False)
    pieces = list(stream_text(tokenizer, iter(ids)))
    assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces)
    assert len(pieces) > 10
    # cut in the middle of a character
    cut = list(stream_text(tokenizer, iter(tokenizer.encode("a🙂", add_bos=False, add_eos=False)[:-1])))
    assert "".join(cut).startswith("a")


def test_what_cannot_be_done_is_said(run, tmp_path, monkeypatch):
    cut = tmp_path / "cut/step-9"
    shutil.copytree(run / "checkpoint/step-6", cut)
    (cut / "__0_0.distcp").write_bytes(b"")
    (tmp_path / "cut/step-10").mkdir()  # never written to its end: not the latest
    for script, argv, named in (
        (generate_script, [str(tmp_path)], "holds no checkpoint"),
        (generate_script, [str(run / "checkpoint")], "say by --job.config_file"),
        (export_hf, [str(run / "checkpoint"), *JOB], "OUT is missing"),
        (export_hf, [str(run / "checkpoint"), str(run / "hf"), *JOB], "is not empty"),
        (export_hf, [str(run / "hf"), str(tmp_path / "out")], "in Hugging Face's format already"),
        (
            export_hf,
            [str(run / "checkpoint"), str(tmp_path / "out"), *JOB, "--model.flavor=500M"],
            r"is of another model: its tok_embeddings.weight is \(2048, 256\), the model's is",
        ),
        (generate_script, [str(cut.parent), *JOB], "step-9' cannot be read: .* 0 of"),
        (generate_script, [str(run / "checkpoint"), *JOB, "--model.flavor=9B"], "'9B' is none of"),
        (generate_script, [str(run / "checkpoint"), *JOB, "--max_tokens=-3"], "--max_tokens is -3, must be at least 1"),
        (generate_script, [str(run / "checkpoint"), *JOB, "--device=cuda:99"], "--device 'cuda:99' is none"),
    ):
        monkeypatch.setattr(sys, "stdin", io.StringIO("x"))
        with pytest.raises(ValueError, match=named):
            script.main(argv)


def test_exit_status_and_message(tmp_path):
    done = commands.run("scripts/generate.py", tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"generate.py: error: '{tmp_path}' holds no")
