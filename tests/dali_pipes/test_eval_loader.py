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


def test_a_file_that_went_bad_is_named(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_bytes(encoded(picture(i), "JPEG"))
    index = DatasetIndex.scan(tmp_path)
    (tmp_path / "1.jpg").write_bytes(b"")
    with pytest.raises(DatasetError, match=r"1\.jpg: empty file"):
        next(iter(EvalLoader(index, 3, resize=16, crop=16)))
