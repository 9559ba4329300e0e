import pytest
import torch
import torchvision.transforms as T

from dali_pipes import DatasetError, DatasetIndex, EvalLoader, ViewSpec
from dali_pipes.plan import EvalPlan
from dali_pipes.reference import ReferenceViews, load_image
from dali_pipes.views import IMAGENET_MEAN, IMAGENET_STD, Recipe
from tests.dali_pipes.odd_files import encoded, picture

STEP = 1 / 255 / min(IMAGENET_STD)  # the largest difference that one grey level makes


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    for i in range(11):
        path = root / "ab"[i % 2] / f"{i:02d}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encoded(picture(i, 20 + 7 * i, 60 + i % 3), "PNG"))
    return DatasetIndex.scan(root)


def test_images_are_resized_and_cropped_as_torchvision_does(photos):
    """Also where the crop is as large as the resized image, so that its border counts."""
    for resize, crop in ((256, 224), (224, 224), (36, 32), (35, 32)):
        transform = T.Compose(
            [T.Resize(resize), T.CenterCrop(crop), T.ToTensor(), T.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
        )
        theirs = torch.stack([transform(load_image(path)) for path in photos.paths])
        batches = list(EvalLoader(photos, batch_size=5, resize=resize, crop=crop, num_threads=2))
        ours = torch.cat([batch.images for batch in batches])
        assert ours.dtype == torch.float32
        assert batches[0].images.is_contiguous(memory_format=torch.channels_last)
        gap = (ours - theirs).abs()
        assert gap.max() < 1.01 * STEP
        assert (gap > 1e-5).float().mean() < 0.02


def test_every_image_once_with_its_label(index):
    batches = list(EvalLoader(index, batch_size=4, resize=16, crop=16, num_threads=2))
    assert [len(batch.indices) for batch in batches] == [4, 4, 3]
    rows = torch.cat([batch.indices for batch in batches])
    assert rows.tolist() == list(range(11))
    assert torch.cat([batch.labels for batch in batches]).tolist() == index.labels.tolist()


def test_every_pass_is_the_same_and_starts_at_the_beginning(index):
    loader = EvalLoader(index, batch_size=4, resize=16, crop=16, num_threads=2)
    first = [batch.images.clone() for batch in loader]
    next(iter(loader))
    loader.set_epoch(5)
    second = [batch.images for batch in loader]
    assert len(first) == len(second) == len(loader) == 3
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_what_is_read_ahead_serves_the_next_pass(index, monkeypatch):
    made = []
    inputs = EvalPlan.inputs

    def counted(plan, rows, epoch):
        made.append(rows)
        return inputs(plan, rows, epoch)

    monkeypatch.setattr(EvalPlan, "inputs", counted)
    loader = EvalLoader(index, batch_size=4, resize=16, crop=16, num_threads=2)
    assert len([*loader, *loader]) == 6
    assert len(made) == 8  # and two are under way


@pytest.mark.parametrize("world_size", [2, 3, 11])
def test_shares_are_disjoint_and_complete(index, world_size):
    rows = []
    for rank in range(world_size):
        loader = EvalLoader(index, 4, resize=16, crop=16, rank=rank, world_size=world_size, num_threads=1)
        mine = [batch.indices for batch in loader]
        assert len(mine) == len(loader)
        rows += torch.cat(mine).tolist()
    assert sorted(rows) == list(range(11))


def test_training_views_are_torchvisions(photos):
    spec = ViewSpec(size=64, jitter=0.0, grayscale=0.0, blur=0.0, flip=0.5)
    loader = EvalLoader(photos, batch_size=5, crop=64, train=True, seed=4, num_threads=2)
    normalise = T.Normalize(IMAGENET_MEAN, IMAGENET_STD)
    orders = []
    for epoch in (0, 1):
        loader.set_epoch(epoch)
        batches = list(loader)
        orders.append(torch.cat([batch.indices for batch in batches]).tolist())
        reference = ReferenceViews(photos, Recipe((spec,)), seed=4, epoch=epoch)
        for batch in batches:
            for image, row in zip(batch.images, batch.indices.tolist(), strict=True):
                gap = (image - normalise(reference[row][0][0] / 255)).abs()
                assert gap.max() < 1.01 * STEP
                assert (gap > 1e-5).float().mean() < 0.03
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(12))
    assert orders[0] != orders[1]


