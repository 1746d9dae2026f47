"""Batches on their way to the device, and how long it had to wait for them."""

from types import SimpleNamespace

import pytest
import torch

from momoe_titan.components.batches import BatchesToDevice


class Titan:
    """What TorchTitan's trainer does with batches: it notes how long each took."""

    def batch_generator(self, data):
        for batch in data:
            self.metrics_processor.data_loading_times.append(1.0)
            yield batch


class Trainer(BatchesToDevice, Titan):
    def __init__(self, model: str):
        self.job_config = SimpleNamespace(model=SimpleNamespace(name=model))
        self.device = torch.device("meta")
        self.metrics_processor = SimpleNamespace(data_loading_times=[])


@pytest.mark.parametrize("model, device", [("momoe_llama", "meta"), ("llama3", "cpu")])
def test_batches_go_to_the_device_where_our_step_takes_them(model, device):
    trainer = Trainer(model)
    batches = trainer.batch_generator(({"input": torch.zeros(2)}, torch.ones(2)) for _ in range(3))
    inputs, labels = next(batches)
    assert {inputs["input"].device.type, labels.device.type} == {device}


@pytest.mark.parametrize("has_work, lost", [(True, 0.0), (False, 1.0)])
def test_a_wait_counts_only_where_the_gpu_has_no_work(monkeypatch, has_work, lost):
    class Event:
        behind_work = False  # an event that is not recorded is over

        def record(self):
            self.behind_work = has_work

        def query(self):
            return not self.behind_work

    trainer = Trainer("momoe_llama")
    trainer.device = SimpleNamespace(type="cuda")
    monkeypatch.setattr(torch.cuda, "Event", Event)
    next(trainer.batch_generator([({}, SimpleNamespace(to=lambda device, non_blocking: None))]))
    assert trainer.metrics_processor.data_loading_times == [lost]
