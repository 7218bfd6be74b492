"""Arrow pointing: pictures whose labels geometry confirms, drawn as the task's authors draw them."""

import hashlib
from math import cos, hypot, sin

import numpy as np
import pytest
import torch
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from undersong.data.arrow_pointing import ArrowPointingDataset

SMALL = {"image_size": 96, "radius": (7.5, 15), "arrow_length": (7.5, 15), "arrow_width": (1, 3), "padding": 15}


def closest_approach(scene):
    """Distance of the ray from the arrow's middle to the disc's centre."""
    dx, dy = scene.disc_x - scene.x, scene.disc_y - scene.y
    ahead = dx * cos(scene.angle) + dy * sin(scene.angle)
    return abs(dx * sin(scene.angle) - dy * cos(scene.angle)) if ahead > 0 else hypot(dx, dy)


@pytest.mark.parametrize("options", [{}, SMALL, {"image_size": (300, 192)}], ids=["192", "96", "wide"])
def test_labels_say_whether_the_ray_hits_the_disc(options):
    """Positives hit a disc smaller by 1.2, negatives miss one larger by 1.2."""
    data = ArrowPointingDataset(500, seed=3, **options)
    for scene in map(data.scene, range(500)):
        approach = closest_approach(scene)
        if scene.label:
            assert approach <= scene.radius / 1.2 + 1e-6
        else:
            assert approach >= scene.radius * 1.2 - 1e-6
    assert 200 < sum(data.labels()) < 300


@pytest.mark.parametrize("options", [{}, SMALL, {"image_size": (300, 192)}], ids=["192", "96", "wide"])
def test_objects_keep_to_their_ranges(options):
    data = ArrowPointingDataset(500, seed=1, **options)
    padding, (width, height) = data.padding, data.image_size
    scenes = [data.scene(i) for i in range(500)]
    for s in scenes:
        assert padding <= min(s.x, s.disc_x)
        assert max(s.x, s.disc_x) <= width - padding
        assert padding <= min(s.y, s.disc_y)
        assert max(s.y, s.disc_y) <= height - padding
        assert abs(s.disc_x - s.x) >= 2 * s.radius - 1e-9
        assert abs(s.disc_y - s.y) >= 2 * s.radius - 1e-9
        assert data.radius[0] <= s.radius <= data.radius[1]
    assert {s.width for s in scenes} == set(range(*data.arrow_width))
    assert {s.length for s in scenes} == set(range(int(data.arrow_length[0]), data.arrow_length[1]))
    assert max(s.x for s in scenes) > 0.9 * (width - padding)  # each axis has its own extent
    assert max(s.y for s in scenes) > 0.9 * (height - padding)


def test_pictures_are_those_of_the_authors_generator():
    """Hash of 50 pictures and labels that version 0.1 of arrow_pointing_dataset draws with the paper's ranges."""
    data = ArrowPointingDataset(50, seed=42)
    digest = hashlib.sha256()
    for item in (data[i] for i in range(50)):
        digest.update(np.asarray(item["image"]).tobytes() + bytes([item["label"]]))
    assert digest.hexdigest() == "eb815d95d2fd8776f186c414c88271c87556425868bece6dec6f23e477138999"


def test_a_sample_depends_on_the_seed_and_its_index_alone():
    few, many, other = ArrowPointingDataset(5), ArrowPointingDataset(1000), ArrowPointingDataset(5, seed=1)
    assert [few.scene(i) for i in range(5)] == [many.scene(i) for i in range(5)]
    assert all(few.scene(i) != other.scene(i) for i in range(5))


def test_a_picture_shows_a_disc_and_an_arrow_on_white():
    data = ArrowPointingDataset(20)
    for i in range(20):
        scene, image = data.scene(i), np.asarray(data[i]["image"])
        assert set(np.unique(image)) == {0, 255}
        assert not image[round(scene.disc_y), round(scene.disc_x)].any()
        assert not image[int(scene.y) - 1 : int(scene.y) + 2, int(scene.x) - 1 : int(scene.x) + 2].all()
        black = (image[..., 0] == 0).sum()
        disc = np.pi * scene.radius**2
        assert disc < black < 1.1 * disc + scene.length * (scene.width + 1) * 2


def test_with_a_processor_items_are_what_a_model_takes():
    processor = ViTImageProcessorPil(do_resize=False, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    data = ArrowPointingDataset(3, processor=processor, **SMALL)
    item = data[2]
    plain = np.asarray(ArrowPointingDataset(3, **SMALL)[2]["image"])
    torch.testing.assert_close(item["pixel_values"], torch.tensor(plain / 127.5 - 1).float().permute(2, 0, 1))
    assert item["labels"] == data.scene(2).label


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 96}, r"image_size \(96 x 96\) must leave at least four .* \(30\) .* of 30; use sides of 180"),
        ({"radius": (30, 15)}, r"radius \(30, 15\) must be a range of positive numbers"),
        ({"arrow_width": (0, 2)}, r"arrow_width \(0, 2\) must be a range of positive numbers"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        ArrowPointingDataset(3, **options)


def test_an_index_beyond_the_end_ends_a_loop():
    assert len(list(ArrowPointingDataset(3))) == 3
    with pytest.raises(IndexError, match=r"index \(3\) must lie in 0\.\.2"):
        ArrowPointingDataset(3)[3]
