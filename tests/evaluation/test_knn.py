"""k-NN accuracy against a vote written out by hand, and its gather over ranks of unequal shares."""

import math
from collections import defaultdict

import pytest
import torch
import torch.distributed as dist

from dali_pipes import EvalBatch
from evaluation.knn import accuracy, extract, gather
from tests.ranks import run_on_ranks


def vote(bank, bank_labels, query, k, temperature):
    """The winning class of one query, image by image."""
    similarity = [float((row * query).sum()) for row in bank]
    nearest = sorted(range(len(bank)), key=lambda i: -similarity[i])[:k]
    votes: dict[int, float] = defaultdict(float)
    for i in nearest:
        votes[int(bank_labels[i])] += math.exp(similarity[i] / temperature)
    return max(votes, key=lambda label: votes[label])


def unit(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(*shape, generator=generator), dim=1)


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (5, 0.07), (20, 0.07), (20, 1.0), (500, 0.07), (20, 0.002)])
def test_accuracy_is_the_share_of_won_votes(k, temperature):
    bank, queries = unit(200, 8, seed=0), unit(60, 8, seed=1)
    labels = torch.randint(0, 4, (200,), generator=torch.Generator().manual_seed(2))
    truth = torch.tensor([vote(bank, labels, query, k, temperature) for query in queries])
    assert accuracy(bank, labels, queries, truth, k, temperature) == 1.0
    truth[:15] += 1
    assert accuracy(bank, labels, queries, truth, k, temperature) == 0.75


def test_slices_of_the_queries_vote_as_all_at_once(monkeypatch):
    bank, queries = unit(200, 8, seed=0), unit(60, 8, seed=1)
    labels, truth = (torch.randint(0, 4, (n,), generator=torch.Generator().manual_seed(n)) for n in (200, 60))
    whole = accuracy(bank, labels, queries, truth)
    assert 0 < whole < 1
    monkeypatch.setattr("evaluation.knn.SLICE", 200 * 7)
    assert accuracy(bank, labels, queries, truth) == whole


def test_near_neighbours_outvote_a_distant_majority():
    bank = torch.nn.functional.normalize(torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, 0.8]]), dim=1)
    labels, query = torch.tensor([0, 1, 1]), torch.tensor([[1.0, 0.0]])
    assert accuracy(bank, labels, query, torch.tensor([0]), k=3, temperature=0.07) == 1.0
    assert accuracy(bank, labels, query, torch.tensor([1]), k=3, temperature=10.0) == 1.0


def test_features_come_back_normalised_and_in_the_order_of_the_dataset():
    images = torch.randn(7, 3, 2, 2)
    order = torch.tensor([3, 0, 6, 1, 5, 2, 4])
    batches = [EvalBatch(images[part], part * 10, part) for part in order.split(3)]
    found, labels = gather(*extract(lambda x: x.flatten(1), batches))
    torch.testing.assert_close(found, torch.nn.functional.normalize(images.flatten(1), dim=1))
    assert labels.tolist() == [0, 10, 20, 30, 40, 50, 60]


def gathered():
    """Rank 0 holds rows 0, 2, 4; rank 1 rows 1, 3."""
    part = torch.arange(5)[dist.get_rank() :: 2]
    images = torch.arange(5.0)[:, None, None, None].expand(5, 3, 2, 2)[part] + 1
    found, labels = gather(*extract(lambda x: x.flatten(1), [EvalBatch(images, part, part)]))
    return found, labels


def test_ranks_of_unequal_shares_gather_the_whole_set(tmp_path):
    for found, labels in run_on_ranks(gathered, folder=tmp_path):
        assert labels.tolist() == [0, 1, 2, 3, 4]
        torch.testing.assert_close(found, torch.full((5, 12), 12**-0.5))


def test_a_feature_that_is_not_finite_is_refused():
    """In a bank it would be the nearest neighbour of every query, and nothing would tell."""
    features, labels = torch.nn.functional.normalize(torch.randn(8, 4), dim=1), torch.arange(8) % 2
    bad = features.clone()
    bad[3, 1] = torch.nan
    for bank, queries in ((bad, features), (features, bad)):
        with pytest.raises(FloatingPointError, match="features of 1 of 16 images are not finite"):
            accuracy(bank, labels, queries, labels)
