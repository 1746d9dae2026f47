"""Writes the tokenizer files of an exported folder, so that transformers tokenizes texts as this package does."""

import json
import os
import shutil

from tokenizers import Tokenizer
from tokenizers.processors import Sequence, TemplateProcessing
from torchtitan.components.tokenizer import HuggingFaceTokenizer

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)


def export_tokenizer(tokenizer: HuggingFaceTokenizer, assets: str, folder: str) -> None:
    """Copy a tokenizer's files, and have transformers begin and end a text as training does.

    The tokens that do so are named in tokenizer_config.json, whichever file of the job named them, and
    generation_config.json ends a text where training ends a document.

    Args:
        tokenizer: of training.
        assets: where its files are.
        folder: where they go; may be the same.
    """
    for name in TOKENIZER_FILES:
        source = os.path.join(assets, name)
        if os.path.isfile(source) and not os.path.samefile(assets, folder):
            shutil.copy(source, folder)
    path = os.path.join(folder, "tokenizer_config.json")
    config = {}
    if os.path.isfile(path):
        with open(path, encoding="utf-8") as f:
            config = json.load(f)
    # Where no class is named, transformers takes the class of the model type, which may split text otherwise.
    wanted = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    file = os.path.join(folder, "tokenizer.json")
    if not os.path.isfile(file):  # transformers would make another tokenizer of the vocabulary than TorchTitan does
        tokenizer.tokenizer.save(file)
    if tokenizer.bos_id is not None:
        if not tokenizer.hf_adds_bos:
            _begin_with(file, tokenizer.id_to_token(tokenizer.bos_id), tokenizer.bos_id)
        # transformers 5 heeds these fields, if they are there, in place of tokenizer.json
        if not tokenizer.hf_adds_bos or "add_bos_token" in config or "add_eos_token" in config:
            wanted |= {"add_bos_token": True, "add_eos_token": tokenizer.hf_adds_eos}
    for name, number in (("bos_token", tokenizer.bos_id), ("eos_token", tokenizer.eos_id)):
        if number is not None and not config.get(name):
            wanted[name] = tokenizer.id_to_token(number)
    if wanted != config:
        with open(path, "w", encoding="utf-8") as f:
            json.dump(wanted, f, indent=2, ensure_ascii=False)
    if tokenizer.eos_id is not None:
        _end_generation_with(os.path.join(folder, "generation_config.json"), tokenizer.eos_id)


def _end_generation_with(file: str, token_id: int) -> None:
    """Add this token to those that end a text, in a generation_config.json that names others only."""
    if not os.path.isfile(file):
        return  # transformers takes the token from config.json
    with open(file, encoding="utf-8") as f:
        config = json.load(f)
    named = config.get("eos_token_id")
    others = named if isinstance(named, list) else [] if named is None else [named]
    if token_id not in others:
        config["eos_token_id"] = [token_id, *others] if others else token_id
        with open(file, "w", encoding="utf-8") as f:
            json.dump(config, f, indent=2)


def _begin_with(file: str, token: str | None, token_id: int) -> None:
    """Have a tokenizer.json put this token before every text."""
    tokenizer = Tokenizer.from_file(file)
    template = TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token}:1 $B:1", special_tokens=[(token, token_id)]
    )
    before = tokenizer.post_processor
    tokenizer.post_processor = template if before is None else Sequence([before, template])
    tokenizer.save(file)
