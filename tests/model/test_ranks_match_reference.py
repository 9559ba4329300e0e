"""Two ranks under DDP, with local and with global batch norm, against the reference and against one process."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from model import contrastive_loss
from model.backbones import head
from model.collectives import gather
from tests.golden import cases, formula
from tests.golden.compare import assert_close
from tests.ranks import run_on_ranks


def rank_step(golden, sync_bn):
    case, rank, n = golden["case"], dist.get_rank(), golden["case"]["n"]
    model = cases.build(case, sync_bn=sync_bn)
    x1, x2 = (x[rank * n : (rank + 1) * n] for x in cases.views(case, n=2 * n))
    outputs: dict[str, list[torch.Tensor]] = {"q": [], "k": []}
    model.predictor.register_forward_hook(lambda *call: outputs["q"].append(call[2]))
    head(model.momentum_encoder).register_forward_hook(lambda *call: outputs["k"].append(call[2]))
    ddp = DistributedDataParallel(model)
    loss = ddp(x1, x2, momentum=case["m"])
    loss.backward()
    (q1, q2), (k1, k2) = outputs["q"], outputs["k"]
    keys = F.normalize(gather(k2))
    expected = golden["localbn"]["f64"]["rank0"]
    return {
        "loss": loss.item(),
        "loss_q1k2": contrastive_loss(q1, k2, case["T"]).item(),
        "loss_q2k1": contrastive_loss(q2, k1, case["T"]).item(),
        "q1": formula.digest(q1),
        "k2": formula.digest(k2),
        "gathered_normalised_k2": formula.digest(keys),
        "gathered_requires_grad": keys.requires_grad,
        "my_rows_in_gather": torch.equal(keys[rank * n : (rank + 1) * n], F.normalize(k2)),
        **gradients_and_statistics(model, expected),
    }


def gradients_and_statistics(model, expected):
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {
        "grad_global_norm": cases.global_norm(gradients.values()),
        "grad_group_norm": cases.group_norms(gradients),
        "grad": cases.digests(gradients, expected["grad"]),
        "bn_after": cases.batch_norm_digests(model, expected["bn_after"]),
    }


@pytest.mark.parametrize("golden", cases.params("world2"))
@pytest.mark.parametrize(("sync_bn", "key"), [(False, "localbn"), (True, "syncbn_emulated")])
def test_two_ranks(golden, sync_bn, key, tmp_path):
    ranks = run_on_ranks(rank_step, golden, sync_bn, folder=tmp_path)
    mine = {f"rank{rank}": result for rank, result in enumerate(ranks)}
    assert_close({**mine, "mean_loss": sum(r["loss"] for r in ranks) / 2}, golden[key]["f64"])


@pytest.mark.parametrize("golden", cases.params("world2"))
def test_global_batch_norm_equals_one_process_with_the_whole_batch(golden):
    case, expected = golden["case"], golden["single_process_batch_2n"]["f64"]
    model = cases.build(case)
    loss = model(*cases.views(case, n=2 * case["n"]), momentum=case["m"])
    loss.backward()
    mine = {"loss": loss.item(), **gradients_and_statistics(model, expected)}
    assert_close(mine, expected)
    synchronised = golden["syncbn_emulated"]["f64"]
    assert_close({"mean_loss": loss.item()}, synchronised)
    assert_close(mine["grad"], synchronised["rank0"]["grad"])
    assert_close(mine["bn_after"], synchronised["rank1"]["bn_after"])
