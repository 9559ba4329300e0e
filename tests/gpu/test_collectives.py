"""What the ranks exchange, over NCCL, on one GPU: a group of one rank that takes itself for one of more."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn

from model import contrastive_loss
from model.collectives import add_up, gather, start_gather
from model.sync_bn import convert

CUDA = torch.device("cuda", 0)


@pytest.fixture
def nccl(tmp_path, monkeypatch):
    torch.cuda.set_device(CUDA)
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("nccl", store=store, rank=0, world_size=1, device_id=CUDA)
    for module in ("model.collectives", "model.sync_bn"):
        monkeypatch.setattr(f"{module}.world_size", lambda: 2)
    yield
    dist.destroy_process_group()
    torch._dynamo.reset()


@pytest.fixture(params=["eager", "compiled"])
def form(request):
    """What a function is turned into."""
    return (lambda f: torch.compile(f, fullgraph=True)) if request.param == "compiled" else (lambda f: f)


def test_keys_and_sums(nccl, form):
    x = torch.randn(32, 64, device=CUDA)
    torch.testing.assert_close(form(gather)(x), x, rtol=0, atol=0)
    torch.testing.assert_close(form(add_up)(x), x, rtol=0, atol=0)


def test_synchronised_batch_norm_is_batch_norm(nccl, form):
    torch.manual_seed(0)
    plain = nn.BatchNorm1d(64).to(CUDA)
    ours = convert(copy.deepcopy(plain))
    inputs = [x.requires_grad_() for x in torch.randn(32, 64, device=CUDA).add(3).expand(2, -1, -1).clone()]
    slope = torch.randn(32, 64, device=CUDA)
    outputs = [plain(inputs[0]), form(ours)(inputs[1])]
    for output in outputs:
        (output * slope).sum().backward()
    torch.testing.assert_close(outputs[1], outputs[0])
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad)
    for (name, mine), theirs in zip(ours.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, msg=name)
    torch.testing.assert_close(ours.state_dict(), plain.state_dict())


def test_the_loss_over_the_gathered_keys(nccl, form, monkeypatch):
    q, k = torch.randn(2, 32, 64, device=CUDA)
    gathered = form(contrastive_loss)(q, k, 0.2)
    torch.testing.assert_close(contrastive_loss(q, k, 0.2, start_gather(k)), gathered)
    monkeypatch.setattr("model.collectives.world_size", lambda: 1)
    torch.testing.assert_close(gathered, contrastive_loss(q, k, 0.2))
