"""Mixture-of-Experts modules that need torch alone: `MoMoE`, `TopKRouter` and `MoE`.

Names and letters of the public signatures are those of the first MoMoE release: B batch, S sequence,
M = B*S tokens, D model width, N experts, H expert hidden width. Inside, the letters are the package's:
T tokens, E experts, K chosen experts per token, F expert hidden width.
"""

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from momoe_titan.config.section import Momoe
from momoe_titan.kernels import BACKENDS, momoe_mlp
from momoe_titan.kernels.quantile import NUM_BINS
from momoe_titan.kernels.router import float32_product
from momoe_titan.moe.arguments import (
    ACTIVATION_DTYPES,
    check_device,
    int_at_least,
    narrower_dtype,
    new_or_given_weight,
    refuse_torch_func,
    weight_device_dtype,
)
from momoe_titan.moe.balancing import AVERAGE, BALANCE_RULES, QUANTILE, bias_delta, quantile_delta
from momoe_titan.moe.expert_stats import accumulate_margins, feeds_balancing, record_counts
from momoe_titan.moe.float32_buffers import Float32Buffers
from momoe_titan.moe.router import expert_scores, route_tokens
from momoe_titan.save_percent import validate_save_percent


class MoMoE(nn.Module):
    """SwiGLU experts applied to the tokens that a mask, or a list of expert ids, gives them.

    out[t] = sum over the experts e of token t of score[t, e] * (up * silu(gate)) @ Wl2[e],
    with (up, gate) the first and the last H columns of x[t] @ Wl1[e].

    Args:
        embedding_dim: D, width of the tokens.
        intermediate_dim: H, hidden width of each expert.
        num_experts: N.
        num_chosen_experts: experts that a token usually has, 1 to N. A mask may give a token
            fewer or more.
        save_percent: how much of the expert activations to save for the backward, 0 to 100; the
            backward recomputes the rest. Changes memory and time, never the result.
        Wl1_ND2H: (N, D, 2H) weights to train in place, or None for normal values times 1/D.
        Wl2_NHD: (N, H, D), likewise.
        backend: "triton", "torch" or "auto" (Triton on CUDA devices, torch elsewhere).
        device: of new weights; CUDA where there is one, else the CPU.
        dtype: of new weights, bfloat16 or float32; bfloat16 on CUDA, float32 elsewhere.

    Given weights become the parameters themselves: same storage, never a copy. They have to
    be contiguous, bfloat16 or float32, and alike in dtype and device.

    Raises:
        ValueError: an argument out of range, or weights that cannot be used in place.
    """

    def __init__(
        self,
        embedding_dim: int,
        intermediate_dim: int,
        num_experts: int,
        num_chosen_experts: int,
        save_percent: float = 0,
        Wl1_ND2H: torch.Tensor | None = None,
        Wl2_NHD: torch.Tensor | None = None,
        *,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.D = int_at_least("embedding_dim", embedding_dim, 1)
        self.H = int_at_least("intermediate_dim", intermediate_dim, 1)
        self.N = int_at_least("num_experts", num_experts, 1)
        self.K = int_at_least("num_chosen_experts", num_chosen_experts, 1)
        if self.K > self.N:
            raise ValueError(f"num_chosen_experts is {self.K}, more than num_experts, {self.N}")
        self.save_percent = validate_save_percent(save_percent)
        if backend not in BACKENDS:
            raise ValueError(f"backend is {backend!r}, must be one of {BACKENDS}")
        self.backend = backend

        device, dtype = weight_device_dtype({"Wl1_ND2H": Wl1_ND2H, "Wl2_NHD": Wl2_NHD}, device, dtype)
        place = {"std": 1 / self.D, "device": device, "dtype": dtype}
        self.Wl1_ND2H = new_or_given_weight("Wl1_ND2H", Wl1_ND2H, (self.N, self.D, 2 * self.H), **place)
        self.Wl2_NHD = new_or_given_weight("Wl2_NHD", Wl2_NHD, (self.N, self.H, self.D), **place)

    def reset_parameters(self) -> None:
        """New values for all weights, as for a new layer; given ones are overwritten in place."""
        for weight in (self.Wl1_ND2H, self.Wl2_NHD):
            nn.init.normal_(weight, std=1 / self.D)

    def forward(
        self, x_BSD: torch.Tensor, mask_NM: torch.Tensor, s_NM: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Apply to every token the experts that the mask gives it.

        Waits for the device once, to learn the largest number of experts that a token has;
        `forward_topk` never waits.

        Args:
            x_BSD: (B, S, D), or (M, D).
            mask_NM: (N, M) integers or booleans; nonzero where expert n works on token m. Any
                mask: a token may have no expert at all, or more than num_chosen_experts.
            s_NM: (N, M) scores. Read where the mask is set; elsewhere their gradient is zero.

        Returns:
            y, of x's shape, zeros for a token without experts; and tokens_per_expert_N (N,) int64.
            y has x's dtype, or autocast's under autocast.

        Raises:
            ValueError: shapes, dtypes or devices that do not fit together.
        """
        T = self._check_input(x_BSD)
        for name, tensor in (("mask_NM", mask_NM), ("s_NM", s_NM)):
            if tensor.shape != (self.N, T):
                raise ValueError(
                    f"{name} has shape {tuple(tensor.shape)}, must be (num_experts, tokens) = {(self.N, T)}"
                )
            check_device(name, tensor, x_BSD.device)
        if mask_NM.is_floating_point() or mask_NM.is_complex():
            raise ValueError(f"mask_NM has dtype {mask_NM.dtype}, must be integer or bool")
        if not s_NM.is_floating_point():
            raise ValueError(f"s_NM has dtype {s_NM.dtype}, must be a floating point dtype")
        ids_TK, scores_TK = self._slots_from_mask(mask_NM, s_NM)
        return self.forward_topk(x_BSD, ids_TK, scores_TK)

    def forward_topk(
        self, x_BSD: torch.Tensor, ids_TK: torch.Tensor, scores_TK: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Apply to every token its K listed experts, without waiting for the device.

        Args:
            x_BSD: (B, S, D), or (M, D).
            ids_TK: (M, K) int32 or int64, no expert twice in a row; an id outside [0, N) marks
                an unused slot.
            scores_TK: (M, K) floating point.

        Returns:
            y, of x's shape, and tokens_per_expert_N (N,) int64, as from `forward`.

        Raises:
            ValueError: shapes, dtypes or devices that do not fit together.
            RuntimeError: under a transform of torch.func.
        """
        refuse_torch_func(x_BSD, scores_TK, self.Wl1_ND2H, self.Wl2_NHD)
        T = self._check_input(x_BSD)
        if ids_TK.shape != scores_TK.shape or ids_TK.dim() != 2 or ids_TK.shape[0] != T:
            raise ValueError(
                f"ids_TK has shape {tuple(ids_TK.shape)} and scores_TK has shape "
                f"{tuple(scores_TK.shape)}, both must be (tokens, K) with {T} tokens"
            )
        x_TD, w1_ED2F, w2_EFD = x_BSD.reshape(T, self.D), self.Wl1_ND2H, self.Wl2_NHD
        autocast = torch.is_autocast_enabled(x_BSD.device.type)
        if not autocast:
            compute_dtype = narrower_dtype(x_BSD.dtype, w1_ED2F.dtype)
            x_TD = x_TD.to(compute_dtype)
            w1_ED2F, w2_EFD = w1_ED2F.to(compute_dtype), w2_EFD.to(compute_dtype)
        out_TD, counts_E = momoe_mlp(
            x_TD,
            w1_ED2F,
            w2_EFD,
            ids_TK,
            scores_TK,
            self.save_percent,
            backend=self.backend,
        )
        if not autocast:
            out_TD = out_TD.to(x_BSD.dtype)
        return out_TD.reshape(x_BSD.shape), counts_E

    def extra_repr(self) -> str:
        return (
            f"D={self.D}, H={self.H}, N={self.N}, K={self.K}, "
            f"save_percent={self.save_percent}, backend={self.backend!r}"
        )

    def _check_input(self, x_BSD: torch.Tensor) -> int:
        if x_BSD.dim() not in (2, 3) or x_BSD.shape[-1] != self.D:
            raise ValueError(f"x_BSD has shape {tuple(x_BSD.shape)}, must be (B, S, {self.D}) or (M, {self.D})")
        if x_BSD.dtype not in ACTIVATION_DTYPES:
            raise ValueError(f"x_BSD has dtype {x_BSD.dtype}, must be one of {ACTIVATION_DTYPES}")
        check_device("x_BSD", x_BSD, self.Wl1_ND2H.device)
        return x_BSD.shape[0] if x_BSD.dim() == 2 else x_BSD.shape[0] * x_BSD.shape[1]

    def _slots_from_mask(self, mask_NM: torch.Tensor, s_NM: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """ids_TK and their scores: each token's experts in rising order, then -1 in unused slots."""
        mask_TE = mask_NM.t() != 0
        T = mask_TE.shape[0]
        rank_TE = mask_TE.cumsum(dim=1)
        # Kernels are compiled per number of slots. K slots serve all masks of the usual width, and
        # powers of two keep the number of other widths small.
        densest = int(rank_TE[:, -1].max()) if T else 0
        slots = self.K if densest <= self.K else 1 << (densest - 1).bit_length()
        # Entries that are not set all land in one extra last column, which is cut off.
        slot_TE = torch.where(mask_TE, rank_TE - 1, slots)
        experts_TE = torch.arange(self.N, device=mask_TE.device).expand(T, self.N)
        ids_TK = torch.full((T, slots + 1), -1, device=mask_TE.device, dtype=torch.int64)
        ids_TK = ids_TK.scatter(1, slot_TE, experts_TE)[:, :slots]
        unused_TK = ids_TK < 0
        scores_TK = s_NM.t().gather(1, ids_TK.clamp(min=0)).masked_fill(unused_TK, 0.0)
        return ids_TK, scores_TK


class TopKRouter(nn.Module):
    """Chooses K experts per token: all shared experts, and the best of the others.

    Every token chooses the last num_shared_experts experts, which are called shared. Of the other
    N - Ks experts a token chooses the K - Ks with the largest softmax probability plus bias. The
    bias takes part in the choice alone (arXiv 2408.15664, section 3). The scores are the softmax
    probabilities of the chosen experts, divided by their sum. Shared experts have a softmax of their
    own: a token's scores sum to 1 over its shared experts and to 1 over its others.

    Where K - Ks is 1, the score of the one chosen expert is its softmax probability, undivided, as in
    the Switch Transformer (arXiv 2101.03961): divided by itself it would always be 1, and the router
    would get no gradient.

    The matrix product, the softmax and the choice are computed in float32, also under autocast. Of
    equal experts the lowest id is chosen. Infinite logits count as the largest finite numbers. A NaN
    makes the scores of its own token NaN, and that token still chooses K experts.

    Args:
        embedding_dim: D.
        num_experts: N, shared ones included.
        num_chosen_experts: K, shared ones included.
        num_shared_experts: Ks, 0 to K (default 0). They are among both the N and the K experts: N = 9, K = 3 and
            Ks = 1 gives each token the shared expert and two of the eight others.
        Wg_DN: (D, N) weight to train in place, or None for normal values times 1/D.
        device, dtype: of a new weight, as in `MoMoE`.

    Raises:
        ValueError: an argument out of range, or a weight that cannot be used in place.
    """

    def __init__(
        self,
        embedding_dim: int,
        num_experts: int,
        num_chosen_experts: int,
        num_shared_experts: int = 0,
        Wg_DN: torch.Tensor | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.D = int_at_least("embedding_dim", embedding_dim, 1)
        self.N = int_at_least("num_experts", num_experts, 1)
        self.K = int_at_least("num_chosen_experts", num_chosen_experts, 1)
        self.Ks = int_at_least("num_shared_experts", num_shared_experts, 0)
        if self.K > self.N:
            raise ValueError(f"num_chosen_experts is {self.K}, more than num_experts, {self.N}")
        if self.Ks > self.K:
            raise ValueError(f"num_shared_experts is {self.Ks}, more than num_chosen_experts, {self.K}")
        device, dtype = weight_device_dtype({"Wg_DN": Wg_DN}, device, dtype)
        self.Wg_DN = new_or_given_weight("Wg_DN", Wg_DN, (self.D, self.N), std=1 / self.D, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """New values for the weight, as for a new layer; a given one is overwritten in place."""
        nn.init.normal_(self.Wg_DN, std=1 / self.D)

    def forward(self, x_BSD: torch.Tensor, biases_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The choice as a mask, for `MoMoE.forward`.

        Args:
            x_BSD: (B, S, D), or (M, D).
            biases_N: (N,); the entries of shared experts are not read.

        Returns:
            x_BSD itself, mask_NM (N, M) int32 of zeros and ones, and s_NM (N, M) float32 with
            zeros where the mask is zero.
        """
        ids_TK, scores_TK = self.route(x_BSD, biases_N)
        zeros_TE = scores_TK.new_zeros(ids_TK.shape[0], self.N)
        s_NM = zeros_TE.scatter(1, ids_TK, scores_TK).t()
        mask_NM = zeros_TE.to(torch.int32).scatter(1, ids_TK, 1).t()
        return x_BSD, mask_NM, s_NM

    def route(
        self, x_BSD: torch.Tensor, biases_N: torch.Tensor, margins_EB: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The choice as lists, for `MoMoE.forward_topk`.

        Args:
            x_BSD, biases_N: as in `forward`.
            margins_EB: of the routed experts, int32, to which the tokens' margins are added (see
                `kernels.quantile`), or None.

        Returns:
            ids_TK (M, K) int64, rising in every row, and scores_TK (M, K) float32.

        Raises:
            ValueError: x or biases have another shape or device than the weight asks for.
            RuntimeError: under a transform of torch.func.
        """
        refuse_torch_func(x_BSD, self.Wg_DN)
        if x_BSD.dim() not in (2, 3) or x_BSD.shape[-1] != self.D:
            raise ValueError(f"x_BSD has shape {tuple(x_BSD.shape)}, must be (B, S, {self.D}) or (M, {self.D})")
        if biases_N.shape != (self.N,):
            raise ValueError(f"biases_N has shape {tuple(biases_N.shape)}, must be {(self.N,)}")
        check_device("x_BSD", x_BSD, self.Wg_DN.device)
        check_device("biases_N", biases_N, self.Wg_DN.device)
        logits_TE = float32_product(x_BSD.reshape(-1, self.D), self.Wg_DN.t())
        routed, split = self.N - self.Ks, self.K - self.Ks
        bias_E = biases_N[:routed].detach().float()
        # Of one expert it is the probability itself: a share of one is 1 whatever the logit.
        score_func = "softmax" if split == 1 else "softmax_of_chosen"
        scores_TK, ids_TK = route_tokens(logits_TE[:, :routed], bias_E, split, score_func)
        if margins_EB is not None:
            accumulate_margins(margins_EB, None, None, logits_TE[:, :routed].detach(), bias_E, ids_TK, "softmax")
        if not self.Ks:
            return ids_TK, scores_TK
        shared_ids = torch.arange(routed, self.N, device=logits_TE.device)
        ids_TK = torch.cat([ids_TK, shared_ids.expand(logits_TE.shape[0], self.Ks)], dim=1)
        scores_TK = torch.cat([scores_TK, expert_scores(logits_TE[:, routed:], "softmax")], dim=1)
        return ids_TK, scores_TK

    def extra_repr(self) -> str:
        return f"D={self.D}, N={self.N}, K={self.K}, Ks={self.Ks}"


class MoE(Float32Buffers):
    """A `TopKRouter` and `MoMoE` experts, kept in balance without an auxiliary loss.

    The forward changes no bias. The training loop moves the biases once per optimizer step, after
    all its microbatches (arXiv 2408.15664, algorithm 1):

        handle = moe.register_bias_update(optimizer)     # or call moe.update_biases()

    Tokens per expert are counted in training mode with gradients enabled. Not counted: evaluation,
    forwards under no_grad, and forwards that activation checkpointing recomputes. (With
    use_reentrant=True the recomputed forward is counted in place of the first, which has no gradients.)

    Args:
        bias_update_rate: u >= 0, how far a bias moves per step; 0 leaves it as it is. The rule "quantile"
            reads of it only whether it is 0. The default, 1e-4, is a tenth of the TOML's load_balance_rate:
            this layer's softmax scores are about 1/N, where the sigmoid scores of the flavors are about a half.
        bias_update_rule: "quantile", which solves for the bias (see `moe.balancing.quantile_delta`), or
            "sign" or "proportional" (see `bias_delta`).
        the others: as in `MoMoE` and `TopKRouter`.

    Buffers:
        biases_N: (N,) float32, whatever dtype the module is cast to; in the state dict. Entries
            of shared experts stay 0.
        counts_N: (N,) int64, tokens per expert since the last bias update.
        margins_EB: what the rule "quantile" counts of the routed experts since then, or None.

    Raises:
        ValueError: an argument out of range, or weights that cannot be used in place.
    """

    float32_buffers = ("biases_N",)
    margins_EB: torch.Tensor | None
    biases_N: torch.Tensor
    counts_N: torch.Tensor

    def __init__(
        self,
        embedding_dim: int,
        intermediate_dim: int,
        num_experts: int,
        num_chosen_experts: int,
        num_shared_experts: int = 0,
        save_percent: float = 0,
        bias_update_rate: float = 1e-4,
        Wg_DN: torch.Tensor | None = None,
        Wl1_ND2H: torch.Tensor | None = None,
        Wl2_NHD: torch.Tensor | None = None,
        *,
        bias_update_rule: str = Momoe.load_balance_rule,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self._set_bias_update(bias_update_rate, bias_update_rule)
        if device is None:
            # Router and experts may differ in dtype, but not in device. It is that of the first
            # given weight; the others are checked against it below.
            given = [w for w in (Wl1_ND2H, Wl2_NHD, Wg_DN) if isinstance(w, torch.Tensor)]
            device = given[0].device if given else None
        gate_dtype = None if Wg_DN is not None else dtype
        self.router = TopKRouter(
            embedding_dim, num_experts, num_chosen_experts, num_shared_experts, Wg_DN, device=device, dtype=gate_dtype
        )
        self.momoe = MoMoE(
            embedding_dim,
            intermediate_dim,
            num_experts,
            num_chosen_experts,
            save_percent,
            Wl1_ND2H,
            Wl2_NHD,
            backend=backend,
            device=device,
            dtype=dtype,
        )
        self.N, self.Ks = self.router.N, self.router.Ks
        self._register_balance_buffers(self.momoe.Wl1_ND2H.device)

    def _set_bias_update(self, rate: float, rule: str) -> None:
        if rule not in BALANCE_RULES:
            raise ValueError(f"bias_update_rule is {rule!r}, must be one of {BALANCE_RULES}")
        if isinstance(rate, bool) or not isinstance(rate, (int, float)):
            raise ValueError(f"bias_update_rate is {rate!r}, must be a number")
        if not 0 <= rate < float("inf"):
            raise ValueError(f"bias_update_rate is {rate}, must be finite and >= 0")
        self.bias_update_rate, self.bias_update_rule = rate, rule

    def _register_balance_buffers(self, device: torch.device) -> None:
        self.register_buffer("biases_N", torch.zeros(self.N, dtype=torch.float32, device=device))
        self.register_buffer("counts_N", torch.zeros(self.N, dtype=torch.int64, device=device), persistent=False)
        routed, split = self.N - self.Ks, self.router.K - self.Ks
        margins_EB = None
        if self.bias_update_rule == QUANTILE and self.bias_update_rate and 0 < split < routed:
            margins_EB = torch.zeros(routed, NUM_BINS, dtype=torch.int32, device=device)
        self.register_buffer("margins_EB", margins_EB, persistent=False)

    def reset_parameters(self) -> None:
        """New values for all weights; biases and counts start at 0. Makes a layer from `to_empty` usable."""
        self.router.reset_parameters()
        self.momoe.reset_parameters()
        for buffer in self.buffers():
            buffer.zero_()

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        """x_BSD (B, S, D) or (M, D) -> y of the same shape. Does not wait for the device."""
        margins_EB = self.margins_EB if feeds_balancing(self) else None
        ids_TK, scores_TK = self.router.route(x_BSD, self.biases_N, margins_EB)
        y_BSD, counts_N = self.momoe.forward_topk(x_BSD, ids_TK, scores_TK)
        record_counts(self, self.counts_N, counts_N)
        return y_BSD

    @torch.no_grad()
    def update_biases(self, process_group: "torch.distributed.ProcessGroup | None" = None) -> None:
        """Move the biases by the rule, those of shared experts aside; then set the counts to 0.

        Args:
            process_group: the ranks to sum the counts over first, so that data-parallel replicas
                move their biases alike. Pass broadcast_buffers=False to DistributedDataParallel,
                which otherwise overwrites the counts of all ranks but one.
        """
        if process_group is not None:
            torch.distributed.all_reduce(self.counts_N, group=process_group)
        biases_E = self.biases_N[: self.N - self.Ks]
        if self.margins_EB is not None:
            if process_group is not None:
                torch.distributed.all_reduce(self.margins_EB, group=process_group)
            margins_LEB = self.margins_EB[None].long()
            how = self.router.K - self.Ks, AVERAGE
            biases_E += quantile_delta(margins_LEB, biases_E[None], *how)[0]
            self.margins_EB.zero_()
        elif self.bias_update_rule != QUANTILE:
            biases_E += bias_delta(self.counts_N[: len(biases_E)], self.bias_update_rate, self.bias_update_rule)
        self.counts_N.zero_()

    def register_bias_update(
        self,
        optimizer: torch.optim.Optimizer,
        process_group: "torch.distributed.ProcessGroup | None" = None,
    ) -> RemovableHandle:
        """Call `update_biases` after every `optimizer.step()`; `.remove()` the handle to stop."""
        return optimizer.register_step_post_hook(lambda *args, **kwargs: self.update_biases(process_group))
