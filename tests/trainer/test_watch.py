"""What the run is told of its steps: spread and cosines, collapse, gradient norm; and that nothing waits for it."""

from functools import partialmethod

import pytest
import torch
import torch.nn.functional as F

from model import MoCoV3
from tests.ranks import run_on_ranks
from trainer.collapse import spread
from trainer.engine import Engine
from trainer.metrics import read_metrics
from trainer.objective import Outputs

from .engines import engine_for, gradients, learned, views_for


def outputs_of(seed, images=24, width=10, agreement=0.0):
    generator = torch.Generator().manual_seed(seed)
    f1, f2, q1, q2, k1, k2 = (torch.randn(images, width, generator=generator, dtype=torch.float64) for _ in range(6))
    k2, k1 = k2 + agreement * q1, k1 + agreement * q2
    return Outputs(torch.zeros(()), (f1 + 0.3, f2), (q1, q2), (k1, k2))


def test_spread_and_cosines_are_what_they_say():
    outputs = outputs_of(0, agreement=0.5)
    seen = spread(outputs)
    for found, pair in ((seen.feature_std, outputs.features), (seen.output_std, outputs.queries)):
        variances = torch.stack([F.normalize(x, dim=1).var(0, correction=0).mean() for x in pair])
        assert found == pytest.approx((variances.sqrt().mean() * 10**0.5).item())
    cosines = [
        F.cosine_similarity(q[:, None], k[None], dim=2)
        for q, k in zip(outputs.queries, reversed(outputs.keys), strict=True)
    ]
    same = torch.eye(24, dtype=torch.bool)
    assert seen.positive_cosine == pytest.approx(torch.stack([c[same] for c in cosines]).mean().item())
    assert seen.negative_cosine == pytest.approx(torch.stack([c[~same] for c in cosines]).mean().item())
    assert seen.positive_cosine > seen.negative_cosine + 0.3


def share_of_spread(whole):
    rank = torch.distributed.get_rank()
    pairs = [tuple(x[rank * 12 : (rank + 1) * 12] for x in pair) for pair in whole[1:]]
    return spread(Outputs(whole[0], *pairs))


def test_ranks_see_the_spread_of_the_whole_batch(tmp_path):
    whole = outputs_of(1, agreement=0.5)
    for seen in run_on_ranks(share_of_spread, whole, folder=tmp_path):
        assert vars(seen) == pytest.approx(vars(spread(whole)))


def test_1_is_spread_evenly_and_0_is_one_point():
    axes = torch.eye(8, dtype=torch.float64).repeat(1, 2).view(16, 8)
    even, point = torch.cat([axes, -axes]), torch.ones(32, 8, dtype=torch.float64)
    seen = spread(Outputs(torch.zeros(()), (even, even), (point, point), (point, point)))
    assert seen.feature_std == pytest.approx(1)
    assert seen.output_std == pytest.approx(0, abs=1e-7)
    assert seen.negative_cosine == pytest.approx(1)
    assert seen.collapsed


def test_a_run_that_collapses_is_told_once(train, monkeypatch, tmp_path, capsys):
    train_step = Engine.train_step

    @torch.no_grad()
    def collapse(engine):
        engine.model.base_encoder.norm.weight.zero_()
        engine.model.base_encoder.norm.bias.fill_(1.0)

    def collapsing(engine, *batch):
        if engine.step == 3:
            collapse(engine)
        return train_step(engine, *batch)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "train_step", collapsing)
        assert train("--no-knn", "--arch", "vit_small", out="collapsed") == 0
    stds = [row["feature_std"] for row in read_metrics(tmp_path / "collapsed")]
    assert min(stds[:3]) > 0.3
    assert max(stds[3:]) < 0.05
    printed = capsys.readouterr().out
    assert printed.count("the model has collapsed") == 1
    assert printed.index("step 4/9") < printed.index("the model has collapsed") < printed.index("step 5/9")

    assert train("--no-knn", "--arch", "vit_small") == 0
    assert "collapsed" not in capsys.readouterr().out
    for row in read_metrics(tmp_path / "run"):
        assert 0.05 < row["feature_std"] < 1
        assert 0.5 < row["output_std"] <= 1
        assert -1 <= row["negative_cosine"] < row["positive_cosine"] + 0.2
        assert row["skipped_share"] == 0
        assert row["grad_norm"] > 0


