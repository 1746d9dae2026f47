"""Converts weights between Hugging Face's names and layouts and ours.

TorchTitan's checkpoint manager calls the adapter for `checkpoint.initial_load_in_hf` and
`checkpoint.last_save_in_hf`. Beside names, three things differ:

- RoPE turns neighbouring columns of a head here (llama's own convention), column i with column
  i + head_dim/2 there: rows of the query and key projections, and of their norms, are reordered.
- Experts are stacked and transposed here (w1 (E, D, 2, F): up, then gate; w2 (E, F, D)), and are
  one (out, in) matrix per expert and projection there.
- The balancing bias has a place in glm4_moe only.
"""

import os
import re
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard
from torchtitan.protocols.state_dict_adapter import StateDictAdapter
from torchtitan.tools.logging import logger

from momoe_titan.config.hugging_face import FORMATS_WITH_BIAS
from momoe_titan.config.section import STOCK_BACKEND
from momoe_titan.model.args import MomoeLlamaArgs
from momoe_titan.model.hugging_face.config import BIAS_FILE, hf_format
from momoe_titan.model.hugging_face.names import (
    EXPERT_NAME,
    INDEX_FILE,
    LAYER_NAMES,
    TOP_NAMES,
    hf_key,
    hf_shapes,
    plain_key,
)

ROTATED = tuple(f"attention.{name}.weight" for name in ("wq", "wk", "q_norm", "k_norm"))
# Parameters of our experts and of TorchTitan's, with the projections in them
OUR_EXPERTS = {"w1": ("up_proj", "gate_proj"), "w2": ("down_proj",)}
STOCK_EXPERTS = {"w1": ("gate_proj",), "w2": ("down_proj",), "w3": ("up_proj",)}


