"""The optimised step and the plain one on the same batches, and what is made of their curves."""

import numpy as np
import pytest
import torch

from benchmarks.parity import FAST, FLOAT8, LAST, OTHER_SEED, PLAIN, SMOOTH, draw, summary, train, verdict
from benchmarks.progress import Progress
from dali_pipes import DatasetIndex
from trainer.config import Config, replace
from trainer.presets import PRESETS


def trained(tree, optimizer, float8=False):
    sizes = {"embed_dim": 32, "depth": 1, "num_heads": 2, "moco_dim": 16, "moco_mlp_dim": 32, "image_size": 32}
    config: Config = replace(
        PRESETS["demo"](), **sizes, data=tree, out=tree, batch_size=6, amp="off", compile="off",
        optimizer=optimizer, lr=0.05 if optimizer == "lars" else 8e-3, epochs=4, warmup_epochs=1,
    )  # fmt: skip
    return train(config, torch.device("cpu"), DatasetIndex.scan(tree), 7, 1, Progress("parity"), float8)


@pytest.mark.parametrize("optimizer", ["adamw", "lars"])
def test_in_float32_the_trainers_step_is_the_plain_one(tree, optimizer):
    curves = trained(tree, optimizer)
    assert [len(curve) for curve in curves.values()] == [7, 7, 7]
    assert curves[FAST] == pytest.approx(curves[PLAIN], rel=1e-3)
    assert curves[OTHER_SEED] != pytest.approx(curves[PLAIN], rel=1e-2)
    assert curves[FAST][-1] != pytest.approx(curves[FAST][0], rel=1e-2)  # it learns, so that equality says something


def test_float8_has_a_curve_of_its_own_and_leaves_the_others_alone(tree):
    pytest.importorskip("torchao.float8", exc_type=ImportError)
    curves, without = trained(tree, "adamw", float8=True), trained(tree, "adamw")
    assert {name: curve for name, curve in curves.items() if name != FLOAT8} == without
    assert curves[FLOAT8][0] == pytest.approx(curves[FAST][0], rel=0.05)  # the first: from the same weights
    # Steps of so small a batch scatter, and differently on each kind of processor.
    assert np.mean(curves[FLOAT8]) == pytest.approx(np.mean(curves[FAST]), rel=0.2)
    assert curves[FLOAT8] != pytest.approx(curves[FAST], rel=1e-4)


def lines(ours, seed, steps=200):
    plain = np.linspace(3.0, 2.0, steps)
    return {FAST: list(plain + ours), PLAIN: list(plain), OTHER_SEED: list(plain + seed)}


def test_distances_and_ends_by_hand():
    found = {(m.name, m.quantity): m.values[0] for m in summary(lines(0.02, -0.05))}
    assert found[FAST, "average"] == pytest.approx(0.02)
    assert found[OTHER_SEED, "largest"] == pytest.approx(0.05)
    end = np.linspace(3.0, 2.0, 200)[-LAST:].mean()
    assert found[FAST, f"mean of the last {LAST} steps"] == pytest.approx(end + 0.02)


def test_noise_of_single_steps_is_averaged_away():
    curves = lines(0.0, 0.05)
    curves[FAST][100] += 1.0
    found = {(m.name, m.quantity): m.values[0] for m in summary(curves)}
    assert found[FAST, "largest"] == pytest.approx(1.0 / SMOOTH)


@pytest.mark.parametrize(("ours", "said"), [(0.01, "within"), (0.1, "beyond")])
def test_another_seed_is_the_yardstick(ours, said):
    assert f"{said} what separates two seeds" in verdict(lines(ours, 0.05))


def test_the_picture_has_both_panels(result, tmp_path):
    curves = lines(0.01, 0.05)
    shown = result()
    shown.settings.update({name: {"loss": curve} for name, curve in curves.items()})
    shown.configuration.update(amp="bf16", compile="on")
    figure = draw(shown)
    assert [axes.get_ylabel() for axes in figure.axes] == ["loss", "difference of the loss"]
    legend = figure.axes[0].get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == [FAST, PLAIN, OTHER_SEED]
