"""The differentiable op of the experts: checks inputs, saves tensors for the backward, calls the kernels.

``momoe_mlp`` checks its inputs once; the functions that it calls rely on that.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue] - its stubs leave it out
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad

from momoe_titan.kernels import biases, combine, decode, gpu
from momoe_titan.kernels.activations import is_gated
from momoe_titan.kernels.derivative import register_derivative
from momoe_titan.kernels.experts import Experts, validate_experts
from momoe_titan.kernels.gemms import ZRows, select_gemms
from momoe_titan.kernels.launch import on_its_device
from momoe_titan.kernels.memory_schedule import LayerSizes, MemorySchedule, memory_schedule
from momoe_titan.kernels.outlet import Sending, sending_by, stage_copy
from momoe_titan.kernels.reference import torch_backward, torch_forward
from momoe_titan.kernels.routing import (
    MAX_EXPERTS,
    MAX_TILES,
    RoutingMetadata,
    build_routing_ref,
    packed_size,
    route_rows,
    unpack_routing,
)
from momoe_titan.save_percent import num_saved_rows, validate_save_percent

BACKENDS = ("auto", "triton", "torch")
_REFERENCE_TILE_ROWS = 128

_lib = torch.library.Library("momoe_titan", "DEF")
_KIND = (  # see Experts
    "Tensor? gate=None, Tensor? bias1=None, Tensor? bias2=None, str activation='swiglu', str order='up_gate',"
    " bool scores_on_input=False, str outlet=''"
)
_NUM_KIND = 6  # of these, those that Experts takes
_lib.define(
    "moe_forward(Tensor x, Tensor w1, Tensor w2, Tensor ids, Tensor scores, SymInt num_rows, float save_percent,"
    f" bool inference, str backend, SymInt? usual_rows=None, bool trains_w1=True, bool trains_w2=True, {_KIND})"
    " -> (Tensor out, Tensor counts, Tensor z, Tensor routing)"
)
for _name, _z in (("moe_backward", "Tensor"), ("moe_backward_over_z", "Tensor(a!)")):  # the latter leaves no z
    _lib.define(
        f"{_name}(Tensor dout, Tensor x, Tensor w1, Tensor w2, Tensor scores, {_z} z, Tensor routing, SymInt num_rows,"
        f" float save_percent, bool[] needs, str backend, SymInt? usual_rows=None, {_KIND})"
        " -> (Tensor dx, Tensor dw1, Tensor dw2, Tensor dscores, Tensor dgate, Tensor dbias1, Tensor dbias2)"
    )


@dataclass(frozen=True)
class SavedForBackward:
    """Everything that the forward saves for the backward.

    z is what save_percent is about: at T=3, K=2, F=4 and save_percent 50, R=6 rows are routed, z_S2F is (3, 8),
    and the backward computes the last 3 rows of z again, from x and w1.
    """

    x_TD: Tensor
    experts: Experts
    scores_TK: Tensor
    z_S2F: Tensor  # x @ w1 of the first S routed rows; its storage may have been freed since, see `momoe_mlp`, on_saved
    packed_routing: Tensor  # int32, see `unpack_routing`
    num_rows: int  # R
    save_percent: float
    backend: str  # "triton" or "torch"
    usual_rows: int | None = None  # see `momoe_mlp`

    def routing(self, tile_rows: int) -> RoutingMetadata:
        num_experts = self.experts.w2.shape[0]
        num_tokens, num_chosen = self.scores_TK.shape
        return unpack_routing(self.packed_routing, num_tokens, num_chosen, num_experts, tile_rows, self.num_rows)

    def rows_of_z(self) -> Tensor:
        """z_S2F, without any rows where its storage has been freed."""
        evicted = self.z_S2F.numel() and not self.z_S2F.untyped_storage().nbytes()
        return self.z_S2F.new_empty(0, self.z_S2F.shape[1]) if evicted else self.z_S2F

    def free_z(self) -> None:
        """Free z, which autograd would hold until the backward ends.

        Not where hooks of saved tensors have made z a part of a larger tensor.
        """
        storage = self.z_S2F.untyped_storage()
        if storage.nbytes() == self.z_S2F.nbytes:
            storage.resize_(0)


class Needs(NamedTuple):
    """Which gradients the backward has to compute."""

    x: bool
    w1: bool
    w2: bool
    scores: bool
    gate: bool = False
    bias1: bool = False
    bias2: bool = False


def _tile_rows(x_TD: Tensor, experts: Experts, backend: str) -> int:
    return _REFERENCE_TILE_ROWS if backend == "torch" else select_gemms(x_TD, experts).tile_rows


def _aligned(t: Tensor) -> Tensor:
    """t, or a copy where it is a view that does not start on 16 bytes, as the copy engine wants it."""
    return t.clone() if gpu.planned() is None and t.data_ptr() % 16 else t


_layer_sizes = functools.lru_cache(maxsize=1024)(LayerSizes)  # to make one takes longer than to find it


def _schedule(
    gemms, x_TD: Tensor, experts: Experts, num_rows: int, inference: bool, *, trains_w1: bool = True,
    trains_w2: bool = True,
) -> MemorySchedule:  # fmt: skip
    """What suits `num_rows`, the usual number of rows if more are allocated, and the weights that get a gradient."""
    num_experts, ffn, d_model = experts.w2.shape
    gated = is_gated(experts.activation)
    sizes = _layer_sizes(
        x_TD.shape[0], num_rows, num_experts, d_model, ffn, x_TD.element_size(), gated, trains_w1, trains_w2
    )
    if (planned := gpu.planned()) is not None:
        # More rows could mean more ranges, and an early dw2. Both take less memory, so the plan is never too low.
        sizes = sizes.fair_share(*planned.load)
    return memory_schedule(sizes, gemms.traits, inference)


def _aligned_experts(experts: Experts) -> Experts:
    """Experts whose weights are `_aligned`; w1 and gate are copied together, since their strides have to be equal."""
    w1, w2, gate = _aligned(experts.w1), _aligned(experts.w2), experts.gate
    if gate is not None and (w1 is not experts.w1 or _aligned(gate) is not gate):
        w1, gate = experts.w1.clone(), gate.clone()
    if w1 is experts.w1 and w2 is experts.w2:
        return experts
    return replace(experts, w1=w1, w2=w2, gate=gate)


def _combined(
    gemm, rows, experts: Experts, routing, scores_TK, out_TD, ranges, *, ids_TK=None, sending: Sending | None = None
):
    """out_TD = the combined rows of a GEMM, one range of columns after another: only one range of its rows exists.

    ids_TK: where the output bias is added.
    sending: takes the rows of others before this rank's own are combined.
    """
    num_rows = rows.shape[0]
    biases = None if ids_TK is None or experts.bias2 is None else (ids_TK, experts.bias2)
    if sending is None and len(ranges) == 1:
        y = out_TD.new_empty(num_rows, out_TD.shape[1])
        gemm(rows, experts, routing, y, 0)
        combine.combine(y, routing, scores_TK, out_TD, biases)
        return
    buffer = out_TD.new_empty(num_rows * max(end - begin for begin, end in ranges))
    blocks = None if sending is None else sending.stage(out_TD)
    for begin, end in ranges:
        y = buffer[: num_rows * (end - begin)].view(num_rows, end - begin)
        gemm(rows, experts, routing, y, begin)
        some = None if biases is None else (biases[0], biases[1][:, begin:end])
        if blocks is None:
            combine.combine(y, routing, scores_TK, out_TD[:, begin:end], some)
            continue
        assert sending is not None
        for first, _, place in blocks.sent:
            combine.combine(y, routing, scores_TK, place[:, begin:end], some, first)
        if end == ranges[-1][1]:
            sending.start()
        first, last = blocks.kept
        combine.combine(y, routing, scores_TK, out_TD[first:last, begin:end], some, first)


def _forward(
    x_TD, w1, w2_EFD, ids_TK, scores_TK, num_rows, save_percent, inference, backend,
    usual_rows=None, trains_w1=True, trains_w2=True, *kind,
):  # fmt: skip
    experts, sending = Experts(w1, w2_EFD, *kind[:_NUM_KIND]), sending_by(*kind[_NUM_KIND:])
    num_experts, ffn, _ = w2_EFD.shape
    usual_rows = num_rows if usual_rows is None else usual_rows
    num_tokens, num_chosen = ids_TK.shape
    # Before weights are copied to be aligned, which may change their strides: backward and fake tensors ask for these.
    gemms = None if backend == "torch" else select_gemms(x_TD, experts)
    tile_rows = _REFERENCE_TILE_ROWS if gemms is None else gemms.tile_rows
    max_rows = tile_rows * MAX_TILES * (1 if (planned := gpu.planned()) is None else planned.load.rows)
    num_saved = num_saved_rows(usual_rows, save_percent)
    if num_rows > max_rows:
        raise ValueError(f"T * K must be at most {max_rows}, got {num_rows}: split the batch")
    if gemms is None:
        packed, counts_E = build_routing_ref(ids_TK, scores_TK, num_experts, tile_rows, num_rows)
        routing = unpack_routing(packed, num_tokens, num_chosen, num_experts, tile_rows, num_rows)
        with torch.autocast(x_TD.device.type, enabled=False):
            out_TD, z_S2F = torch_forward(x_TD, experts, scores_TK, routing, num_saved)
        _send_all(sending, out_TD)
        return out_TD, counts_E, z_S2F, packed.new_empty(0) if inference else packed

    x_TD, experts = _aligned(x_TD), _aligned_experts(experts)
    if inference and decode.supported(x_TD.dtype, *ids_TK.shape):
        out_TD, counts_E = decode.forward(x_TD, experts, ids_TK, scores_TK)
        _send_all(sending, out_TD)
        return out_TD, counts_E, x_TD.new_empty(0, experts.width), ids_TK.new_empty(0, dtype=torch.int32)
    packed, counts_E, routing = route_rows(ids_TK, scores_TK, num_experts, tile_rows, num_rows)
    z_SZ = x_TD.new_empty(num_saved, experts.width)
    act_RF = x_TD.new_empty(num_rows, ffn)
    gemms.up_proj(x_TD, experts, routing, act_RF, z_SZ, saves_z=save_percent > 0)
    out_TD = torch.empty_like(x_TD)
    schedule = _schedule(gemms, x_TD, experts, usual_rows, inference, trains_w1=trains_w1, trains_w2=trains_w2)
    weights_TK = None if experts.scores_on_input else scores_TK
    where = weights_TK, out_TD, schedule.y_ranges
    _combined(gemms.down_proj, act_RF, experts, routing, *where, ids_TK=ids_TK, sending=sending)
    return out_TD, counts_E, z_SZ, packed.new_empty(0) if inference else packed


def _send_all(sending: Sending | None, *results: Tensor) -> None:
    """Send results that are there already."""
    if sending is not None and results:
        for rows in results:
            stage_copy(sending, rows)
        sending.start()


def _backward(
    dout_TD,
    x_TD,
    w1,
    w2,
    scores_TK,
    z,
    packed,
    num_rows,
    save_percent,
    needs,
    backend,
    usual_rows=None,
    *kind,
    over_z=False,
):
    experts, needs = Experts(w1, w2, *kind[:_NUM_KIND]), Needs(*needs)
    sending = sending_by(*kind[_NUM_KIND:])
    saved = SavedForBackward(x_TD, experts, scores_TK, z, packed, num_rows, save_percent, backend, usual_rows)
    if backend == "triton":
        return _triton_backward(dout_TD.contiguous(), saved, needs, over_z, sending)
    grads = torch_backward(
        dout_TD.contiguous(), x_TD, experts, scores_TK, saved.rows_of_z(), saved.routing(_REFERENCE_TILE_ROWS)
    )
    _send_all(sending, *(grads[name] for name in ("scores", "x") if getattr(needs, name)))
    return tuple(grads[name] if need else x_TD.new_empty(0) for name, need in zip(_INPUTS, needs, strict=True))


def _triton_backward(
    dout_TD: Tensor, saved: SavedForBackward, needs: Needs, over_z: bool, sending: Sending | None = None
) -> tuple[Tensor, ...]:
    """The gradients of `Needs`, empty where not needed. What is deleted here, and when, decides the memory peak."""
    num_rows, scores_TK = saved.num_rows, saved.scores_TK
    usual_rows = num_rows if saved.usual_rows is None else saved.usual_rows
    gemms: Any = select_gemms(saved.x_TD, saved.experts)  # z and dz have the form that this family of kernels takes
    z_SZ, routing = saved.rows_of_z(), saved.routing(gemms.tile_rows)
    num_saved = z_SZ.shape[0]
    dout_TD, x_TD, experts = _aligned(dout_TD), _aligned(saved.x_TD), _aligned_experts(saved.experts)
    trains_w1 = needs.w1 or needs.gate
    schedule = _schedule(gemms, x_TD, experts, usual_rows, False, trains_w1=trains_w1, trains_w2=needs.w2)

    all_saved = saved.save_percent == 100 and usual_rows == num_rows
    z, dz = gemms.z_and_dz(z_SZ, num_rows, over_z, some=saved.save_percent > 0 and not all_saved)
    del z_SZ
    if num_saved < num_rows:
        gemms.recompute_z(x_TD, experts, routing, z, dz)
    act_RF = x_TD.new_empty(num_rows, experts.ffn) if needs.w2 else None
    # A saved z has its bias, but with scores on the input: only its gradient needs it here then.
    has_bias = needs.bias1 or experts.scores_on_input or experts.bias1 is None
    kind = experts if has_bias else replace(experts, bias1=None)
    dscore, bias_sums = gemms.down_proj_backward(dout_TD, kind, routing, z, dz, act_RF)
    dbias1, dbias2 = _bias_grads(experts, routing, dout_TD, dscore, bias_sums, needs)
    dscores_TK = _score_grad(dscore, routing, scores_TK, needs.scores)
    if sending is not None and needs.scores:
        stage_copy(sending, dscores_TK)
        if not needs.x:
            sending.start()
    del dscore, bias_sums
    if over_z and z is not dz:
        saved.free_z()

    dw2 = experts.w2.new_empty(0)
    if needs.w2 and not schedule.dw2_last:
        dw2 = torch.empty_like(experts.w2)
        gemms.down_weight_grad(act_RF, dout_TD, routing, dw2)
    if not schedule.dw2_last:
        del act_RF
    dx_TD = torch.empty_like(x_TD) if needs.x else x_TD.new_empty(0)
    if needs.x:
        _combined(gemms.up_proj_backward, dz, experts, routing, None, dx_TD, schedule.dx_ranges, sending=sending)
    dw1, dgate = _up_weight_grads(gemms, x_TD, dz, routing, experts, needs)
    if schedule.dw2_last:
        del z, dz
        if over_z:
            saved.free_z()
        dw2 = torch.empty_like(experts.w2)
        gemms.down_weight_grad(act_RF, dout_TD, routing, dw2)
    return dx_TD, dw1, dw2, dscores_TK, dgate, dbias1, dbias2


def _score_grad(dscore: Tensor, routing: RoutingMetadata, scores_TK: Tensor, needed: bool) -> Tensor:
    """The scores' gradient from the partial sums of `down_proj_backward`."""
    if not needed:
        return scores_TK.new_empty(0)
    dscores_TK = torch.empty_like(scores_TK)
    combine.score_grad(dscore, routing, dscores_TK)
    return dscores_TK


