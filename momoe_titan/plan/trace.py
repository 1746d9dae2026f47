"""Traces how much GPU memory a computation would hold at each moment, by running it on fake tensors.

`MemoryTrace` sees every allocation of what runs under a FakeTensorMode: shapes, dtypes and lifetimes are those of
the real code, and nothing is computed. The fake tensors are on the CPU, which every build of PyTorch knows;
`on_gpu.as_on_gpu` makes PyTorch pick the GPU code paths for them.
"""

import contextlib
import functools
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import nn
from torch._guards import active_fake_mode
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from momoe_titan.kernels import op
from momoe_titan.kernels.hopper.launch import BM
from momoe_titan.memory.allocator import block_bytes
from momoe_titan.memory.plan import ZRows

FORWARD = torch.ops.momoe_titan.moe_forward.default
_BACKWARD_OVER_Z = torch.ops.momoe_titan.moe_backward_over_z.default
_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_cudnn_attention_backward.default
_ALL_TO_ALL = torch.ops._c10d_functional.all_to_all_single.default

BACKWARD = "temporary, backward"
GRADIENTS = "gradients"
OTHER = "other"


class Place(NamedTuple):
    """Where in the model an allocation is made."""

    part: str
    layer: str | None = None  # name of the MoE layer


@dataclass
class _Block:
    number: int
    num_bytes: int
    part: str
    z_layer: str | None = None  # the MoE layer whose z this is
    layer: str | None = None  # the MoE layer that allocated it
    position: tuple[bool, int] | None = None  # whether in a backward; index among the step's allocations there


@dataclass
class Peak:
    """Peak of the bytes other than z for one pair of (phase, set of live z): in total, and per part."""

    base: int = -1
    parts: dict[str, int] = field(default_factory=dict)


