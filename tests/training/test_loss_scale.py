"""Steps that fp16's loss scaling leaves out are counted, here with the scaler on a CPU."""

import torch

from cs324dist.loss_scale import SkippedSteps


def test_each_step_with_an_overflow_is_counted_once():
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    skipped = SkippedSteps(scaler, torch.device("cpu"))
    counts = []
    for gradient in (float("inf"), 1.0, 1.0, float("nan"), float("inf"), 1.0):
        scaler.scale(weight.sum()).backward()
        weight.grad.fill_(gradient)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        counts.append(skipped.observe()["train/skipped_steps"].item())
    assert counts == [1, 1, 1, 2, 3, 3]


def test_without_a_scaler_there_is_nothing_to_count():
    assert SkippedSteps(None, torch.device("cpu")).observe() == {}
    assert SkippedSteps(torch.amp.GradScaler("cpu", enabled=False), torch.device("cpu")).observe() == {}