class MomoeStateDictAdapter(StateDictAdapter):
    """Converts state dicts of `MomoeLlama`: whole or of some layers, plain tensors or DTensors.

    Each rank converts its own experts; its Hugging Face state dict holds no others. The
    projections of queries and keys are gathered to reorder their rows, one at a time, and sharded
    again.

    Args:
        model_args: of the model. A conversion fails where no format holds such a model.
        hf_assets_path: a folder whose index file, if it lists the same weights, says into which
            files `checkpoint.last_save_in_hf` writes them; otherwise there is one file.
    """

    def __init__(self, model_args: MomoeLlamaArgs, hf_assets_path: str | None):
        indexed = hf_assets_path and os.path.isfile(os.path.join(hf_assets_path, INDEX_FILE))
        # without the path where it has no index, about which the base class would warn every job
        super().__init__(model_args, hf_assets_path if indexed else None)
        self.hf_assets_path = hf_assets_path
        self.model_args = model_args
        stock = model_args.backend == STOCK_BACKEND
        self.expert_parameters = STOCK_EXPERTS if stock else OUR_EXPERTS
        # expert parameters that to_hf has seen as DTensors, with the ids of their local experts
        self._sharded: dict[str, tuple[DTensor, range]] = {}
        self._read_from: str | None = None
        mapping = self.fqn_to_index_mapping
        if mapping is not None and mapping.keys() != self._all_hf_keys():
            self.fqn_to_index_mapping = None

    def to_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Convert our names and layouts to Hugging Face's.

        Leaves out the tokens per expert, and the bias where the format has no place for it, with
        a warning if the bias is not zero.

        Raises:
            ValueError: no format holds the model, or a sharding of the experts is not supported.
        """
        name = hf_format(self.model_args)
        n_shared = self.model_args.moe_args.num_shared_experts
        hf_state_dict, lost = {}, []
        for key, value in state_dict.items():
            if key in TOP_NAMES:
                if key != "output.weight" or not self.model_args.tie_word_embeddings:
                    hf_state_dict[TOP_NAMES[key]] = value
                continue
            layer, part = _split_layer(key)
            if part == "moe.tokens_per_expert":
                continue
            if part == "moe.expert_bias" and name not in FORMATS_WITH_BIAS:
                if not value.is_meta and value.any():
                    lost.append(key)
                continue
            if part.startswith("moe.experts."):
                new = self._split_experts(key, value)
            elif part in ROTATED:
                new = {LAYER_NAMES[part]: _on_whole(value, self._to_halves)}
            else:
                new = {LAYER_NAMES[part]: value}
            if part == "moe.router.gate.weight" and name == "glm4_moe" and not n_shared:
                new |= self._no_shared_experts(value)
            for part, value in new.items():
                hf_state_dict[hf_key(name, layer, part)] = value
        if lost:
            logger.warning(
                f"THE BALANCING BIAS IS NOT ZERO AND {name.upper()} CANNOT HOLD IT: without it the "
                f"converted model chooses other experts than the trained one ({', '.join(lost)})"
            )
        return hf_state_dict

    def from_hf(self, hf_state_dict: dict[str, Any]) -> dict[str, Any]:
        """Convert Hugging Face's names and layouts to ours; experts get the sharding that `to_hf` found.

        Every MoE layer gets a bias, 0 where the folder holds none, and zero tokens per expert.
        """
        name = hf_format(self.model_args)
        ours = {LAYER_NAMES[part]: part for part in LAYER_NAMES}
        top = {hf: key for key, hf in TOP_NAMES.items()}
        state_dict: dict[str, Any] = {}
        experts: dict[str, dict[int, dict[str, torch.Tensor]]] = {}
        for theirs, value in hf_state_dict.items():
            if theirs in top:
                state_dict[top[theirs]] = value
                if theirs == "model.embed_tokens.weight" and self.model_args.tie_word_embeddings:
                    state_dict["output.weight"] = value
                continue
            layer, hf_part = _split_layer(plain_key(name, theirs))
            if match := re.fullmatch(r"mlp\.experts\.(\d+)\.(\w+)\.weight", hf_part):
                expert, projection = int(match[1]), match[2]
                experts.setdefault(layer, {}).setdefault(expert, {})[projection] = value
                continue
            part = ours[hf_part]
            if part.startswith("moe.shared_experts.") and not value.numel():
                continue
            if part in ROTATED:
                value = _on_whole(value, self._to_pairs)
            state_dict[f"layers.{layer}.{part}"] = value
            if part == "moe.router.gate.weight":
                state_dict.update(self._balance_state(layer, value.device) | state_dict)
        for layer, matrices in experts.items():
            for parameter in self.expert_parameters:
                key = f"layers.{layer}.moe.experts.{parameter}"
                state_dict[key] = self._stack_experts(key, matrices)
        for key, (sharded, ids) in self._sharded.items():
            if not ids:  # this rank has a shard without experts
                state_dict[key] = sharded
        return state_dict

    def get_hf_storage_reader(self, path: str, from_quantized: bool = False) -> HuggingFaceStorageReader:
        """The reader of a folder. Remembers the folder, so that `from_hf` finds a bias file in it.

        TorchTitan calls `to_hf`, this method and `from_hf` in this order.

        Raises:
            ValueError: quantized weights.
        """
        if from_quantized:
            raise ValueError(
                "checkpoint.initial_load_in_hf_quantized is true, must be false: "
                "momoe_llama does not load quantized weights"
            )
        self._read_from = path
        return HuggingFaceStorageReader(path)

    def _all_hf_keys(self) -> set[str]:
        """Names of all weights, also of other pipeline stages; none where no format holds the model."""
        try:
            return set(hf_shapes(self.model_args))
        except ValueError:
            return set()

    def _matrices(self, parameter: str, stacked: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Views (E, out, in) of the projections in a parameter of the experts."""
        if self.expert_parameters is STOCK_EXPERTS:
            return (stacked,)
        if parameter == "w1":
            return tuple(half.transpose(1, 2) for half in stacked.unbind(2))
        return (stacked.transpose(1, 2),)

    def _split_experts(self, key: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
        """One (out, in) matrix per expert and projection of a parameter of the experts."""
        parameter = key.rpartition(".")[2]
        ids, local, shard_expert = range(value.shape[0]), value, lambda matrix: matrix
        if isinstance(value, DTensor):
            shape, offset = compute_local_shape_and_global_offset(value.shape, value.device_mesh, value.placements)
            ids, local = range(offset[0], offset[0] + shape[0]), _local(value)
            self._sharded[key] = (value, ids)
            shard_expert = self._sharding_within_experts(key, value)
        return {
            # contiguous, as safetensors wants it
            EXPERT_NAME.format(expert, projection): shard_expert(matrices[i].contiguous())
            for projection, matrices in zip(
                self.expert_parameters[parameter], self._matrices(parameter, local), strict=True
            )
            for i, expert in enumerate(ids)
        }

    def _sharding_within_experts(self, key: str, value: DTensor) -> Callable[[torch.Tensor], torch.Tensor]:
        """A function that makes a DTensor of this rank's piece of one (out, in) matrix.

        Where each rank has whole experts, the function returns the matrix as it is.
        """
        mesh = value.device_mesh
        whole: tuple[Any, ...] = value.placements
        inner = [i for i, p in enumerate(whole) if not p.is_replicate() and p.dim != 0]
        if not inner:
            return lambda matrix: matrix
        placements = []
        for i in inner:
            placement = whole[i]
            # Dimension 1 of our stacked parameters is the input of an expert, the last dimension of its matrix.
            dim = int(placement.dim == 1) if self.expert_parameters is OUR_EXPERTS else placement.dim - 1
            if type(placement) is Shard:
                placements.append(Shard(dim))
            elif isinstance(placement, _StridedShard):
                # FSDP's, over columns that tensor parallelism shards too: the same in a matrix
                placements.append(_StridedShard(dim, split_factor=placement.split_factor))
            else:
                raise ValueError(
                    f"{key} is sharded as {value.placements}, which is not converted: save a "
                    "torch.distributed checkpoint and use python -m momoe_titan.export"
                )
        # on the meta device, so that nothing is copied
        parameter = key.rpartition(".")[2]
        meta = torch.empty(value.shape, device="meta")
        shape = self._matrices(parameter, meta)[0].shape[1:]
        names = mesh.mesh_dim_names or ()  # TorchTitan names all
        sub_mesh = mesh[tuple(names[i] for i in inner)]
        return lambda matrix: DTensor.from_local(
            matrix, sub_mesh, placements, run_check=False, shape=shape, stride=(shape[1], 1)
        )

    def _stack_experts(self, key: str, experts: dict[int, dict[str, torch.Tensor]]) -> torch.Tensor:
        """A parameter of the experts from their matrices, the inverse of `_split_experts`."""
        parameter = key.rpartition(".")[2]
        args = self.model_args
        E, D, F = args.moe_args.num_experts, args.dim, args.moe_hidden_dim
        if self.expert_parameters is STOCK_EXPERTS:
            shape = (E, D, F) if parameter == "w2" else (E, F, D)
        else:
            shape = (E, F, D) if parameter == "w2" else (E, D, 2, F)
        sharded, ids = self._sharded.get(key, (None, range(E)))
        if sharded is not None:
            shape = _local(sharded).shape
        projections = self.expert_parameters[parameter]
        local = [[_local(experts[expert][p]) for expert in ids] for p in projections]
        stacked = local[0][0].new_empty(shape)
        for targets, sources in zip(self._matrices(parameter, stacked), local, strict=True):
            for target, source in zip(targets, sources, strict=True):
                target.copy_(source)
        if sharded is None:
            return stacked
        return DTensor.from_local(
            stacked,
            sharded.device_mesh,
            sharded.placements,
            run_check=False,
            shape=sharded.shape,
            stride=sharded.stride(),
        )

    def _balance_state(self, layer: str, device: torch.device) -> dict[str, torch.Tensor]:
        num_experts = self.model_args.moe_args.num_experts
        bias_E = torch.zeros(num_experts, dtype=torch.float32, device=device)
        key = f"layers.{layer}.moe.expert_bias"
        path = os.path.join(self._read_from or "", BIAS_FILE)
        if self._read_from and os.path.isfile(path):
            from safetensors import safe_open

            with safe_open(path, framework="pt") as f:
                bias_E = f.get_tensor(key).to(device)
        counts_E = torch.zeros(num_experts, dtype=torch.int64, device=device)
        return {key: bias_E, f"layers.{layer}.moe.tokens_per_expert": counts_E}

    def _no_shared_experts(self, like: torch.Tensor) -> dict[str, torch.Tensor]:
        """glm4_moe always has shared experts: of width 0 where we have none."""
        empty_0D = torch.empty(0, self.model_args.dim, dtype=like.dtype, device=like.device)
        parts = [f"moe.shared_experts.w{i}.weight" for i in (1, 2, 3)]
        return {
            LAYER_NAMES[part]: empty_0D.view(self.model_args.dim, 0) if ".w2." in part else empty_0D for part in parts
        }

    def _to_halves(self, value: torch.Tensor) -> torch.Tensor:
        """Rows of every head from (0, 1), (2, 3), ... to 0, 2, ... and 1, 3, ..."""
        heads = value.unflatten(0, (-1, self.model_args.attention_head_dim // 2, 2))
        return heads.transpose(1, 2).flatten(0, 2).contiguous()

    def _to_pairs(self, value: torch.Tensor) -> torch.Tensor:
        """The inverse of `_to_halves`."""
        heads = value.unflatten(0, (-1, 2, self.model_args.attention_head_dim // 2))
        return heads.transpose(1, 2).flatten(0, 2).contiguous()


def _split_layer(key: str) -> tuple[str, str]:
    match = re.fullmatch(r"layers\.(\d+)\.(.+)", key)
    if match is None:
        raise ValueError(f"{key} is not a weight of this model")
    return match[1], match[2]


def _local(value: torch.Tensor) -> torch.Tensor:
    return value.to_local() if isinstance(value, DTensor) else value


def _on_whole(value: torch.Tensor, fn: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """`fn` of the whole tensor, then sharded as `value` is."""
    if not isinstance(value, DTensor):
        return fn(value)
    whole = fn(value.full_tensor())
    # src_data_rank=None: all ranks hold the same tensor, nothing is sent
    return distribute_tensor(whole, value.device_mesh, value.placements, src_data_rank=None)