def _bias_grads(
    experts: Experts, routing: RoutingMetadata, dout_TD: Tensor, dscore: Tensor, sums: Tensor | None, needs: Needs
) -> tuple[Tensor, Tensor]:
    """The gradients of both biases; adds what the output's bias adds to the gradients of scores to `dscore`.

    Args:
        dscore, sums: of `down_proj_backward`.
    """
    dbias1, dbias2 = dout_TD.new_empty(0), dout_TD.new_empty(0)
    if sums is not None and needs.bias1 and experts.bias1 is not None:
        dbias1 = torch.empty_like(experts.bias1)
        biases.sum_tiles(sums, routing, dbias1)
    weighted = not experts.scores_on_input
    if experts.bias2 is not None and (needs.bias2 or (weighted and needs.scores)):
        sums, dot_R = biases.output_bias_backward(dout_TD, experts.bias2, routing, weighted)
        if weighted:
            dscore[:, 0] += dot_R
        if needs.bias2:
            dbias2 = torch.empty_like(experts.bias2)
            biases.sum_tiles(sums, routing, dbias2)
    return dbias1, dbias2


def _up_weight_grads(gemms, x_TD, dz: ZRows, routing, experts: Experts, needs: Needs) -> tuple[Tensor, Tensor]:
    """The gradients of w1 and gate, empty where not needed."""
    dw1 = torch.empty_like(experts.w1) if needs.w1 else None
    dgate = torch.empty_like(experts.gate) if needs.gate and experts.gate is not None else None
    if needs.w1 or needs.gate:
        gemms.up_weight_grad(x_TD, dz, routing, [dw1] if experts.gate is None else [dw1, dgate])
    return dw1 if dw1 is not None else x_TD.new_empty(0), dgate if dgate is not None else x_TD.new_empty(0)


