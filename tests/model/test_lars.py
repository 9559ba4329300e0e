import copy

import pytest
import torch

from model import LARS
from tests.golden import formula
from tests.golden.cases import load, salt
from tests.golden.compare import assert_close


def optimizer_for(case, params):
    if case["kind"] == "lars":
        return LARS(params, lr=case["lr"], weight_decay=case["wd"], momentum=case["momentum"])
    return torch.optim.AdamW(params, lr=case["lr"], weight_decay=case["wd"])


def gradient(name, step, shape):
    if name == "zgrad":
        return torch.zeros(shape, dtype=torch.float64)
    return torch.tensor(formula.array(salt(), f"unit|g|{name}|{step}", shape), dtype=torch.float64)


@pytest.mark.parametrize("golden", load("units")["optimizers"], ids=lambda golden: golden["case"]["kind"])
def test_steps_on_tensors_of_every_kind(golden):
    case, history = golden["case"], golden["f64"]["params_after_each_step"]
    params = {name: torch.nn.Parameter(torch.tensor(value, dtype=torch.float64)) for name, value in history[0].items()}
    optimizer = optimizer_for(case, params.values())
    mine = [{name: p.tolist() for name, p in params.items()}]
    for step in range(case["steps"]):
        for name, p in params.items():
            p.grad = None if name == "nograd" else gradient(name, step, tuple(p.shape))
        optimizer.step()
        mine.append({name: p.tolist() for name, p in params.items()})
    assert_close(mine, history)
    state = {name: {k: v.tolist() for k, v in optimizer.state.get(p, {}).items()} for name, p in params.items()}
    for name, golden_state in golden["f64"]["state"].items():
        assert set(state[name]) == set(golden_state)
        if golden_state:
            assert_close(state[name], golden_state)


def test_gradients_are_left_as_they_are():
    params = [torch.nn.Parameter(torch.ones(2, 3)), torch.nn.Parameter(torch.ones(3))]
    gradients = [torch.full_like(p, 0.5) for p in params]
    for p, g in zip(params, gradients, strict=True):
        p.grad = g.clone()
    LARS(params, lr=0.1, weight_decay=0.1).step()
    assert all(p.grad is not None and torch.equal(p.grad, g) for p, g in zip(params, gradients, strict=True))


def test_a_saved_state_goes_on_where_it_was():
    def step(params, optimizer, seed):
        generator = torch.Generator().manual_seed(seed)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()

    params = [torch.nn.Parameter(torch.ones(2, 3)), torch.nn.Parameter(torch.ones(3))]
    optimizer = LARS(params, lr=0.1, weight_decay=0.01)
    step(params, optimizer, 0)
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    other = LARS(twins, lr=7.0)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step(params, optimizer, 1)
    step(twins, other, 1)
    assert all(torch.equal(a, b) for a, b in zip(params, twins, strict=True))


def test_a_group_without_gradients_and_a_closure():
    used, unused = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2, 2))
    optimizer = LARS([{"params": [unused]}, {"params": [used]}], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = used.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 4
    assert unused.eq(1).all()
    assert used.lt(1).all()
    assert unused not in optimizer.state


def test_found_inf_masks_parameters_and_buffers():
    def params():
        return [torch.nn.Parameter(torch.ones(2, 3)), torch.nn.Parameter(torch.ones(3))]

    masked, plain = params(), params()
    ours, theirs = LARS(masked, lr=0.1, weight_decay=0.1), LARS(plain, lr=0.1, weight_decay=0.1)
    for found, value in ((0.0, 0.5), (1.0, float("nan")), (0.0, -0.25)):
        ours.found_inf = torch.tensor(found)
        for p in masked:
            p.grad = torch.full_like(p, value)
        ours.step()
        if not found:
            for p in plain:
                p.grad = torch.full_like(p, value)
            theirs.step()
        for p, q in zip(masked, plain, strict=True):
            assert torch.equal(p, q)
            assert torch.equal(ours.state[p]["mu"], theirs.state[q]["mu"])


def test_a_zero_gradient_without_decay_moves_nothing():
    p = torch.nn.Parameter(torch.ones(2, 3))
    p.grad = torch.zeros(2, 3)
    LARS([p], lr=0.1).step()
    assert p.eq(1).all()
