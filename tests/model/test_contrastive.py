import math

import pytest
import torch

from model import contrastive_loss
from model.collectives import gather, start_gather
from tests.golden.cases import load
from tests.golden.compare import assert_close
from tests.ranks import run_on_ranks


@pytest.mark.parametrize(
    "golden", load("units")["contrastive_loss"], ids=lambda g: f"n{g['case']['n']}-T{g['case']['T']}"
)
def test_loss_and_gradient(golden):
    q = torch.tensor(golden["q"], dtype=torch.float64, requires_grad=True)
    k = torch.tensor(golden["k"], dtype=torch.float64, requires_grad=True)
    loss = contrastive_loss(q, k, golden["case"]["T"])
    grad_q, grad_k = torch.autograd.grad(loss, (q, k), allow_unused=True)
    assert_close({"loss": loss.item(), "grad_q": grad_q.tolist()}, golden["f64"])
    assert grad_k is None


def test_queries_that_know_nothing_have_the_loss_of_chance():
    n, temperature = 64, 0.2
    keys = torch.eye(n)
    loss = contrastive_loss(torch.ones(n, n), keys, temperature)
    assert loss.item() == pytest.approx(2 * temperature * math.log(n))


def test_logits_keep_their_digits_under_autocast():
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(32, 16, generator=generator, dtype=torch.float32) for _ in range(2))
    exact = contrastive_loss(q.double(), k.double(), 0.07)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = contrastive_loss(q, k, 0.07)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)
    assert contrastive_loss(q.bfloat16(), k.bfloat16(), 0.07).dtype == torch.float32


def share(q, k, temperature, early):
    rank = torch.distributed.get_rank()
    n = len(q) // torch.distributed.get_world_size()
    mine = slice(rank * n, (rank + 1) * n)
    q, k = q[mine].requires_grad_(), k[mine].requires_grad_()
    loss = contrastive_loss(q, k, temperature, start_gather(k) if early else None)
    loss.backward()
    return loss.item(), q.grad, gather(k), k.grad


@pytest.mark.parametrize("early", [False, True])
def test_ranks_together_have_the_loss_of_the_whole_batch(tmp_path, early):
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(12, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    ranks = run_on_ranks(share, q.clone(), k.clone(), 0.2, early, world_size=3, folder=tmp_path)
    q.requires_grad_()
    whole = contrastive_loss(q, k, 0.2)
    whole.backward()
    assert sum(loss for loss, *_ in ranks) / 3 == pytest.approx(whole.item(), rel=1e-12)
    torch.testing.assert_close(torch.cat([grad for _, grad, *_ in ranks]) / 3, q.grad)
    for _, _, keys, key_gradient in ranks:
        assert type(keys) is torch.Tensor
        assert torch.equal(keys, k)
        assert key_gradient is None