_backward_over_z = functools.partial(_backward, over_z=True)

for _name, _body in (("forward", _forward), ("backward", _backward), ("backward_over_z", _backward_over_z)):
    _lib.impl(f"moe_{_name}", on_its_device(_body), "CompositeExplicitAutograd")

# For the memory planner: a trace sees that an op runs; the implementation shows what is allocated inside.
IMPLEMENTATIONS = {
    torch.ops.momoe_titan.moe_forward.default: _forward,
    torch.ops.momoe_titan.moe_backward.default: _backward,
    torch.ops.momoe_titan.moe_backward_over_z.default: _backward_over_z,
}


@torch.library.register_fake("momoe_titan::moe_forward", lib=_lib)
def _forward_fake(
    x_TD, w1, w2_EFD, ids_TK, scores_TK, num_rows, save_percent, inference, backend,
    usual_rows=None, trains_w1=True, trains_w2=True, *kind,
):  # fmt: skip
    experts = Experts(w1, w2_EFD, *kind[:_NUM_KIND])
    num_tokens, num_chosen = ids_TK.shape
    num_experts = w2_EFD.shape[0]
    tile_rows = _tile_rows(x_TD, experts, backend)
    packed = 0 if inference else packed_size(num_tokens, num_chosen, num_experts, tile_rows, num_rows)
    return (
        torch.empty_like(x_TD),
        ids_TK.new_empty(num_experts, dtype=torch.int64),
        x_TD.new_empty(num_saved_rows(num_rows if usual_rows is None else usual_rows, save_percent), experts.width),
        ids_TK.new_empty(packed, dtype=torch.int32),
    )


