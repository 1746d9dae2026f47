"""Short training runs under TorchTitan's own trainer on the CPU, on 1, 2 and 4 processes.

Usage: parallel_worker.py FOLDER JSON, where JSON is a list of [number of processes, settings], and settings are
{section.field: value}. The processes are forks of this one, because importing torch takes longer than training does.
Runs that follow each other with as many processes share them: what DTensor works out for an operation of a mesh, which
takes most of a short run, is worked out once. Each run starts from the same weights, or from the last checkpoint where
it enables them, and sees the same batches; "stop" is the step it ends with. Its result is written to FOLDER/INDEX.pt.
"""

import copy
import functools
import gc
import itertools
import json
import math
import sys
from types import SimpleNamespace
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F

from momoe_titan.train import describe_cpu
from tests.support.forks import in_gloo_forks

STEPS, BATCH = 3, 8


def config_of(settings: dict, folder: str):
    from tests.support.tiny import job_config

    config = job_config(load_balance_rate=0.01, load_balance_off_layers=[2])
    for name, value in {
        "model.name": "momoe_llama",
        "model.flavor": "tiny",
        "training.local_batch_size": BATCH,
        "training.global_batch_size": BATCH,
        "training.steps": 100,
        "training.mixed_precision_param": "float32",
        "optimizer.implementation": "fused",
        "optimizer.lr": 1e-2,
        "optimizer.eps": 1e-5,  # or rounding decides how far weights move whose gradient is 0 but for rounding
        "lr_scheduler.warmup_steps": 0,
        "metrics.log_freq": 1,
        "metrics.disable_color_printing": True,
        "job.dump_folder": folder,
        "checkpoint.interval": 1,
        "checkpoint.exclude_from_loading": ["dataloader"],
        **settings,
    }.items():
        section, field = name.split(".")
        assert hasattr(getattr(config, section), field), name
        setattr(getattr(config, section), field, value)
    return config


class Batches:
    """A data rank's part of the batches, microbatch by microbatch."""

    def __init__(self, dp_world_size, dp_rank, job_config, **kwargs):
        self.ranks, self.rank = dp_world_size, dp_rank
        self.size = job_config.training.local_batch_size
        self.in_documents = job_config.momoe.document_mask
        self.steps_done = 0

    def __iter__(self):
        from tests.support.tiny import batch

        for step in range(self.steps_done, STEPS):
            for rows in zip(*(t.split(self.size * self.ranks) for t in batch(step, BATCH)), strict=True):
                tokens, labels = (t.split(self.size)[self.rank] for t in rows)
                inputs = {"input": tokens}
                if self.in_documents:  # which begin at other places in each sequence
                    inputs["positions"] = (torch.arange(tokens.shape[1]) + tokens[:, :1]) % 6
                yield inputs, labels

    def state_dict(self):
        return {}


class ValidationLoader:
    """Two full batches and a short one; a part of one batch has no label."""

    def __iter__(self):
        from tests.support.tiny import batch

        for seed, size in ((7, 8), (8, 8), (9, 5)):
            tokens, labels = (t.clone() for t in batch(seed, size))
            labels[:2, : 4 * (seed - 7)] = -100
            yield {"input": tokens, "positions": torch.arange(tokens.shape[1]).expand_as(tokens) % 5}, labels

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def validation_batches(dp_world_size, dp_rank, tokenizer, job_config):
    from momoe_titan.data.fixed_batches import FixedBatches

    batches = FixedBatches(ValidationLoader(), dp_rank, dp_world_size, job_config.validation.local_batch_size, None)
    if job_config.momoe.document_mask:
        return batches
    return [({"input": inputs["input"]}, labels) for inputs, labels in batches]


