"""Checks an exported folder by comparing the logits that transformers computes from it with ours."""

from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch

from momoe_titan.config.command_line import install_command
from momoe_titan.data.tokenizer import TextTokenizer
from momoe_titan.inference.load import load_model, with_positions
from momoe_titan.model import MomoeLlamaArgs

# Rounding of float32 stays far below this share of the largest logit, a wrong weight does not.
TOLERANCE = 2e-4
TEXT = """The lighthouse keeper wrote down the wind every evening: north-east, force 4, visibility 12 miles.

def mean(values: list[float]) -> float:
    return sum(values) / len(values)  # no check for an empty list

Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. \u65e9\u4e0a\u597d, 3.14159 \u2248 \u03c0.
"""


@dataclass
class Comparison:
    """What came of a text in both.

    Args:
        tokens: of the text.
        same_ids: whether both tokenizers give it the same ids.
        missing: weights that transformers did not find.
        difference: the largest of any logit.
        at: the token whose logits differ most.
        largest: logit, by its absolute value.
    """

    tokens: int
    same_ids: bool
    missing: list[str]
    difference: float
    at: int
    largest: float

    @property
    def tolerance(self) -> float:
        return TOLERANCE * max(1.0, self.largest)

    @property
    def is_equal(self) -> bool:
        return self.same_ids and not self.missing and self.difference <= self.tolerance

    def __str__(self) -> str:
        lines = [
            f"largest difference of logits: {self.difference:.2g} at token {self.at + 1} of {self.tokens} "
            f"(logits up to {self.largest:.3g}, tolerance {self.tolerance:.2g})"
        ]
        if not self.same_ids:
            lines.append("transformers' tokenizer gives the text other ids than ours")
        if self.missing:
            lines.append(f"transformers does not find {', '.join(self.missing[:4])} ({len(self.missing)} weights)")
        return "\n".join(lines)


def compare(path: str, args: MomoeLlamaArgs, assets: str, folder: str, dtype: torch.dtype) -> Comparison:
    """Compare a checkpoint in our model with a folder in transformers: both in float32 on the CPU, one at a time.

    Args:
        path: the checkpoint, of either kind.
        args: of its model.
        assets: folder of its tokenizer.
        folder: what transformers loads.
        dtype: of the weights in the folder, to which those of the checkpoint are rounded first.

    Raises:
        ValueError: there is no transformers, or a model or tokenizer cannot be loaded.
    """
    try:
        # Of the extra "hf". By `import transformers` a type checker would read all models that it has.
        from transformers.models.auto.modeling_auto import AutoModelForCausalLM
        from transformers.models.auto.tokenization_auto import AutoTokenizer
    except ModuleNotFoundError as e:
        raise ValueError(f"--verify: {e}: {install_command('hf')}") from e
    ids = TextTokenizer(assets).encode(TEXT, add_bos=True, add_eos=False)
    if max(ids) >= args.vocab_size:
        raise ValueError(f"the tokenizer in {assets!r} has id {max(ids)}, the model embeds {args.vocab_size}")
    tokens = torch.tensor([ids])
    with torch.no_grad():
        model = load_model(path, with_positions(args, len(ids)), "cpu", dtype).float()
        ours_LV = model(tokens)[0]
        del model  # there may be memory for one
        same_ids = AutoTokenizer.from_pretrained(folder).encode(TEXT) == ids
        # One expert after the other: the grouped kernel of transformers 5 refuses some widths.
        new = int(metadata.version("transformers").split(".")[0]) >= 5
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            output_loading_info=True,
            **{"dtype" if new else "torch_dtype": torch.float32},
            **({"experts_implementation": "eager"} if new else {}),
        )
        theirs, info = loaded
        difference_L = (theirs.eval()(tokens).logits[0] - ours_LV).abs().amax(-1)
    at = int(difference_L.argmax())
    return Comparison(
        tokens=len(ids),
        same_ids=same_ids,
        missing=sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]])),
        difference=float(difference_L[at]),
        at=at,
        largest=float(ours_LV.abs().max()),
    )