class MemoryTrace(TorchDispatchMode):
    """Follows the storages of everything computed while it is entered, on fake tensors or real ones.

    z, the pre-activations that save_percent saves, is counted apart, so that one trace at save_percent 100 gives the
    memory at every other setting. In place of an op in `implementations` its implementation runs, so that buffers
    which live only inside the op are counted too.

    Args:
        place_of: the place of a module; None if it is that of its parent.
        observer: called after each op with (func, args, kwargs, out, phase), but not for ops inside our own ops.
        implementations: from an op to the function that implements it, called with "triton" as its `backend`.

    Attributes:
        phase: the current part of the step, set by the caller; in a backward "backward" is recorded in its place.
        moments: (phase, ((layer, bytes of its live z), ..)) -> Peak, since `begin_step`. Live means allocated now.
        events: (block number, its new size in bytes, the rows of z it holds or None), since the trace was entered.
    """

    def __init__(
        self,
        place_of: Callable[[nn.Module], Place | None],
        observer: Callable | None = None,
        implementations: dict[torch._ops.OpOverload, Callable] = op.IMPLEMENTATIONS,
    ):
        super().__init__()
        self._observer = observer
        self._implementations = implementations
        self.phase = "setup"
        self.moments: dict[tuple, Peak] = {}
        self.events: list[tuple[int, int, ZRows | None]] = []
        self._place_of = place_of
        self._places = [Place(OTHER)]
        self._blocks: dict[int, _Block] = {}
        self._watched: dict[int, weakref.ref] = {}
        self._number = 0
        self._positions = [0, 0]
        self._gradients: set[tuple[bool, int] | None] = set()
        self._base = 0
        self._parts: dict[str, int] = defaultdict(int)
        self._z: dict[str, int] = {}
        self._z_key: tuple = ()
        # While one of our ops runs: the memory after each allocation inside it. Otherwise None.
        self._inside: list | None = None
        # While dz overwrites z: (z's block, event number of the extra buffer for rows that were not saved, which rows).
        self._z_being_overwritten: tuple[_Block, int, ZRows] | None = None
        self._exit = contextlib.ExitStack()

    def begin_step(self) -> None:
        """Forget the moments so far.

        Allocations of a forward come in the same order every step, and those of a backward too. What ended as a
        gradient in the last step is counted as one in this step as soon as it is allocated. The loss makes one in its
        forward.
        """
        self._gradients = {block.position for block in self._blocks.values() if block.part == GRADIENTS}
        self._positions = [0, 0]
        self.moments.clear()

    def relabel(self, tensor: torch.Tensor, part: str) -> None:
        """Count the memory of a tensor as this part from now on."""
        tensor = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
        block = self._blocks.get(tensor.untyped_storage()._cdata)
        if block is not None and block.z_layer is None:
            self._parts[block.part] -= block.num_bytes
            self._parts[part] += block.num_bytes
            block.part = part

    @contextlib.contextmanager
    def within(self, place: Place) -> Iterator[None]:
        """Count allocations that no module makes as made at this place."""
        self._places.append(place)
        try:
            yield
        finally:
            self._places.pop()

    def parts(self) -> dict[str, int]:
        """Bytes allocated now, by part, without z."""
        return {part: n for part, n in self._parts.items() if n}

    def by_layer(self) -> dict[str | None, int]:
        """Bytes allocated now, by the layer that allocated them, without z."""
        layers = defaultdict(int)
        for block in self._blocks.values():
            if block.z_layer is None:
                layers[block.layer] += block.num_bytes
        return layers

    def __enter__(self):
        self._fake_mode = active_fake_mode()
        resize = torch.UntypedStorage.resize_

        @functools.wraps(resize)
        def traced_resize(storage, size):  # FSDP frees and refills its buffers this way
            result = resize(storage, size)
            if storage._cdata in self._blocks:
                self._resize(storage._cdata, storage.nbytes())
            return result

        self._exit.enter_context(mock.patch.object(torch.UntypedStorage, "resize_", traced_resize))
        self._exit.enter_context(mock.patch.object(ShardingPropagator, _SHAPES, _propagate_unseen))
        hooks = nn.modules.module
        self._exit.callback(hooks.register_module_forward_pre_hook(self._enter_module).remove)
        self._exit.callback(hooks.register_module_forward_hook(self._leave_module, always_call=True).remove)
        return super().__enter__()

    def __exit__(self, *args):
        result = super().__exit__(*args)
        self._exit.close()
        return result

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # comes back as ops on local tensors
        ours = active_fake_mode() is self._fake_mode
        if ours and func in self._implementations:
            out = self._follow(func, args)
            self._observe(func, args, kwargs, out)
            return out
        if func is torch.ops._c10d_functional.wait_tensor.default:
            return args[0]  # as the real op does; its fake version would make a new tensor
        if ours and func is torch.ops.aten._local_scalar_dense.default:
            return 1  # a step number that the optimizer reads
        if ours and func is _ALL_TO_ALL:
            args = _with_even_splits(*args)
        out = func(*args, **(kwargs or {}))
        if ours:
            self._observe(func, args, kwargs, out)
            if func is _ATTENTION_BACKWARD:
                query: Any = args[1]
                self._see(query.new_empty(query.shape, dtype=torch.float32))  # its sums for dq
            for leaf in tree_leaves(out):
                if isinstance(leaf, torch.Tensor):
                    self._see(leaf)
        return out

    def _observe(self, func, args, kwargs, out) -> None:
        if self._observer is not None and self._inside is None:
            self._observer(func, args, kwargs or {}, out, "backward" if in_backward() else self.phase)

    def _follow(self, func, args):
        self._inside = []
        with self._dz_over_z(func, args), _ReenteredTrace(self):
            out = self._implementations[func](*_with_backend(func, args, "triton"))
        z = self._blocks.get(out[2].untyped_storage()._cdata) if func is FORWARD else None
        if z is not None:
            self._mark_z(z)
        inside, self._inside = self._inside, None
        for number, phase, z_key, base, parts in inside:
            # Until the forward returned, z's block was counted as ordinary memory: subtract it from those records.
            if z is not None and z.z_layer is not None and number >= z.number:
                base, z_key = base - z.num_bytes, self._z_key
                parts[z.part] -= z.num_bytes
            self._keep(phase, z_key, base, parts)
        return out

    @contextlib.contextmanager
    def _dz_over_z(self, func, args) -> Iterator[None]:
        """Count z as a temporary of the backward where dz takes its place.

        dz then lies in two buffers: the one of the saved rows of z, and a new one for the other rows. Together they
        are as large as z at any save_percent. This trace runs at save_percent 100 and sees only the first; the events
        contain the second one too, because `MemoryPlan.reserved` needs it.
        """
        z = None
        if func is _BACKWARD_OVER_Z and op.overwrites_z(*args):
            z = self._blocks.get(args[5].untyped_storage()._cdata)
        if z is None or z.z_layer is None:
            yield
            return
        layer, part, number = z.z_layer, z.part, self._number
        others = ZRows(layer, saved=False, tile_bytes=(BM.value - 1) * args[5].shape[1] * args[5].element_size())
        self._number += 1
        self._count(z, -z.num_bytes)
        z.z_layer, z.part = None, BACKWARD
        self._count(z, z.num_bytes)
        self.events.append((number, z.num_bytes, others))
        self._z_being_overwritten = z, number, others
        try:
            yield
        finally:
            self._z_being_overwritten = None
            self.events.append((number, 0, others))
            self._count(z, -z.num_bytes)
            z.z_layer, z.part = layer, part
            self._count(z, z.num_bytes)

    def _enter_module(self, module, args):
        self._places.append(self._place_of(module) or self._places[-1])

    def _leave_module(self, module, args, out):
        self._places.pop()

    def _see(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._blocks or tensor.device.type == "meta":
            return
        backward = in_backward()
        position = backward, self._positions[backward]
        self._positions[backward] += 1
        part = BACKWARD if backward else self._places[-1].part
        if position in self._gradients:
            part = GRADIENTS
        self._blocks[key] = _Block(self._number, 0, part, layer=self._places[-1].layer, position=position)
        self._number += 1
        self._watched[key] = weakref.ref(storage, lambda _: self._forget(key))
        self._resize(key, storage.nbytes())

    def _forget(self, key: int) -> None:
        self._resize(key, 0)
        del self._blocks[key], self._watched[key]

    def _resize(self, key: int, num_bytes: int) -> None:
        block = self._blocks[key]
        change = block_bytes(num_bytes) - block.num_bytes
        if change:
            block.num_bytes += change
            if self._z_being_overwritten and block is self._z_being_overwritten[0]:
                _, again, others = self._z_being_overwritten
                self.events.append((block.number, block.num_bytes, ZRows(others.layer, saved=True)))
                self.events.append((again, block.num_bytes, others))
            else:
                self.events.append(
                    (block.number, block.num_bytes, ZRows(block.z_layer, saved=True) if block.z_layer else None)
                )
            self._count(block, change)
            if change > 0:
                self._record()

    def _count(self, block: _Block, change: int) -> None:
        if block.z_layer is None:
            self._base += change
            self._parts[block.part] += change
        else:
            self._z[block.z_layer] = self._z.get(block.z_layer, 0) + change
            self._z_key = tuple(sorted((layer, n) for layer, n in self._z.items() if n))

    def _record(self) -> None:
        phase = "backward" if in_backward() else self.phase
        if self._inside is not None:
            self._inside.append((self._number - 1, phase, self._z_key, self._base, self.parts()))
            return
        moment = self.moments.get((phase, self._z_key))
        if moment is None or self._base > moment.base:
            self._keep(phase, self._z_key, self._base, self.parts())

    def _keep(self, phase: str, z_key: tuple, base: int, parts: dict[str, int]) -> None:
        moment = self.moments.setdefault((phase, z_key), Peak())
        if base > moment.base:
            moment.base, moment.parts = base, parts

    def _mark_z(self, block: _Block) -> None:
        layer = self._places[-1].layer
        if layer is None:
            return
        self._count(block, -block.num_bytes)
        block.z_layer = layer
        self._count(block, block.num_bytes)
        for i in range(len(self.events) - 1, -1, -1):
            if self.events[i][0] == block.number:
                self.events[i] = (block.number, block.num_bytes, ZRows(layer, saved=True))
                break


def _with_backend(func, args, backend: str) -> list:
    names = [argument.name for argument in func._schema.arguments]
    return [backend if name == "backend" else arg for name, arg in zip(names, args, strict=False)]


def _with_even_splits(rows, output_splits, input_splits, group_name) -> tuple[Any, ...]:
    """Arguments of an all-to-all in which every rank gets an even share: splits read from fake tensors mean nothing."""
    if sum(input_splits) != len(rows):
        ranks = len(input_splits)
        input_splits = output_splits = [len(rows) // ranks + (i < len(rows) % ranks) for i in range(ranks)]
    return rows, output_splits, input_splits, group_name


_SHAPES = "_propagate_tensor_meta_non_cached"
_propagate = getattr(ShardingPropagator, _SHAPES)


def _propagate_unseen(self, op_schema):
    """Hides from the trace the full-size fake tensors on which DTensor computes shapes: no memory is allocated."""
    with _disable_current_modes():
        return _propagate(self, op_schema)


class _ReenteredTrace(TorchDispatchMode):
    """Re-enables the trace while one of our ops' implementations runs: dispatch switches a mode off inside itself."""

    def __init__(self, trace: MemoryTrace):
        super().__init__()
        self.trace = trace

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.trace.__torch_dispatch__(func, types, args, kwargs)


def in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1
