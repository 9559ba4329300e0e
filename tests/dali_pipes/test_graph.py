"""The decoder's options, which show only on a GPU: what the graph asks DALI for."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from nvidia.dali import Pipeline, fn, types

from dali_pipes import ViewLoader, multi_crop
from dali_pipes.graph import Decoder, decoded

GPU = torch.device("cuda", 0)


@pytest.fixture
def asked(monkeypatch):
    """asked(decoder): the arguments of DALI's image decoder."""
    real = fn.decoders.image

    def call(decoder):
        found: dict[str, Any] = {}

        def image(encoded, **options):
            found.update(options)
            return real(encoded, **options)  # DALI's own check of their names and types

        monkeypatch.setattr(fn.decoders, "image", image)
        with Pipeline(batch_size=1, num_threads=1, device_id=None):
            decoded(fn.external_source(name="path"), 0, decoder)
        return found

    return call


def test_each_image_is_decoded_once_for_all_views(photos, monkeypatch):
    calls, real = [], fn.decoders.image

    def image(encoded, **options):
        calls.append(options)
        return real(encoded, **options)

    monkeypatch.setattr(fn.decoders, "image", image)
    batch = next(iter(ViewLoader(photos, multi_crop(2), batch_size=2, image_size=16, num_threads=1)))
    assert len(batch.views) == 4
    assert len(calls) == 1


@pytest.mark.parametrize(("engine", "share"), [(True, 1.0), (False, 0.0)])
def test_jpegs_go_to_the_engine_all_or_none(asked, photos, engine, share):
    found = asked(Decoder.of(photos, GPU, 4, engine))
    assert (found["device"], found["hw_decoder_load"]) == ("mixed", share)
    assert (found["output_type"], found["adjust_orientation"], found["jpeg_fancy_upsampling"]) == (
        types.RGB,
        False,
        True,
    )


def test_the_engines_buffer_is_of_the_largest_image_within_bounds(asked, photos):
    found = asked(Decoder.of(photos, GPU, 4))
    assert found["preallocate_height_hint"] == photos.heights.max()
    assert found["preallocate_width_hint"] == photos.widths.max()
    huge = replace(photos, widths=photos.widths * 1000)
    found = asked(Decoder.of(huge, GPU, 512))
    height, width = found["preallocate_height_hint"], found["preallocate_width_hint"]
    assert (height, 512 * width * width * 3) == (photos.heights.max(), pytest.approx(2**30, rel=0.01))


def test_the_cpu_decoder_takes_none_of_them(asked, photos):
    assert asked(Decoder.of(photos, torch.device("cpu"), 4)).keys() == {
        *("device", "output_type", "adjust_orientation", "jpeg_fancy_upsampling")
    }
