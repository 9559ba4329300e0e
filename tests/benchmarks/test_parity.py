"""The optimised step and the plain one on the same batches, and what is made of their curves."""

import numpy as np
import pytest
import torch

from benchmarks.parity import FAST, FLOAT8, LAST, PLAIN, SEEDS, SMOOTH, draw, summary, train, verdict
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
    return train(config, torch.device("cpu"), DatasetIndex.scan(tree), 7, 2, 1, Progress("parity"), float8)


@pytest.mark.parametrize("optimizer", ["adamw", "lars"])
def test_in_float32_the_trainers_step_is_the_plain_one(tree, optimizer):
    curves = trained(tree, optimizer)
    assert [[len(run) for run in runs] for runs in curves.values()] == [[7, 7], [7, 7]]
    for ours, plain in zip(curves[FAST], curves[PLAIN], strict=True):
        assert ours == pytest.approx(plain, rel=1e-3)
    first, second = curves[FAST]
    assert first != pytest.approx(second, rel=1e-2)  # another seed begins with other weights
    assert first[-1] != pytest.approx(first[0], rel=1e-2)  # it learns, so that equality says something


def test_float8_has_a_curve_of_its_own_and_leaves_the_others_alone(tree):
    pytest.importorskip("torchao.float8", exc_type=ImportError)
    curves, without = trained(tree, "adamw", float8=True), trained(tree, "adamw")
    assert {name: runs for name, runs in curves.items() if name != FLOAT8} == without
    for float8, ours in zip(curves[FLOAT8], curves[FAST], strict=True):
        assert float8[0] == pytest.approx(ours[0], rel=0.15)  # the first: from the same weights
        # Steps of so small a batch scatter, and differently on each kind of processor.
        assert np.mean(float8) == pytest.approx(np.mean(ours), rel=0.2)
        assert float8 != pytest.approx(ours, rel=1e-4)


def lines(*ours, steps=200):
    """A plain run a seed, 0.05 from each other, and ours so far above each."""
    plain = [np.linspace(3.0, 2.0, steps) + 0.05 * seed for seed in range(len(ours))]
    return {
        FAST: [list(run + gap) for run, gap in zip(plain, ours, strict=True)],
        PLAIN: [list(run) for run in plain],
    }


def test_distances_and_ends_by_hand():
    found = {(m.name, m.quantity): m.values for m in summary(lines(0.02, -0.03, 0.01))}
    assert found[FAST, "average"] == pytest.approx((0.02, 0.03, 0.01))
    assert found[SEEDS, "largest"] == pytest.approx((0.05, 0.1, 0.05))
    end = np.linspace(3.0, 2.0, 200)[-LAST:].mean()
    quantity = f"mean of the last {LAST} steps"
    assert found[FAST, quantity] == pytest.approx((end + 0.02, end + 0.02, end + 0.11))
    assert found[PLAIN, quantity] == pytest.approx((end, end + 0.05, end + 0.1))


def test_noise_of_single_steps_is_averaged_away():
    curves = lines(0.0, 0.0)
    curves[FAST][0][100] += 1.0
    found = {(m.name, m.quantity): m.values for m in summary(curves)}
    assert found[FAST, "largest"] == pytest.approx((1.0 / SMOOTH, 0.0))


@pytest.mark.parametrize(
    ("gaps", "said"),
    [
        ((0.3, -0.1, 0.2), "is 0.20 (-0.10 to 0.30), over 3 seeds: no difference shown"),
        ((0.3, 0.1, 0.2), "above 0 with each of 3 seeds, as chance alone would have it once in 4"),
        ((-0.3, -0.1), "below 0 with each of 2 seeds, as chance alone would have it once in 2"),
        ((0.3,), "is 0.30, with one seed: not judged"),
    ],
)
def test_what_all_seeds_agree_on_is_said_with_what_chance_makes_of_it(gaps, said):
    assert said in verdict(lines(*gaps))


def test_the_picture_has_both_panels(result, tmp_path):
    shown = result()
    shown.settings.update({name: {"loss": runs} for name, runs in lines(0.01, 0.02).items()})
    shown.configuration.update(amp="bf16", compile="on")
    figure = draw(shown)
    assert [axes.get_ylabel() for axes in figure.axes] == ["loss", "difference of the loss"]
    legends = [axes.get_legend() for axes in figure.axes]
    said = [{text.get_text() for text in legend.get_texts()} for legend in legends if legend is not None]
    assert said == [{FAST, PLAIN}, {SEEDS, f"{FAST} - plain"}]
