"""Attention inside documents: a packed document gets what it would get alone."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter

from momoe_titan.config.checks.job import check_document_mask
from momoe_titan.config.machine import Machine
from momoe_titan.model import parallelize_momoe_llama
from momoe_titan.model.attention import BLOCK, DocumentAttention, block_mask, document_mask, number_documents
from momoe_titan.model.parallel.activation_checkpoint import _Replay, _Save
from tests.support.tiny import ONE_PROCESS, SEQ, VOCAB, build, job_config, tiny_args

# Lengths of the documents of two sequences, one of a single token among them.
LENGTHS = [[5, 1, 7, 3], [16]]


def positions_of(lengths: list[list[int]]) -> torch.Tensor:
    return torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])


@pytest.mark.parametrize("qk_norm", ["none", "per_head", "full"])
def test_packed_documents_get_what_each_gets_alone(qk_norm):
    """Logits, and the gradients of all weights; without a mask they differ."""
    model = build(tiny_args(qk_norm=qk_norm, document_mask=True, load_balance_rate=0.0))
    tokens = torch.randint(VOCAB, (2, SEQ), generator=torch.Generator().manual_seed(0))
    labels = torch.randint(VOCAB, (2, SEQ), generator=torch.Generator().manual_seed(1))

    def gradients(loss):
        loss.backward()
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return found

    extra = {"positions": positions_of(LENGTHS)}
    masks = model.get_attention_masks(tokens, Tokenizer, extra)
    assert extra == {}, "positions would be an argument of the first pipeline stage only"
    packed = model(tokens, attention_masks=masks)
    of_packed = gradients(F.cross_entropy(packed.flatten(0, 1), labels.flatten(), reduction="sum"))
    alone, loss = [], torch.zeros(())
    for row, lengths in enumerate(LENGTHS):
        for x, y in zip(tokens[row].split(lengths), labels[row].split(lengths), strict=True):
            alone.append(model(x[None]))
            loss = loss + F.cross_entropy(alone[-1][0], y, reduction="sum")
    torch.testing.assert_close(packed.flatten(0, 1), torch.cat(alone, dim=1)[0], rtol=1e-4, atol=1e-5)
    of_alone = gradients(loss)
    assert of_packed.keys() == of_alone.keys()
    for name, grad in of_packed.items():
        assert (grad - of_alone[name]).norm() <= 1e-4 * of_alone[name].norm(), name
    assert not torch.allclose(model(tokens)[0], packed[0], atol=1e-3)


class Tokenizer:
    eos_id = 7


def test_documents_end_with_eos_where_nobody_gives_positions():
    """TorchTitan's loaders of streamed data."""
    tokens = torch.tensor([[1, 7, 2, 3, 7, 7, 4], [1, 2, 3, 4, 5, 6, 7]])
    model = build(tiny_args(document_mask=True))
    numbers = model.get_attention_masks(tokens, Tokenizer, {})
    assert numbers.tolist() == [[0, 0, 1, 1, 1, 2, 3], [0] * 7] and numbers.dtype == torch.int32
    assert number_documents(tokens, positions_of([[2, 3, 1, 1], [7]]), 7).tolist() == (numbers + 1).tolist()
    with pytest.raises(TypeError):  # which TorchTitan's validator takes for: no masks
        build(tiny_args()).get_attention_masks(tokens, Tokenizer, {})