@torch.library.register_fake("momoe_titan::moe_backward", lib=_lib)
@torch.library.register_fake("momoe_titan::moe_backward_over_z", lib=_lib)
def _backward_fake(dout, x, w1, w2, scores, z, packed, num_rows, save_percent, needs, backend, usual_rows=None, *kind):
    inputs = (x, w1, w2, scores, *kind[:3])
    some = zip(inputs, Needs(*needs), strict=False)
    grads = [torch.empty_like(t) if need else x.new_empty(0) for t, need in some]
    return (*grads, *(x.new_empty(0) for _ in range(len(_INPUTS) - len(grads))))


def overwrites_z(*args: Any) -> bool:
    """Whether `moe_backward_over_z` of these arguments writes dz over z, on the "triton" backend."""
    _, x_TD, w1, w2, *_ = args
    return select_gemms(x_TD, Experts(w1, w2, *args[12 : 12 + _NUM_KIND])).traits.dz_over_z


def _setup_context(ctx, inputs, output):
    x_TD, w1, w2, _, scores_TK, ctx.num_rows, ctx.save_percent, _, ctx.backend, *more = inputs
    _, counts_E, z_S2F, packed = output
    ctx.usual_rows, *more = more or [None]
    more = more[2:]
    ctx.kind = more[3:]
    ctx.mark_non_differentiable(counts_E, z_S2F, packed)
    ctx.set_materialize_grads(False)  # else the backward would get a zero gradient as large as z
    ctx.save_for_backward(x_TD, w1, w2, scores_TK, z_S2F, packed, *more[:3])