def test_training_ranks_stay_in_step(index):
    loaders = [EvalLoader(index, 2, crop=16, train=True, rank=r, world_size=3, num_threads=1) for r in range(3)]
    rows = [torch.cat([batch.indices for batch in loader]).tolist() for loader in loaders]
    assert {len(loader) for loader in loaders} == {2}
    assert [len(share) for share in rows] == [3, 3, 3]
    assert len({row for share in rows for row in share}) == 9


def test_wrong_arguments_are_named_with_the_mend(index):
    with pytest.raises(ValueError, match="crop 224 does not fit into images resized to 200; use at most 200"):
        EvalLoader(index, 4, resize=200)
    with pytest.raises(DatasetError, match="11 images are too few for 12 ranks; use at most 11 ranks"):
        EvalLoader(index, 4, world_size=12)


@pytest.fixture
def damaged(tmp_path):
    """Seven images and what makes some of them unreadable behind the scan's back."""
    for i in range(7):
        (tmp_path / f"{i}.jpg").write_bytes(encoded(picture(i), "JPEG"))
    index = DatasetIndex.scan(tmp_path)

    def damage(*rows):
        for row in rows:
            (tmp_path / f"{row}.jpg").write_bytes(b"")
        return index

    return damage


@pytest.mark.parametrize(
    ("bad", "sizes"), [([1], [2, 3, 1]), ([6], [3, 3]), ([3, 4, 5], [3, 1]), ([0, 1, 2, 6], [3])], ids=str
)
def test_what_cannot_be_used_is_left_out_and_the_others_stay(damaged, bad, sizes):
    whole = torch.cat([batch.images for batch in EvalLoader(damaged(), 3, resize=16, crop=16)])
    said: list[str] = []
    loader = EvalLoader(damaged(*bad), 3, resize=16, crop=16, on_failed=said.append)
    for _ in range(2):  # passes
        batches = list(loader)
        assert [len(batch.indices) for batch in batches] == sizes
        rows = torch.cat([batch.indices for batch in batches])
        assert rows.tolist() == [row for row in range(7) if row not in bad]
        assert torch.equal(torch.cat([batch.images for batch in batches]), whole[rows])
    assert len(said) == len(bad)
    assert all(any(f"{row}.jpg: empty file; it passed the scan" in line for line in said) for row in bad)


def test_in_training_another_image_stands_in(damaged):
    undisturbed = EvalLoader(damaged(), 3, crop=16, train=True, seed=1)
    said: list[str] = []
    loader = EvalLoader(damaged(2, 5), 3, crop=16, train=True, seed=1, on_failed=said.append)
    for epoch in range(2):
        undisturbed.set_epoch(epoch)
        loader.set_epoch(epoch)
        batches = list(loader)
        order = torch.from_numpy(undisturbed._plan.share(epoch))
        assert [len(batch.indices) for batch in batches] == [3, 3, 1]
        rows = torch.cat([batch.indices for batch in batches])
        good = [row for row in order.tolist() if row not in (2, 5)]
        assert set(rows.tolist()) == set(good)
        assert [row for row, first in zip(rows.tolist(), order.tolist(), strict=True) if row == first] == good
    assert len(said) == 2


def test_too_many_bad_images_end_it(damaged, monkeypatch):
    index = damaged(*range(7))
    with pytest.raises(DatasetError, match="none of the 7 images of rank 0 can be used"):
        list(EvalLoader(index, 3, resize=16, crop=16, on_failed=lambda line: None))
    with pytest.raises(DatasetError, match="none of the 7 images of rank 0 can be used"):
        list(EvalLoader(index, 3, crop=16, train=True, on_failed=lambda line: None))
    monkeypatch.setattr("dali_pipes.failures.tolerated", lambda count: 1)
    with pytest.raises(
        DatasetError, match=r"2 images that passed the scan .* at most 1 may fail; the last is .*jpg: empty"
    ):
        list(EvalLoader(index, 3, resize=16, crop=16, on_failed=lambda line: None))
