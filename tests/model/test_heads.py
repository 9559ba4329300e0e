import pytest
import torch

from model.heads import predictor, projector
from tests.golden import formula
from tests.golden.cases import load, salt
from tests.golden.compare import assert_close


def head(case):
    layout = case["prefix"].split(".")[1]
    if "projector" in case["prefix"]:
        return projector(case["in"], case["hidden"], case["out"], layout)
    return predictor(case["hidden"], case["out"], layout)


@pytest.mark.parametrize("golden", load("units")["mlp"], ids=lambda golden: golden["case"]["prefix"])
def test_layers_names_and_outputs(golden):
    mlp = head(golden["case"])
    assert [type(layer).__name__ for layer in mlp] == golden["modules"]
    state = mlp.state_dict()
    assert {name: list(value.shape) for name, value in state.items()} == golden["state_dict"]
    for name, value in state.items():
        filled = formula.weight(salt(), golden["case"]["prefix"] + name, tuple(value.shape))
        if filled is not None:
            value.copy_(torch.from_numpy(filled))
    mlp.double()
    x = torch.tensor(golden["x"], dtype=torch.float64)
    mine = {"train": mlp(x).tolist(), "eval_after_one_train_pass": mlp.eval()(x).tolist()}
    assert_close(mine, golden["f64"])
