"""Arrow pointing: does the arrow in the picture point at the disc? The answer needs both places and a direction.

The task of pLSTM (Poeppel et al., arXiv 2506.11997, section 5), drawn on the spot from the sampling rule of its
authors: sample i depends on the seed and on i only. Objects have a size in pixels, so that a larger picture holds the
same arrow and disc further apart, which is what tests extrapolation. Needs Pillow.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import acos, atan2, cos, pi, sin, sqrt

import numpy as np

__all__ = ["ArrowPointingDataset", "ArrowScene"]

CONE = 1.2  # positives hit a disc smaller by this factor, negatives miss one larger by it: no close calls
HEAD_ANGLE, HEAD_PART = 0.5, 2.5  # of the two strokes of the arrow's head, in radians and of the arrow's length


@dataclass(frozen=True)
class ArrowScene:
    """What there is to see: an arrow through (x, y) in a direction, and a disc; in pixels and radians."""

    x: float
    y: float
    angle: float
    length: int
    width: int
    disc_x: float
    disc_y: float
    radius: float
    label: int

    def draw(self, size):
        """The scene in black on white, as a PIL image in RGB of `size`, (width, height)."""
        from PIL import Image, ImageDraw

        image = Image.new("RGB", size, (255, 255, 255))
        pen = ImageDraw.Draw(image)
        half = self.length // 2
        dx, dy = half * cos(self.angle), half * sin(self.angle)
        tip = self.x + dx, self.y + dy
        strokes = [(self.x - dx, self.y - dy)]
        for side in (-HEAD_ANGLE, HEAD_ANGLE):
            back = self.length // HEAD_PART
            strokes.append((tip[0] - back * cos(self.angle + side), tip[1] - back * sin(self.angle + side)))
        for start in strokes:
            pen.line((*start, *tip), fill=(0, 0, 0), width=self.width)
        box = (
            self.disc_x - self.radius,
            self.disc_y - self.radius,
            self.disc_x + self.radius,
            self.disc_y + self.radius,
        )
        pen.ellipse(box, fill=(0, 0, 0))
        return image


class ArrowPointingDataset:
    """Pictures of an arrow and a disc, label 1 if the arrow points at the disc: half of them do.

    Args:
        samples: how many.
        image_size: side of the picture in pixels, or (width, height).
        radius: range of the disc's radius.
        arrow_length, arrow_width: ranges; they are rounded down to whole pixels.
        padding: least distance of the arrow's middle and of the disc's from the border.
        seed: other seeds give other pictures.
        processor: a transformers image processor; with one, items are what a model takes.

    Items:
        `{"image": PIL image, "label": 0 or 1}`, or with a processor `{"pixel_values": tensor, "labels": 0 or 1}`.

    Raises:
        ValueError: objects that do not fit into the picture; the message names the sizes.

    >>> data = ArrowPointingDataset(100, image_size=96, radius=(7.5, 15), arrow_length=(7.5, 15), padding=15)
    >>> data[0]["image"].size, sum(data.labels())
    ((96, 96), 49)
    """

    def __init__(
        self,
        samples=100_000,
        *,
        image_size=192,
        radius=(15, 30),
        arrow_length=(15, 30),
        arrow_width=(2, 4),
        padding=30,
        seed=0,
        processor=None,
    ):
        self.samples, self.radius, self.padding, self.seed = samples, radius, padding, seed
        self.image_size = (image_size,) * 2 if isinstance(image_size, int) else tuple(image_size)
        self.arrow_length, self.arrow_width, self.processor = arrow_length, arrow_width, processor
        for name, (low, high) in {"radius": radius, "arrow_length": arrow_length, "arrow_width": arrow_width}.items():
            if not 0 < low <= high:
                raise ValueError(f"{name} ({low}, {high}) must be a range of positive numbers, the lower first.")
        room = min(self.image_size) - 2 * padding
        if room < 4 * radius[1]:
            raise ValueError(
                f"image_size ({' x '.join(map(str, self.image_size))}) must leave at least four times the largest"
                f" radius ({radius[1]}) inside a padding of {padding}; use sides of"
                f" {int(np.ceil(4 * radius[1] + 2 * padding))} or more."
            )
        self._first = int(np.random.default_rng(seed).integers(1 << 62))

    def __len__(self):
        return self.samples

    def __getitem__(self, index):
        scene = self.scene(index)
        image = scene.draw(self.image_size)
        if self.processor is None:
            return {"image": image, "label": scene.label}
        pixel_values = self.processor(images=image, return_tensors="pt")["pixel_values"][0]
        return {"pixel_values": pixel_values, "labels": scene.label}

    def labels(self):
        """The labels of all samples, without drawing them."""
        return [self.scene(index).label for index in range(self.samples)]

    def scene(self, index):
        """What picture `index` shows.

        Every axis by itself: the disc is at least two radii away from the arrow, both ways round a padded box whose
        ends meet. The arrow's angle is uniform among those that hit the disc, or among those that miss it.
        """
        if not 0 <= index < self.samples:
            raise IndexError(f"index ({index}) must lie in 0..{self.samples - 1}.")
        rng = np.random.default_rng(self._first + index)
        label = int(rng.random() < 0.5)
        length, width = int(rng.uniform(*self.arrow_length)), int(rng.uniform(*self.arrow_width))
        box = [side - 2 * self.padding for side in self.image_size]
        arrow = [side * rng.random() for side in box]
        radius = rng.uniform(*self.radius)
        disc = []
        for start, side in zip(arrow, box, strict=True):
            place = start + 2 * radius + (side - 4 * radius) * rng.random()
            disc.append(place - side if place > side else place)
        dx, dy = disc[0] - arrow[0], disc[1] - arrow[1]
        distance, reach = dx**2 + dy**2, (radius / CONE if label else radius * CONE) ** 2
        cone = acos(sqrt(abs(distance - reach) / distance))
        share = rng.random()
        angle = atan2(dy, dx) + (share * 2 * cone - cone if label else share * (2 * pi - 2 * cone) + cone)
        (x, y), (disc_x, disc_y) = ([place + self.padding for place in point] for point in (arrow, disc))
        return ArrowScene(x, y, angle, length, width, disc_x, disc_y, radius, label)
