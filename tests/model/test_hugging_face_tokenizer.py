"""The tokens that begin and end texts in an exported folder, whichever of the job's files named them."""

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer, GenerationConfig

from momoe_titan.data.tokenizer import TextTokenizer
from momoe_titan.model.hugging_face.config import write_hf_config
from tests.support.tiny import tiny_args

TOKENIZER = Path(__file__).parents[2] / "momoe_titan/assets/tokenizer/tokenizer.json"
BEGIN, END = "<|begin_of_text|>", "<|end_of_text|>"  # ids 0 and 1
TEXT = "one two three"


@pytest.mark.parametrize(
    "files, bos, generation",
    [
        ({"special_tokens_map": {"bos_token": END, "eos_token": {"content": END}}}, 1, None),
        ({"special_tokens_map": {"bos_token": BEGIN, "eos_token": END}}, 0, None),
        ({"tokenizer_config": {"bos_token": END, "eos_token": END}}, 1, None),
        ({}, None, None),  # by its name
        ({"generation_config": {"eos_token_id": [1, 7], "top_p": 0.9}}, None, [1, 7]),
        ({"tokenizer_config": {"eos_token": END}, "generation_config": {"eos_token_id": 7}}, None, [1, 7]),
        ({"tokenizer_config": {"eos_token": END}, "generation_config": {"top_p": 0.9}}, None, 1),
    ],
)
def test_an_export_begins_and_ends_texts_as_training_does(files, bos, generation, tmp_path):
    assets, out = tmp_path / "assets", tmp_path / "out"
    assets.mkdir()
    tokenizer = Tokenizer.from_file(str(TOKENIZER))
    tokenizer.save(str(assets / "tokenizer.json"))
    for name, content in files.items():
        (assets / f"{name}.json").write_text(json.dumps(content))
    ours = TextTokenizer(str(assets))
    assert (ours.bos_id, ours.eos_id) == (bos, 1)
    write_hf_config(str(out), tiny_args(), str(assets), torch.float32)

    config = json.loads((out / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (bos, 1)
    theirs = AutoTokenizer.from_pretrained(out)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (bos, 1)
    assert theirs.encode(TEXT) == ours.encode(TEXT, add_bos=True, add_eos=False)
    back = TextTokenizer(str(out))
    assert back.encode_documents([TEXT]) == ours.encode_documents([TEXT])
    if generation is None:
        assert not (out / "generation_config.json").exists()  # config.json says it
    else:
        assert GenerationConfig.from_pretrained(out).eos_token_id == generation
        if "top_p" in files["generation_config"]:
            assert GenerationConfig.from_pretrained(out).top_p == 0.9