def _is_last_use(z_S2F: Tensor, dout_TD: Tensor) -> bool:
    """Whether nobody needs z after this backward: it runs now, is not traced, and its graph is not kept."""
    if (planned := gpu.planned()) is not None and planned.compiled:
        return False
    if torch.compiler.is_compiling() or isinstance(z_S2F, FunctionalTensor) or torch.is_grad_enabled():
        return False
    if _functorch.is_legacy_batchedtensor(dout_TD):  # is_grads_batched: once for each of several gradients
        return False
    return not torch._C._autograd._get_current_graph_task_keep_graph()  # pyright: ignore[reportAttributeAccessIssue] - not in stubs


class _OnceDifferentiable(torch.autograd.Function):
    """Passes the gradients on, and raises an error when they are differentiated again."""

    @staticmethod
    def forward(ctx, num_inputs, *inputs_and_grads):
        return tuple(grad.view_as(grad) for grad in inputs_and_grads[num_inputs:])

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError("momoe_mlp has no second derivative")


_NUM_INPUTS = 19
_INPUTS = {"x": 0, "w1": 1, "w2": 2, "scores": 4, "gate": 12, "bias1": 13, "bias2": 14}  # places among the op's inputs


def _is_needed(ctx, name: str, place: int) -> bool:
    """Whether an input gets a gradient."""
    # The dispatcher leaves out arguments that have their default; the last of these is none of the op's.
    if place >= len(ctx.needs_input_grad) or not ctx.needs_input_grad[place]:
        return False
    if name not in ("x", "scores") or not any(ctx.kind[_NUM_KIND - 3 :]):
        return True
    # What an outlet sends, somebody has to wait for. A zero-bubble pipeline runs this backward twice, the second time
    # for the weights alone.
    node = ctx.next_functions[place][0]
    return hasattr(node, "variable") or torch._C._will_engine_execute_node(node)