def plain_and_clipped(sample, *precision):
    """Two engines after a step on the same views, the gradients of the second clipped to a norm of 0.01."""
    flags = ["--warmup-epochs", 0, "--optimizer", "lars", *precision]
    engines = [engine_for(sample / "train", *flags, *clip) for clip in ([], ["--clip-grad", 0.01])]
    for engine in engines:
        engine.train_step(views_for(engine, 0))
        engine.loader.close()
    return engines


def test_the_norm_is_that_of_all_gradients_and_clips_them(sample):
    plain, clipped = plain_and_clipped(sample, "--dtype", "float64")
    theirs, ours = gradients(plain), gradients(clipped)
    norm = torch.cat([each.flatten() for each in theirs.values()]).norm().item()
    assert plain.watch.read().numbers["grad_norm"] == pytest.approx(norm)
    assert clipped.watch.read().numbers["grad_norm"] == pytest.approx(norm)
    assert norm > 0.1
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name] * 0.01 / norm, rtol=1e-4, atol=0)


def test_fp16_clips_what_the_gradients_are_without_their_scale(sample):
    plain, clipped = plain_and_clipped(sample, "--amp", "fp16")
    norm = torch.cat([each.flatten() for each in gradients(plain).values()]).norm().item()
    assert norm > 0.1
    assert clipped.watch.read().numbers["grad_norm"] == pytest.approx(norm, rel=1e-2)
    assert torch.cat([each.flatten() for each in gradients(clipped).values()]).norm().item() == pytest.approx(
        0.01, 1e-2
    )


def test_what_is_frozen_has_no_gradient_and_no_state(sample):
    engine = engine_for(sample / "train", "--stop-grad-conv1")
    engine.train_step(views_for(engine, 0))
    frozen = {"base_encoder.pos_embed", "base_encoder.patch_embed.proj.weight", "base_encoder.patch_embed.proj.bias"}
    for name, parameter in engine.model.named_parameters():
        trained = name not in frozen and not name.startswith("momentum_encoder.")
        assert (parameter.grad is not None) == trained, name
        assert (parameter in engine.optimizer.state) == trained, name
    engine.loader.close()


@pytest.mark.parametrize(
    "flags", [[], ["--optimizer", "lars", "--clip-grad", 1.0], ["--amp", "fp16"], ["--microbatch", 5]]
)
def test_a_step_never_asks_for_a_number(flags, sample, monkeypatch):
    engine = engine_for(sample / "train", *flags)
    views = [views_for(engine, seed) for seed in range(3)]

    def asked(*args, **kwargs):
        raise AssertionError("the step waits for the device")

    with monkeypatch.context() as patch:
        for method in ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__float__", "__int__", "__index__"):
            patch.setattr(torch.Tensor, method, asked)
        for pair in views:
            engine.train_step(pair)
    assert engine.watch.read().numbers["skipped_steps"] == 0
    engine.loader.close()


def three_steps(tree, compile_):
    compile_parts = partialmethod(MoCoV3.compile_parts, backend="aot_eager")
    MoCoV3.compile_parts = compile_parts  # type: ignore[assignment]
    engine = engine_for(tree, "--arch", "vit_conv_small", "--dtype", "float64", "--compile", compile_)
    for seed in range(3):
        engine.train_step(views_for(engine, seed))
    engine.loader.close()
    counters = torch._dynamo.utils.counters
    return (
        engine.watch.read().numbers,
        learned(engine),
        dict(counters["graph_break"]),
        counters["stats"]["unique_graphs"],
    )


@pytest.mark.slow
def test_the_whole_step_compiles_without_a_break_on_two_ranks(sample, tmp_path):
    eager = run_on_ranks(three_steps, sample / "train", "off", folder=tmp_path)
    compiled = run_on_ranks(three_steps, sample / "train", "on", folder=tmp_path, timeout=300)
    for (numbers, model, breaks, graphs), (expected, expected_model, _, _) in zip(compiled, eager, strict=True):
        assert breaks == {}
        assert graphs == 5  # backbone and head of either encoder, predictor: none is compiled twice
        assert numbers == pytest.approx(expected)
        torch.testing.assert_close(model, expected_model, rtol=1e-9, atol=1e-9)
