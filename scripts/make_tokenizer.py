"""Train the small byte-level BPE tokenizer that comes with the package.

    python scripts/make_tokenizer.py [--out momoe_titan/assets/tokenizer]

Learns from the training split of the dataset `python_stdlib` and writes
tokenizer.json and tokenizer_config.json. The same Python version gives the same
files. Being byte-level, the tokenizer encodes every text and decodes it to itself.
"""

import argparse
import json
import sysconfig
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from momoe_titan.data.stdlib import load_stdlib

VOCAB_SIZE = 2048
BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """A BPE of exactly `vocab_size` entries, BOS, EOS and all 256 bytes included."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[BOS, EOS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(f"vocab_size {vocab_size} not reached: the text gave {tokenizer.get_vocab_size()} entries")
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default="momoe_titan/assets/tokenizer")
    parser.add_argument("--vocab-size", type=int, default=VOCAB_SIZE)
    args = parser.parse_args()

    texts = load_stdlib(sysconfig.get_path("stdlib"))["text"]
    tokenizer = train_tokenizer(list(texts), args.vocab_size)
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(args.out / "tokenizer.json"))
    config = {"bos_token": BOS, "eos_token": EOS, "model_max_length": 1 << 20}
    (args.out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    print(f"wrote {tokenizer.get_vocab_size()} entries to {args.out}")


if __name__ == "__main__":
    main()