def _autograd_backward(ctx, dout_TD, *_):
    if dout_TD is None:
        return (None,) * _NUM_INPUTS
    x_TD, w1, w2, scores_TK, z_S2F, packed, *more = ctx.saved_tensors
    needs = [_is_needed(ctx, name, place) for name, place in _INPUTS.items()]
    backward = torch.ops.momoe_titan.moe_backward
    if _is_last_use(z_S2F, dout_TD):
        backward = torch.ops.momoe_titan.moe_backward_over_z
        torch.autograd.graph.increment_version(z_S2F)  # another backward after an error in this one is refused
    sizes = ctx.num_rows, ctx.save_percent, needs, ctx.backend, ctx.usual_rows
    with torch.no_grad():
        grads = backward(dout_TD, x_TD, w1, w2, scores_TK, z_S2F, packed, *sizes, *more, *ctx.kind)
    if torch.is_grad_enabled():  # create_graph
        inputs = dout_TD, x_TD, w1, w2, scores_TK, *(t for t in more if t is not None)
        grads = _OnceDifferentiable.apply(len(inputs), *inputs, *grads)
    result: list[Tensor | None] = [None] * _NUM_INPUTS
    for place, grad, need in zip(_INPUTS.values(), grads, needs, strict=True):
        if need:
            result[place] = grad
    return tuple(result)


register_derivative(_lib, torch.ops.momoe_titan.moe_forward.default, _autograd_backward, _setup_context)


