"""Tokenizers as they are found: every document keeps its length and its end, and none can end itself."""

import json
import logging
import pickle
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer
from tokenizers.processors import TemplateProcessing
from torchtitan.config import ConfigManager

import momoe_titan
from momoe_titan.components.trainer import check_config
from momoe_titan.data.errors import DataError
from momoe_titan.data.tokenizer import TextTokenizer, build_tokenizer

TOKENIZER = Path(momoe_titan.__file__).parent / "assets" / "tokenizer"
BEGIN, END = "<|begin_of_text|>", "<|end_of_text|>"
TEXT = "one two three four five six seven eight nine ten"


def job(*options):
    section = "--job.custom_config_module=momoe_titan.job_config"
    return ConfigManager().parse_args([section, f"--model.hf_assets_path={TOKENIZER}", *options])


@pytest.fixture
def folder(tmp_path):
    """Makes a folder with a tokenizer of the package's vocabulary, and other files beside it."""

    def make(change=lambda tokenizer: None, **files):
        tokenizer = Tokenizer.from_file(str(TOKENIZER / "tokenizer.json"))
        change(tokenizer)
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        for name, content in files.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
        return str(tmp_path)

    return make


def ids_of(tokenizer, text=TEXT):
    ids = tokenizer.encode(text, add_bos=True, add_eos=True)
    assert tokenizer.encode_documents([text, ""])[0] == ids
    return ids


def test_packaged_tokenizer_is_read_as_torchtitan_reads_it(caplog):
    tokenizer = build_tokenizer(job())
    ids = ids_of(tokenizer)
    assert (ids[0], ids[-1], tokenizer.num_ids) == (0, 1, 2048)
    assert tokenizer.decode(ids[1:-1]) == TEXT
    assert not caplog.messages


def test_truncation_and_padding_are_switched_off(folder, caplog):
    def shorten(tokenizer):
        tokenizer.enable_truncation(4)
        tokenizer.enable_padding(length=64, pad_id=1, pad_token=END)

    tokenizer = TextTokenizer(folder(shorten, tokenizer_config={"bos_token": BEGIN, "eos_token": END}))
    assert ids_of(tokenizer) == ids_of(build_tokenizer(job()))
    assert "truncation" in caplog.text and "'max_length': 4" in caplog.text and "switched off" in caplog.text


def test_one_token_may_begin_and_end_texts(folder):
    """It stands where it was wanted, whoever puts it there: the tokenizer's own template, or this package."""
    begin = TemplateProcessing(single=f"{END} $A", special_tokens=[(END, 1)])
    both = TemplateProcessing(single=f"{END} $A {END}", special_tokens=[(END, 1)])
    for template in (None, begin, both):

        def put(tokenizer, template=template):
            if template is not None:
                tokenizer.post_processor = template

        tokenizer = TextTokenizer(folder(put, tokenizer_config={"bos_token": END, "eos_token": END}))
        ids = ids_of(tokenizer)
        assert (ids[0], ids[-1], ids.count(1)) == (1, 1, 2)
        assert tokenizer.decode(ids[1:-1]) == TEXT


@pytest.mark.parametrize(
    "files, said",
    [
        ({"special_tokens_map": {"bos_token": BEGIN, "eos_token": {"content": END, "special": True}}}, None),
        ({"special_tokens_map": {"eos_token": END}, "tokenizer_config": {"bos_token": None}}, None),
        ({"generation_config": {"eos_token_id": [1, 7]}}, f"Documents end with '{END}', id 1"),
        ({"tokenizer_config": {"bos_token": BEGIN}, "config": {"eos_token_id": 1}}, "names no EOS token"),
        ({}, "names no EOS token"),  # by its name
    ],
)
def test_end_of_text_is_found_wherever_it_is_named(folder, caplog, files, said):
    tokenizer = TextTokenizer(folder(**files))
    assert ids_of(tokenizer)[-1] == tokenizer.eos_id == 1
    assert (said is None) == (not caplog.messages)
    assert (said or "") in caplog.text


