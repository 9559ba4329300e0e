"""Chunks of a batch give the loss, gradients, buffers and momentum encoder of the whole batch."""

from functools import partialmethod

import pytest
import torch
import torch.distributed as dist

from model import MoCoV3
from tests.ranks import run_on_ranks
from trainer.config import ConfigError
from trainer.microbatch import check_microbatch

from .engines import engine_for, gradients, learned, views_for


def assert_equal(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def two_steps(tree, *flags):
    """Losses, gradients of each step, and all that was learned after both."""
    engine = engine_for(tree, "--dtype", "float64", "--batch-size", 14, "--warmup-epochs", 0, "--depth", 2, *flags)
    losses, grads = [], []
    for seed in range(2):
        losses.append(engine.train_step(views_for(engine, seed)))
        grads.append(gradients(engine))
    engine.loader.close()
    return torch.stack(losses), grads, learned(engine), engine.watch.read().numbers


@pytest.mark.parametrize("optimizer", ["adamw", "lars"])
def test_chunks_equal_the_whole_batch(optimizer, sample):
    whole = two_steps(sample / "train", "--optimizer", optimizer)
    # 14 images: 5, 5 and 4.
    chunks = two_steps(sample / "train", "--optimizer", optimizer, "--microbatch", 5)
    assert_equal(chunks, whole)
    assert whole[0][0] != whole[0][1]
    # Every trained parameter has a gradient that says something.
    assert all(each.abs().max() > 0 for each in whole[1][1].values())


def passes(tree, *flags):
    """How many images each forward pass of a step's backbones had, and how many its first block had."""
    engine = engine_for(tree, "--batch-size", 14, *flags)
    patches: list[int] = []
    blocks: list[int] = []
    for encoder in (engine.model.base_encoder, engine.model.momentum_encoder):
        encoder.patch_embed.register_forward_pre_hook(lambda _, given: patches.append(len(given[0])))
        encoder.blocks[0].mlp.register_forward_pre_hook(lambda _, given: blocks.append(len(given[0])))
    engine.train_step(views_for(engine, 0))
    engine.loader.close()
    return patches, blocks


def test_no_more_than_a_chunk_is_computed_at_a_time(sample):
    assert passes(sample / "train")[0] == [28, 28]  # both views in one pass, of either encoder
    # Keys, queries without a graph, and queries again with one.
    assert passes(sample / "train", "--microbatch", 5)[0] == [5, 5, 4] * 2 * 3


def test_blocks_are_computed_again(sample):
    patches, blocks = passes(sample / "train", "--checkpoint-activations")
    assert (patches, blocks) == ([28, 28], [28, 28, 28])


def test_chunks_on_two_ranks_equal_ddp_on_the_whole_batch(sample, tmp_path):
    whole = run_on_ranks(two_steps, sample / "train", folder=tmp_path)
    # 7 images a rank: 3, 3 and 1.
    chunks = run_on_ranks(two_steps, sample / "train", "--microbatch", 3, folder=tmp_path)
    assert_equal(chunks, whole)
    torch.testing.assert_close(chunks[0][1:], chunks[1][1:], rtol=0, atol=0)
    assert not torch.equal(chunks[0][0], chunks[1][0])
    single = two_steps(sample / "train")
    assert_equal(chunks[0][1:], single[1:])


def beginning(tree, *flags):
    """The weights at the start, from initial values that are each rank's own."""
    argv = ("--arch", "vit_conv_small", "--seed", dist.get_rank(), *flags)
    return engine_for(tree, *argv).model.state_dict()


@pytest.mark.parametrize("flags", [(), ("--microbatch", 3)], ids=["ddp", "chunks"])
def test_ranks_begin_alike(flags, sample, tmp_path):
    first, second = run_on_ranks(beginning, sample / "train", *flags, folder=tmp_path)
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_chunks_under_autocast(amp, sample):
    whole = two_steps(sample / "train", "--dtype", "float32", "--amp", amp)
    chunks = two_steps(sample / "train", "--dtype", "float32", "--amp", amp, "--microbatch", 5)
    assert whole[3]["skipped_steps"] == 0
    assert chunks[0][0].item() == pytest.approx(whole[0][0].item(), rel=1e-6)
    # Sums over images are rounded a chunk at a time. A cast that was made without a graph would lose whole gradients.
    ours, theirs = chunks[1][0], whole[1][0]
    assert set(ours) == set(theirs)
    for name, gradient in ours.items():
        assert (gradient - theirs[name]).norm() < 0.02 * theirs[name].norm(), name


@pytest.mark.parametrize("arch", ["vit_small", "vit_conv_small"])
def test_recomputed_blocks_give_the_same_gradients(arch, sample):
    flags = ["--arch", arch]
    whole = two_steps(sample / "train", *flags)
    again = two_steps(sample / "train", *flags, "--checkpoint-activations")
    torch.testing.assert_close(again, whole, rtol=0, atol=1e-12)


def test_chunks_and_recomputed_blocks_compile_to_full_graphs(sample, monkeypatch):
    torch._dynamo.reset()
    # Traced and differentiated as ever, but without Inductor, which takes minutes on a CPU.
    monkeypatch.setattr(MoCoV3, "compile_parts", partialmethod(MoCoV3.compile_parts, backend="aot_eager"))
    whole = two_steps(sample / "train")
    compiled = two_steps(sample / "train", "--checkpoint-activations", "--microbatch", 5, "--compile", "on")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert_equal(compiled, whole)


@pytest.mark.parametrize("arch", ["resnet18", "vit_conv_small"])
def test_batch_norm_in_the_backbone_is_refused_and_nothing_is_made(arch, train, tmp_path, capsys):
    sizes = ["--embed-dim", None, "--depth", None, "--num-heads", None] if arch == "resnet18" else []
    assert train("--arch", arch, *sizes, "--microbatch", 4, out="new") == 2
    assert f"--microbatch 4 with --arch {arch}: its batch norm" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_dropout_in_the_backbone_is_refused():
    drops = {"depth": 1, "embed_dim": 32, "num_heads": 2, "drop_path_rate": 0.1}
    model = MoCoV3.build("vit_small", dim=8, mlp_dim=8, image_size=32, backbone={**drops, "depth": 2})
    with pytest.raises(ConfigError, match="its dropout"):
        check_microbatch(4, "vit_small", model)
    check_microbatch(None, "vit_small", model)


def test_recomputation_that_would_move_statistics_twice_is_refused(train, tmp_path, capsys):
    sizes = ["--embed-dim", None, "--depth", None, "--num-heads", None]
    assert train("--arch", "resnet18", *sizes, "--checkpoint-activations", out="new") == 2
    assert "running statistics would move twice a step" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_microbatch_may_change_when_a_run_goes_on(train, losses):
    flags = ["--no-knn", "--arch", "vit_small", "--dtype", "float64"]
    assert train(*flags, out="whole") == 0
    assert train(*flags, "--max-steps", 4) == 0
    assert train(*flags, "--microbatch", 3, "--checkpoint-activations") == 0
    assert list(losses().values()) == pytest.approx(list(losses("whole").values()), rel=1e-9)
