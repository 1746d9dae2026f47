import pytest
import torch

from momoe_titan.kernels import count_slots, group_tokens

g = torch.Generator().manual_seed(0)
# name -> (groups_TK, G)
GROUPS = {
    "docstring": (torch.tensor([[1, 0, 1], [0, 0, 0], [1, -1, 1]]), 2),
    "every_token_in_some": (torch.randint(5, (300, 4), generator=g), 5),
    "nobody_in_the_last": (torch.randint(2, (40, 3), generator=g), 3),
    "no_token": (torch.empty(0, 2, dtype=torch.int64), 3),
}


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("name", GROUPS)
def test_rows_of_tokens(name, backend, device):
    groups_TK, num_groups = GROUPS[name]
    x = torch.randn(len(groups_TK), 20, generator=g)
    member_TG = (groups_TK[:, :, None] == torch.arange(num_groups)).any(1)
    tokens = [member_TG[:, i].nonzero()[:, 0] for i in range(num_groups)]

    grouped = group_tokens(groups_TK.to(device), num_groups, backend)
    assert grouped.counts_G.tolist() == [len(t) for t in tokens]
    leaf = x.to(device).requires_grad_()
    rows = grouped.gather(leaf, sum(map(len, tokens)))
    assert torch.equal(rows.detach().cpu(), x[torch.cat(tokens)])

    rows = rows.detach().requires_grad_()
    out = grouped.sum(rows)
    times_T1 = member_TG.sum(1, keepdim=True).to(x)
    torch.testing.assert_close(out.detach().cpu(), times_T1 * x)

    # each is the other's backward
    dout = torch.randn(x.shape, generator=g)
    (drows,) = torch.autograd.grad(out, rows, dout.to(device))
    assert torch.equal(drows.cpu(), dout[torch.cat(tokens)])
    (dx,) = torch.autograd.grad(grouped.gather(leaf, len(rows)), leaf, drows)
    torch.testing.assert_close(dx.cpu(), times_T1 * dout)

    named = groups_TK[groups_TK >= 0]
    beside_others = torch.stack([groups_TK, groups_TK + 1], dim=-1).to(device)
    for ids in (groups_TK.to(device), beside_others[..., 0]):
        assert count_slots(ids, num_groups, backend).tolist() == named.bincount(minlength=num_groups).tolist()