def resolve_backend(backend: str, device: torch.device) -> str:
    """ "triton" or "torch" for a device; "auto" takes Triton on a CUDA device."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    if gpu.planned() is not None:  # the "torch" backend, which is for checks, is not planned
        return "triton"
    runs_triton = device.type == "cuda" or gpu.interpreting()
    if backend == "triton" and not runs_triton:
        raise ValueError(f"backend 'triton' needs a CUDA device (or TRITON_INTERPRET=1), got tensors on {device}")
    if backend == "auto":
        return "triton" if device.type == "cuda" else "torch"
    return backend


def _validate(x_TD, experts: Experts, ids_TK, scores_TK, num_rows):
    w1, w2 = experts.w1, experts.w2
    if x_TD.dim() != 2 or any(w.dim() != 3 for w in experts.weights) or ids_TK.dim() != 2:
        raise ValueError(
            "x, w1, w2, ids must be (T, D), (E, D, 2F), (E, F, D), (T, K), got "
            f"{[tuple(t.shape) for t in (x_TD, w1, w2, ids_TK)]}"
        )
    num_experts, _, d_model = w2.shape
    if not 1 <= num_experts <= MAX_EXPERTS:
        raise ValueError(f"w2 must be of 1 to {MAX_EXPERTS} experts, got {tuple(w2.shape)}")
    validate_experts(experts)
    if x_TD.shape[1] != d_model:
        raise ValueError(f"x must have D = {d_model} columns, got {tuple(x_TD.shape)}")
    if ids_TK.shape[0] != x_TD.shape[0] or scores_TK.shape != ids_TK.shape:
        raise ValueError(
            f"ids and scores must both be (T, K) with T = {x_TD.shape[0]}, got "
            f"{tuple(ids_TK.shape)} and {tuple(scores_TK.shape)}"
        )
    if ids_TK.shape[1] == 0:
        raise ValueError(f"ids must have at least one column, got {tuple(ids_TK.shape)}")
    _validate_num_rows(num_rows, ids_TK.numel())
    if ids_TK.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"ids must be int32 or int64, got {ids_TK.dtype}")
    if not scores_TK.is_floating_point():
        raise ValueError(f"scores must be of a floating dtype, got {scores_TK.dtype}")
    if x_TD.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"x must be bfloat16, float16 or float32, got {x_TD.dtype}")
    weights = experts.tensors
    if any(t.dtype != x_TD.dtype for t in weights):
        raise ValueError(
            f"x, weights and biases must share a dtype outside of autocast, got {x_TD.dtype}, "
            f"{', '.join(str(t.dtype) for t in weights)}"
        )
    tensors = x_TD, ids_TK, scores_TK, *weights
    if len({t.device for t in tensors}) != 1:
        devices = [str(t.device) for t in tensors]
        raise ValueError(f"x, ids, scores, weights and biases must be on one device, got {devices}")


def _validate_num_rows(num_rows, num_slots: int) -> None:
    if num_rows is None:
        return
    if isinstance(num_rows, bool) or not isinstance(num_rows, (Integral, torch.SymInt)):
        raise ValueError(f"num_rows must be an int, got {num_rows!r}")
    if not 0 <= num_rows <= num_slots:  # pyright: ignore[reportOperatorIssue] - an int
        raise ValueError(f"num_rows must be from 0 to T * K = {num_slots}, got {num_rows}")


def _validate_ids(ids_TK, num_experts, num_rows):
    if num_rows is not None:
        used = int(((ids_TK >= 0) & (ids_TK < num_experts)).sum())
        if used > num_rows:
            raise ValueError(f"num_rows must be at least the number of used slots, {used}, got {num_rows}")
        return
    bad = ids_TK[(ids_TK < 0) | (ids_TK >= num_experts)]
    if bad.numel():
        raise ValueError(f"ids must be in [0, {num_experts}), got {bad[0].item()}")
    twice = ids_TK.sort(dim=1)[0].diff(dim=1) == 0
    if twice.any():
        token = int(twice.any(dim=1).nonzero()[0])
        raise ValueError(
            f"ids must not name an expert twice for a token, got {ids_TK[token].tolist()} for token {token}"
        )


def _wants_grad(*inputs: Tensor) -> bool:
    if torch.compiler.is_compiling():
        return torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in inputs):
        raise RuntimeError("momoe_mlp has no forward-mode derivative")
    if not torch.is_grad_enabled():
        return False
    for t in inputs:
        while not t.requires_grad and _functorch.is_functorch_wrapped_tensor(t):  # within torch.func.vmap, it says no
            t = _functorch.get_unwrapped(t)
        if t.requires_grad:
            return True
    return False


def _gathered(
    w1: Tensor | tuple[Tensor, Tensor], w2: Tensor, bias1: Any, bias2: Tensor | None, dtype: torch.dtype | None, *kind
) -> Experts:
    """Experts of what the caller gave, in `dtype` if that is one."""
    up, gate = w1 if isinstance(w1, tuple | list) else (w1, None)
    if isinstance(bias1, tuple | list):
        bias1 = torch.cat(bias1, dim=1)
    bias1 = None if bias1 is None else bias1.contiguous()
    bias2 = None if bias2 is None else bias2.contiguous()
    if dtype is not None:
        up, w2 = up.to(dtype), w2.to(dtype)
        gate, bias1, bias2 = (None if t is None else t.to(dtype) for t in (gate, bias1, bias2))
    return Experts(up, w2, gate, bias1, bias2, *kind)


def momoe_mlp(
    x_TD: Tensor,
    w1_EDZ: Tensor | tuple[Tensor, Tensor],
    w2_EFD: Tensor,
    ids_TK: Tensor,
    scores_TK: Tensor,
    save_percent: float = 0.0,
    *,
    bias1: Tensor | tuple[Tensor, Tensor] | None = None,
    bias2: Tensor | None = None,
    activation: str = "swiglu",
    order: str = "up_gate",
    scores_on_input: bool = False,
    num_rows: int | None = None,
    usual_rows: int | None = None,
    backend: str = "auto",
    check_ids: bool = False,
    on_saved: Callable[[Tensor], None] | None = None,
    outlet: str = "",
) -> tuple[Tensor, Tensor]:
    """Mixture of experts: ``out[t] = sum_k scores[t, k] * ((up * silu(gate)) @ w2[e] + bias2[e])``,
    with ``[up, gate] = x[t] @ w1[e] + bias1[e]`` and ``e = ids[t, k]``.

    Differentiable in x, the weights, the biases and scores, backwards and once: another derivative is
    refused. Accumulates in float32, is deterministic to the bit, and neither synchronises
    with the host nor compiles anything for a new T on the "triton" backend. One exception: up to
    16 tokens of 16-bit dtypes without gradients have kernels of their own (see decode.py).

    Weights are read where they are, whatever their strides, and gradients have the strides of their weights: pass
    weights that are stored as (E, out, in) as ``w.transpose(1, 2)``, which copies nothing.

    Args:
        x_TD: tokens, bfloat16, float16 or float32.
        w1_EDZ: (E, D, 2F), up and gate in the order of `order`; or two tensors (up, gate), each (E, D, F) and both with
            the same strides; or (E, D, F) for an activation without a gate. dtype of x.
        w2_EFD: dtype of x. Under ``torch.autocast`` x, weights and biases may differ, and are cast to its dtype. Of x
            and the weights, a view that does not start on 16 bytes is copied.
        ids_TK: chosen experts, int32 or int64. An id outside ``[0, E)`` marks an
            unused slot: it adds nothing and the gradient of its score is 0, so
            tokens may choose different numbers of experts.
        scores_TK: any floating dtype, used as float32.
        save_percent: 0 to 100, the share of z = x @ w1 (R x 2F, R = T * K) that is
            saved for the backward; the rest is computed again there. It changes
            memory and time, never the result. Nothing is saved where no gradient is wanted.
        bias1: (E, 2F) in the order of w1's columns, or a tensor for each of w1's; dtype of x.
        bias2: (E, D), dtype of x.
        activation: one of `momoe_titan.kernels.ACTIVATIONS`; activations.py has their formulas.
        order: of w1's columns: "up_gate" or "gate_up" (halves), "interleaved_up_gate" or "interleaved_gate_up" (in
            turn, the one that is named first in column 0).
        scores_on_input: multiply the input of an expert with the score, in place of its output.
        num_rows: R, where the caller knows that fewer than T * K slots are used: at least their
            number (a smaller R is undefined behaviour), at most T * K. What the op allocates
            and saves goes by R.
        usual_rows: where num_rows is a bound that is far above what is usual: how many slots are usually used. The
            share of these is saved that save_percent says, and rows beyond it are computed again.
        backend: "triton", "torch" (a loop over experts, any device), or "auto" (triton on a CUDA device).
        check_ids: debug flag; refuse ids outside ``[0, E)`` and experts named twice by a token, or,
            where num_rows is given, more used slots than that (synchronises with the host).
        on_saved: called with z (S, 2F) where rows of it are saved. Until the backward its memory may be freed,
            `z.untyped_storage().resize_(0)`: the backward then computes all of z again, with the same result. The
            last backward that needs z frees it.
        outlet: the name of an outlet (see outlet.py) that takes rows of the result, and in the backward of the
            gradients of x and scores, to other GPUs, and brings theirs. All three are under way then, so that autocast
            must not have to cast x.

    Returns:
        out_TD in the dtype of x (of autocast where it is on), and the tokens per
        expert, int64 (E), not differentiable.

    Raises:
        ValueError: shapes, dtypes, devices, strides, num_rows, save_percent, backend, activation or order don't fit.
        RuntimeError: a forward-mode derivative, or a second one, is asked for.
    """
    save_percent = validate_save_percent(save_percent)
    device_type, dtype = x_TD.device.type, None
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        if outlet and x_TD.requires_grad and x_TD.dtype != dtype:
            raise ValueError(
                f"outlet: x must be {dtype}, autocast's, got {x_TD.dtype}: a cast's backward does not wait"
            )
        x_TD = x_TD.to(dtype)
    kind = activation, order, scores_on_input
    experts = _gathered(w1_EDZ, w2_EFD, bias1, bias2, dtype, *kind)
    _validate(x_TD, experts, ids_TK, scores_TK, num_rows)
    if usual_rows is not None and not 0 <= usual_rows <= (most := ids_TK.numel() if num_rows is None else num_rows):
        raise ValueError(f"usual_rows must be from 0 to num_rows = {most}, got {usual_rows}")
    if check_ids:
        _validate_ids(ids_TK, w2_EFD.shape[0], num_rows)
    backend = resolve_backend(backend, x_TD.device)
    wants_grad = _wants_grad(x_TD, scores_TK, *experts.tensors)
    out_TD, counts_E, z_SZ, _ = torch.ops.momoe_titan.moe_forward(
        x_TD.contiguous(),
        experts.w1,
        experts.w2,
        ids_TK.contiguous(),
        scores_TK.contiguous(),
        ids_TK.numel() if num_rows is None else num_rows,
        save_percent if wants_grad else 0.0,
        not wants_grad,
        backend,
        usual_rows,
        not wants_grad or _wants_grad(*experts.weights_of_z),
        not wants_grad or _wants_grad(experts.w2),
        experts.gate,
        experts.bias1,
        experts.bias2,
        *kind,
        outlet,
    )
    if on_saved is not None and z_SZ.shape[0]:
        on_saved(z_SZ)
    return out_TD, counts_E
