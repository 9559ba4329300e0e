"""Several steps in a row: optimizer, schedules and momentum encoder together, against the reference's traces."""

import pytest
import torch

from model import LARS, learning_rate, momentum_coefficient
from tests.golden import cases, formula
from tests.golden.compare import assert_close


def optimizer_for(case, model, lr):
    if case["optimizer"] == "lars":
        return LARS(model.parameters(), lr=lr, weight_decay=case["wd"], momentum=0.9)
    return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=case["wd"])


def train_step(model, optimizer, x, m):
    loss = model(*x, momentum=m)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


@pytest.mark.parametrize("golden", cases.params("optim_steps"))
def test_three_steps(golden):
    case, expected = golden["case"], golden["f64"]
    model = cases.build({**case, "momentum_init": "copy"})
    optimizer = optimizer_for(case, model, case["lr"])
    parameters = dict(model.named_parameters())
    start = {name: parameters[name].detach().clone() for name in expected["params"]}
    losses, gradient_norms = [], []
    for step in range(case["steps"]):
        losses.append(train_step(model, optimizer, cases.views(case, f"|{step}"), case["m"]))
        gradient_norms.append(cases.global_norm(p.grad for p in parameters.values() if p.grad is not None))
    mine = {
        "losses": losses,
        "grad_global_norm": gradient_norms,
        "params": cases.digests(parameters, expected["params"]),
        "moved_norm": {name: (parameters[name] - start[name]).norm().item() for name in start},
        "momentum_params": cases.digests(parameters, expected["momentum_params"]),
        "param_global_norm": trained_norm(model),
        "momentum_global_norm": cases.global_norm(model.momentum_encoder.parameters()),
        "opt_state": {name: state_digests(optimizer.state[parameters[name]]) for name in expected["opt_state"]},
        "bn_after": cases.batch_norm_digests(model, expected["bn_after"]),
    }
    assert_close(mine, expected)


@pytest.mark.parametrize("golden", cases.params("loop"))
def test_training_loop(golden):
    case, expected = golden["case"], golden["f64"]
    model = cases.build({**case, "momentum_init": "copy"})
    optimizer = optimizer_for(case, model, lr=0.0)
    peak = case["base_lr"] * case["batch_for_lr"] / 256
    trace: dict[str, list[float]] = {"loss": [], "lr": [], "moco_m": []}
    for epoch in range(case["epochs"]):
        for iteration in range(case["iters"]):
            progress = epoch + iteration / case["iters"]
            lr = learning_rate(progress, peak=peak, epochs=case["epochs"], warmup_epochs=case["warmup_epochs"])
            m = momentum_coefficient(progress, start=case["m"], epochs=case["epochs"])
            for group in optimizer.param_groups:
                group["lr"] = lr
            x = cases.views(case, f"|{epoch}|{iteration}")
            trace["loss"].append(train_step(model, optimizer, x, m))
            trace["lr"].append(lr)
            trace["moco_m"].append(m)
    parameters = dict(model.named_parameters())
    mine = {
        **trace,
        "params": cases.digests(parameters, expected["params"]),
        "param_global_norm": trained_norm(model),
        "momentum_global_norm": cases.global_norm(model.momentum_encoder.parameters()),
        "bn_after": cases.batch_norm_digests(model, expected["bn_after"]),
    }
    assert_close(mine, expected)


def trained_norm(model):
    return cases.global_norm((*model.base_encoder.parameters(), *model.predictor.parameters()))


def state_digests(state):
    return {key: formula.digest(value) if value.ndim else value.item() for key, value in state.items()}