def gathered_attention(modules, mesh, attention_type) -> None:
    """Context parallelism for a CPU, for which torch has no ring attention: every rank attends
    to the keys and values of all."""
    from momoe_titan.model.parallel.collectives import gather_rows

    # With the default load balancer a rank has one piece from the front and one from the back.
    pieces = [(r, 2 * mesh.size() - 1 - r) for r in range(mesh.size())]

    def attend(q_BHld, k_BHld, v_BHld, **kwargs):
        k, v = (gather_rows(t.transpose(0, 2), mesh).transpose(0, 2) for t in (k_BHld, v_BHld))
        at = torch.arange(k.shape[2]).chunk(2 * mesh.size())
        positions = [torch.cat([at[p] for p in pair]) for pair in pieces]
        mask = positions[mesh.get_local_rank()][:, None] >= torch.cat(positions)
        return F.scaled_dot_product_attention(q_BHld, k, v, attn_mask=mask, **kwargs)

    for module in modules:
        module.forward = attend


def whole(tensor):
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def plain(name: str) -> str:
    """Without what activation checkpointing and torch.compile put into a parameter's name."""
    return name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")


def set_weights(parts, weights) -> None:
    from torch.distributed.tensor import DTensor, distribute_tensor

    for part in parts:
        for name, parameter in part.named_parameters():
            weight = weights[plain(name)]
            if isinstance(parameter, DTensor):
                mesh, placements = parameter.device_mesh, parameter.placements
                weight = distribute_tensor(weight, mesh, placements, src_data_rank=None).to_local()
                parameter = parameter.to_local()
            parameter.detach().copy_(weight)


def run(settings: dict, folder: str) -> dict:
    from torchtitan import train as titan
    from torchtitan.distributed import utils as dist_utils

    from momoe_titan.components.loss import LossInModel
    from momoe_titan.components.pipeline_step import PipelineStep
    from momoe_titan.components.training_step import TrainingStep
    from tests.support.tiny import build

    class Trainer(TrainingStep, PipelineStep, LossInModel, titan.Trainer):
        """TorchTitan's with our step, and with the labels for the model."""

        def _clip(self):
            parameters = [p for part in self.model_parts for p in part.parameters()]
            meshes = self.parallel_dims.get_optional_mesh("pp"), self.parallel_dims.ep_enabled
            with mock.patch("torch.nn.utils.clip_grads_with_norm_"):  # the norm is all that is wanted
                expected = dist_utils.clip_grad_norm_(parameters, math.inf, pp_mesh=meshes[0], ep_enabled=meshes[1])
            norm = super()._clip()
            exact = all(p.grad is None or p.grad.dtype == torch.float32 for p in parameters)
            rtol = 1e-6 if exact else 1e-2  # TorchTitan rounds to the gradients' dtype
            assert torch.allclose(norm, expected.float(), rtol=rtol, atol=0), (norm, expected)
            return norm

    last_step = settings.pop("stop", STEPS)
    config = config_of(settings, folder)
    trainer = Trainer(config)
    trainer.set_up_precision()
    parts = trainer.model_parts
    set_weights(parts, dict(build(trainer.model_args).named_parameters()))
    moes = {n: block.moe for part in parts for n, block in part.layers.items() if block.moe_enabled}
    logged, counts, grads = [], {}, {}

    def log(values, step):
        if "validation_metrics/loss" in values:
            logged[-1] |= {k: v for k, v in values.items() if k.endswith(("/loss", "global_max", "dead_experts"))}
            return
        counts_LE = trainer.optimizers.load_balancer.counts_LE
        counts[step] = {} if counts_LE is None else dict(zip(moes, counts_LE.tolist(), strict=True))
        kept = ("loss_metrics/global_avg_loss", "grad_norm", "moe")
        logged.append({"step": step, **{k: v for k, v in values.items() if k.startswith(kept)}})

    trainer.metrics_processor.logger = SimpleNamespace(log=log, close=lambda: None)
    trainer.checkpointer.load()
    trainer.dataloader.steps_done = trainer.step
    data = trainer.batch_generator(trainer.dataloader)
    for step in range(trainer.step + 1, last_step + 1):
        trainer.step = step
        trainer.train_step(data)
        trainer.checkpointer.save(trainer.step)
        if step == last_step:
            grads = {plain(name): whole(p.grad).clone() for part in parts for name, p in part.named_parameters()}
        if config.validation.enable and step in (1, last_step):  # after which FSDP has no gradients any more
            trainer.validator.validate(parts, step)
    assert not any(moe.tokens_per_expert.any() for moe in moes.values())
    mine = {
        "logged": logged,
        "counts": counts,
        "bias": {name: moe.expert_bias.tolist() for name, moe in moes.items()},
        "grads": grads,
        # TorchTitan's other pipeline stages log a loss of -1
        "sees_loss": not trainer.parallel_dims.pp_enabled or trainer.pp_has_last_stage,
    }
    trainer.checkpointer.close()
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return merged(everyone)


