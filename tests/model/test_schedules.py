import pytest

from model import learning_rate, momentum_coefficient
from tests.golden.cases import load
from tests.golden.compare import assert_close


@pytest.mark.parametrize("golden", load("schedules")["pretrain"], ids=lambda golden: golden["case"]["tag"])
def test_pretraining_schedules(golden):
    case = golden["case"]
    peak = case["base_lr"] * case["batch"] / 256
    mine = [
        {
            "lr": learning_rate(point["epoch"], peak=peak, epochs=case["epochs"], warmup_epochs=case["warmup_epochs"]),
            "moco_m": momentum_coefficient(point["epoch"], start=case["moco_m"], epochs=case["epochs"]),
        }
        for point in golden["points"]
    ]
    assert_close(mine, golden["points"], tolerance=1e-12)
    # Near the end m rounds to 1, and only its distance from 1 says something.
    gaps = [{"gap": 1 - point["moco_m"]} for point in mine]
    assert_close(gaps, [{"gap": 1 - point["moco_m"]} for point in golden["points"]], tolerance=1e-2)


@pytest.mark.parametrize("golden", load("schedules")["lincls"], ids=lambda golden: str(golden["case"]["epochs"]))
def test_a_cosine_without_warmup_is_the_linear_probe_schedule(golden):
    case = golden["case"]
    peak = case["base_lr"] * case["batch"] / 256
    mine = [
        learning_rate(float(epoch), peak=peak, epochs=case["epochs"], warmup_epochs=0)
        for epoch in range(len(golden["lr_per_epoch"]))
    ]
    assert_close(mine, golden["lr_per_epoch"], tolerance=1e-12)


def test_the_first_step_has_learning_rate_zero_and_the_ramp_may_outlast_the_training():
    assert learning_rate(0, peak=0.6, epochs=100, warmup_epochs=10) == 0
    assert learning_rate(2, peak=0.6, epochs=3, warmup_epochs=10) == pytest.approx(0.12)


def test_a_constant_momentum_stays():
    assert momentum_coefficient(57.3, start=0.99, epochs=100, cosine=False) == 0.99
