"""A second start does not look at a dataset's files again."""

import os


def test_a_second_start_opens_no_image_to_look_at_it(train, sample, monkeypatch):
    for path in sample.rglob("*.jpg"):
        os.utime(path, (1e9, 1e9))
    assert train("--no-knn", "--max-steps", 1) == 0
    looked: list[str] = []
    monkeypatch.setattr("dali_pipes.index.check_file", lambda path, level: looked.append(path))
    assert train("--no-knn", "--max-steps", 2) == 0
    assert looked == []