@pytest.mark.parametrize(
    "lengths",
    [
        pytest.param([[3 * BLOCK], [1] * (3 * BLOCK)], id="one document, and one for each token"),
        pytest.param([[BLOCK] * 3, [BLOCK - 1, BLOCK + 1, BLOCK]], id="on the edges of blocks"),
        pytest.param([[300, 50], [1, 200, 149]], id="a last block that is not whole"),
        pytest.param([[5, 9, 3]], id="shorter than a block"),
    ],
)
def test_blocks_that_are_left_out_or_not_masked(lengths):
    """Flex attention skips a block, or computes it without the mask: both must be right for every pair of tokens."""
    numbers = number_documents(torch.empty(0), positions_of(lengths), None)
    B, L = numbers.shape
    dense = document_mask(numbers)
    mask = block_mask(numbers)
    b, q, k = torch.meshgrid(torch.arange(B), torch.arange(L), torch.arange(L), indexing="ij")
    assert torch.equal(mask.mask_mod(b, torch.zeros_like(b), q, k), dense[:, 0])

    N = -(-L // BLOCK)
    padded = F.pad(dense[:, 0], (0, N * BLOCK - L, 0, N * BLOCK - L)).unflatten(1, (N, BLOCK)).unflatten(3, (N, BLOCK))
    some, every = padded.any(4).any(2), padded.all(4).all(2)
    for counts, indices, wanted in (
        (mask.full_kv_num_blocks, mask.full_kv_indices, every),
        (mask.kv_num_blocks, mask.kv_indices, some & ~every),
    ):
        listed = torch.zeros(B, N, N, dtype=torch.bool)
        for i, j in ((i, j) for i in range(B) for j in range(N)):
            listed[i, j, indices[i, 0, j, : counts[i, 0, j]].long()] = True
        assert torch.equal(listed, wanted)


@pytest.mark.parametrize("mode", ["none", "full"])
def test_flex_attention_agrees_and_compiles_once(mode):
    """In compiled blocks, recomputed or not: one graph of dense blocks and one of MoE blocks, whatever the documents.

    Without gradients. The backward of flex attention needs a GPU.
    """
    torch._dynamo.reset()
    config = job_config()
    config.compile.enable, config.activation_checkpoint.mode = True, mode
    config.compile.backend = counter = CompileCounter()
    args = tiny_args(document_mask=True, head_dim=16, qk_norm="per_head")
    apply = partial(parallelize_momoe_llama, parallel_dims=ONE_PROCESS, job_config=config)
    compiled, plain = build(args, parallelize=apply).eval(), build(args).eval()
    for seed, lengths in enumerate((LENGTHS, [[16], [1] * 16], [[8, 8], [3, 13]])):
        tokens = torch.randint(VOCAB, (2, SEQ), generator=torch.Generator().manual_seed(seed))
        numbers = number_documents(tokens, positions_of(lengths), None)
        with torch.no_grad():
            got, expected = (
                m(tokens, attention_masks=x) for m, x in ((compiled, block_mask(numbers)), (plain, numbers))
            )
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 2


def of_all(out, tensors, dout):
    return [t.float().cpu() for t in (out.detach(), *torch.autograd.grad(out, tensors, dout))]


@pytest.mark.gpu
@pytest.mark.parametrize("length, width", [(512, 64), (300, 32), (384, 128)])
def test_flex_attention_on_a_gpu(length, width):
    """Output and gradients near those in float32, the same each time; new documents wait for nothing."""
    attention, generator = DocumentAttention(), torch.Generator().manual_seed(0)
    q, k, v, dout = (torch.randn(2, heads, length, width, generator=generator).cuda() for heads in (6, 2, 2, 6))
    narrow = [t.bfloat16().requires_grad_() for t in (q, k, v)]
    wide = [t.detach().float().requires_grad_() for t in narrow]
    attention(*narrow, mask=document_mask(torch.zeros(2, length, device="cuda").int()), enable_gqa=True)  # compiles
    for row in ([[length], [length - 3, 3]], [[100, length - 100], [1] * length]):
        numbers = number_documents(torch.empty(0), positions_of(row), None)
        expected = attention(*wide, mask=document_mask(numbers).cuda(), enable_gqa=True)
        expected = of_all(expected, wide, dout)
        numbers, runs = numbers.cuda(), []
        for sync in ("default", "error"):
            torch.cuda.set_sync_debug_mode(sync)
            try:
                out = attention(*narrow, mask=document_mask(numbers), enable_gqa=True)
                gradients = torch.autograd.grad(out, narrow, dout.bfloat16())
            finally:
                torch.cuda.set_sync_debug_mode("default")
            runs.append([out.detach(), *gradients])
        for mine, again, theirs in zip(*runs, expected, strict=True):
            assert torch.equal(mine, again)
            assert (mine.float().cpu() - theirs).norm() <= 1e-2 * theirs.norm()


@pytest.mark.gpu
def test_recomputed_and_compiled_blocks_on_a_gpu():
    """In bfloat16, near what a CPU computes in float32."""
    widths = {"dim": 128, "head_dim": 32, "moe_hidden_dim": 64, "dense_hidden_dim": 256}
    tokens = torch.randint(VOCAB, (2, 256), generator=torch.Generator().manual_seed(0))
    numbers = number_documents(tokens, positions_of([[100, 1, 155], [256]]), None)

    def losses(device, **settings):
        config = job_config()
        for name, value in settings.items():
            section, field = name.split("__")
            setattr(getattr(config, section), field, value)
        apply = partial(parallelize_momoe_llama, parallel_dims=ONE_PROCESS, job_config=config)
        moe = {"num_experts": 8, "top_k": 2}
        args = tiny_args(moe, document_mask=True, max_seq_len=256, **widths)
        model = build(args, parallelize=apply, device=device)
        with torch.no_grad():  # a GPU draws other random numbers than a CPU
            for parameter, start in zip(model.parameters(), build(args).parameters(), strict=True):
                parameter.copy_(start)
        found = []
        for _ in range(3):
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                logits = model(tokens.to(device), attention_masks=numbers.to(device))
                loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens.to(device).flatten())
            loss.backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= 0.1 * parameter.grad
                    parameter.grad = None
            found.append(loss.item())
        return found

    expected = losses("cpu")
    for settings in (
        {},
        {"activation_checkpoint__mode": "full"},
        {"activation_checkpoint__mode": "selective", "activation_checkpoint__selective_ac_option": "op"},
        {"compile__enable": True},
        {"compile__enable": True, "activation_checkpoint__mode": "full"},
    ):
        torch._dynamo.reset()
        assert losses("cuda", **settings) == pytest.approx(expected, rel=0.02), settings


def test_a_compiled_region_passes_our_checkpointing():
    """As flex attention is one in eager blocks, with mode "selective" and "op"; torch refuses it otherwise."""
    assert _Save.supports_higher_order_operators and _Replay.supports_higher_order_operators


def test_heads_that_flex_attention_cannot_compute_are_refused():
    with pytest.raises(ValueError, match=r"^momoe.document_mask is true, but the model's heads are 8 wide"):
        check_document_mask(tiny_args(document_mask=True), Machine(1, has_gpu=True))
    check_document_mask(tiny_args(document_mask=True), Machine(1, has_gpu=False))
    check_document_mask(tiny_args(document_mask=True, head_dim=16), Machine(1, has_gpu=True))


def test_context_parallelism_is_refused():
    config = job_config(document_mask=True)
    config.parallelism.context_parallel_degree = 2
    with pytest.raises(ValueError, match="context_parallel_degree is 2, must be 1 with momoe.document_mask"):
        tiny_args().update_from_config(config)