def test_no_end_of_text_is_said_loudly(folder, caplog):
    def rename(tokenizer):
        state = json.loads(tokenizer.to_str())
        state["added_tokens"] = []
        tokenizer.__setstate__(json.dumps(state).encode())

    tokenizer = TextTokenizer(folder(rename))
    assert tokenizer.eos_id is None and ids_of(tokenizer)
    assert "DOCUMENTS FOLLOW EACH OTHER WITHOUT AN END" in caplog.text


def test_text_of_a_special_token_stays_text(folder):
    """Also in another process, to which a loader's workers take the tokenizer. Words that were added stay words."""

    def add(tokenizer):
        tokenizer.add_tokens([AddedToken("four five", special=False, normalized=False)])

    listed = {"2048": {"content": "four five", "special": False}, "1": {"content": END, "special": True}}
    config = {"bos_token": BEGIN, "eos_token": END, "added_tokens_decoder": listed}
    tokenizer = TextTokenizer(folder(add, tokenizer_config=config))
    plain = ids_of(tokenizer)
    assert 2048 in plain
    for copy in (tokenizer, pickle.loads(pickle.dumps(tokenizer))):
        ids = ids_of(copy, f"{TEXT}{END}{BEGIN}")
        assert ids[: len(plain) - 1] == plain[:-1]
        assert ids.count(0) == ids.count(1) == 1
        assert copy.decode(ids[1:-1]) == f"{TEXT}{END}{BEGIN}"
    prompt = TextTokenizer(tokenizer.tokenizer_path, parse_special=True).encode(f"{TEXT}{END}", add_bos=False)
    assert prompt[-1] == 1


def test_largest_id_counts_not_the_number_of_entries(folder, tmp_path):
    def leave_a_gap(tokenizer):
        state = json.loads(tokenizer.to_str())
        token = {"id": 5000, "content": "<gap>", "single_word": False, "lstrip": False, "rstrip": False}
        state["added_tokens"].append(token | {"normalized": False, "special": True})
        state["model"]["vocab"]["<gap>"] = 5000
        tokenizer.__setstate__(json.dumps(state).encode())

    path = folder(leave_a_gap, tokenizer_config={"bos_token": BEGIN, "eos_token": END})
    tokenizer = TextTokenizer(path)
    assert tokenizer.get_vocab_size() == 2049 and tokenizer.num_ids == 5001
    options = ["--model.name=momoe_llama", "--model.flavor=debugmodel", f"--model.hf_assets_path={path}"]
    options += ["--experimental.custom_import=momoe_titan.register", "--training.dataset=python_stdlib"]
    options.append(f"--job.dump_folder={tmp_path / 'out'}")
    with pytest.raises(ValueError, match="ids up to 5000, but the model embeds 4096; set momoe.vocab_size to 5001"):
        check_config(job(*options, "--momoe.vocab_size=4096"))
    check_config(job(*options, "--momoe.vocab_size=5001"))


def test_fingerprint_tells_tokenizers_apart(folder):
    config = {"bos_token": BEGIN, "eos_token": END}
    first = TextTokenizer(folder(tokenizer_config=config)).fingerprint
    assert first == build_tokenizer(job()).fingerprint, "another layout of the same file"
    assert first == TextTokenizer(folder(lambda t: t.enable_padding(), tokenizer_config=config)).fingerprint
    others = {
        TextTokenizer(folder(tokenizer_config=config | {"bos_token": None})).fingerprint,
        TextTokenizer(folder(lambda t: t.add_tokens(["new"]), tokenizer_config=config)).fingerprint,
    }
    assert len(others | {first}) == 3


def test_damaged_tokenizer_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="no usable tokenizer"):
        build_tokenizer(job(f"--model.hf_assets_path={tmp_path}"))


@pytest.fixture(autouse=True)
def visible_log(caplog):
    caplog.set_level(logging.WARNING)