def merged(everyone: list[dict]) -> dict:
    """What all ranks together know; they must not contradict each other."""
    bias, grads = {}, {}
    logged = [one["logged"] for one in everyone if one["sees_loss"]]
    assert all(steps == logged[0] for steps in logged), logged
    key = "validation_metrics/loss"
    validated = [[entry[key] for entry in one["logged"] if key in entry] for one in everyone]
    assert all(losses == validated[0] for losses in validated), validated  # also of stages that see none
    for one in everyone:
        grads.update(one["grads"])
        for name, value in one["bias"].items():
            assert bias.setdefault(name, value) == value, f"bias of layer {name}"
        for entry in logged[0]:
            counts = entry.setdefault("counts", {})
            for name, value in one["counts"][entry["step"]].items():
                assert counts.setdefault(name, value) == value, f"counts of layer {name}"
    return {"bias": bias, "grads": grads, "logged": logged[0]}


def worker(runs: list[tuple[int, dict]], folder: str) -> None:
    from torchtitan.protocols.train_spec import get_train_spec

    ring_attention = "momoe_titan.model.parallel.parallelize.apply_cp_to_attention_module"
    of_validation = "momoe_titan.components.validation.build_validation_dataloader"
    spec = get_train_spec("momoe_llama")
    flavors = spec.model_args
    for index, settings in runs:
        spec.model_args = copy.deepcopy(flavors)  # a trainer writes its configuration into its flavor
        with mock.patch(ring_attention, gathered_attention), mock.patch(of_validation, validation_batches):
            try:
                result = run(settings, folder)
            except BaseException:
                print(f"run {index} failed: {settings}", file=sys.stderr, flush=True)
                raise
        if dist.get_rank() == 0:
            torch.save(result, f"{folder}/{index}.pt")
        torch._dynamo.reset()
        gc.collect()  # the trainer has switched off what Python does itself
        gc.freeze()  # what caches hold is not looked through again when a run begins and ends


def main(folder: str, runs: str) -> None:
    torch.set_num_threads(1)
    with describe_cpu():
        import torchtitan.train  # noqa: F401 - once for all processes
        from torchtitan.protocols.train_spec import get_train_spec
        from torchtitan.tools.logging import init_logger

        import momoe_titan.register  # noqa: F401 - registers the spec
        from tests.support.tiny import tiny_args

        init_logger()
        spec = get_train_spec("momoe_llama")
        spec.model_args = {
            "tiny": tiny_args(),
            "3 experts": tiny_args(moe={"num_experts": 3}, moe_hidden_dim=12),
            "6 experts": tiny_args(moe={"num_experts": 6}),
            "8 experts": tiny_args(moe={"num_experts": 8}),
            "normalised": tiny_args(qk_norm="per_head"),
            "tied": tiny_args(tie_word_embeddings=True),
        }
        spec.build_dataloader_fn = Batches
        spec.build_tokenizer_fn = lambda job_config: SimpleNamespace(eos_id=0)
        for world, numbered in itertools.groupby(enumerate(json.loads(runs)), lambda run: run[1][0]):
            its_runs = [(index, settings) for index, (_, settings) in numbered]
            # What failed is said by the first rank that ends.
            if not in_gloo_forks(world, f"{folder}/store{its_runs[0][0]}", functools.partial(worker, its_runs, folder)):
                sys.exit(f"a run of {world} processes failed")


if __name__ == "__main__":
    main(*sys.argv[1:])
