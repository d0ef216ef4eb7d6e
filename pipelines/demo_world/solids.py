"""The solids of the demo world, and where rays meet them."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.floating[Any]]
Number = float | np.floating[Any]
Shape = Literal["sphere", "box", "cylinder", "cone"]
SHAPES: tuple[Shape, ...] = ("sphere", "box", "cylinder", "cone")


@dataclass(frozen=True)
class Solid:
    """One convex solid with a vertical axis, standing at `base` = (x, y, z of its foot)."""

    shape: Shape
    base: tuple[float, float, float]
    radius: float  # half the width of a box
    height: float
    yaw: float
    rgb: tuple[float, float, float]

    @property
    def centre(self) -> Vector:
        """Middle of the solid, (3,)."""
        return np.array([self.base[0], self.base[1], self.base[2] + self.height / 2])

    @property
    def bound(self) -> float:
        """Radius of a ball around `centre` that holds the solid."""
        return math.hypot(self.reach, self.height / 2)

    @property
    def reach(self) -> float:
        """Radius of the upright cylinder that holds the solid: a box's corners lie farther out than its sides."""
        return self.radius * (1.4143 if self.shape == "box" else 1.0)


def _local(solid: Solid, vectors: Vector, is_point: bool) -> tuple[Vector, Vector, Vector]:
    """World vectors (3, …) in the solid's frame, each component (…): foot at the origin, yaw undone."""
    x, y, z = vectors
    if is_point:
        x, y, z = x - np.float32(solid.base[0]), y - np.float32(solid.base[1]), z - np.float32(solid.base[2])
    if solid.shape == "box":
        c, s = np.float32(np.cos(solid.yaw)), np.float32(np.sin(solid.yaw))
        x, y = c * x + s * y, c * y - s * x
    return x, y, z


def intersect(solid: Solid, origins: Vector, directions: Vector) -> Vector:
    """Smallest positive ray parameter at which each ray enters the solid, (…); inf where it misses.

    Every solid is an intersection of slabs and, unless it is a box, a quadric; a ray is inside between the last entry
    and the first exit (Kay and Kajiya 1986).

    Args:
        origins, directions: components first, (3, …), and broadcast: one of them may be a single vector, (3,).
    """
    ox, oy, oz = _local(solid, origins, True)
    dx, dy, dz = _local(solid, directions, False)
    radius, height = np.float32(solid.radius), np.float32(solid.height)
    with np.errstate(divide="ignore", invalid="ignore"):
        if solid.shape == "box":
            spans = [_slab(ox, dx, -radius, radius), _slab(oy, dy, -radius, radius), _slab(oz, dz, 0, height)]
        elif solid.shape == "sphere":
            spans = [_quadric(ox, oy, oz - radius, dx, dy, dz, radius * radius, np.float32(-1))]
        elif solid.shape == "cylinder":
            spans = [_quadric(ox, oy, oz, dx, dy, dz, radius * radius, np.float32(0)), _slab(oz, dz, 0, height)]
        else:
            slope = radius / height
            spans = [_quadric(ox, oy, oz - height, dx, dy, dz, np.float32(0), slope**2), _slab(oz, dz, 0, height)]
        near, far = spans[0]
        for entry, leave in spans[1:]:
            near, far = np.maximum(near, entry), np.minimum(far, leave)
        return np.where((near <= far) & (near > 0), near, np.float32(np.inf))


def _slab(o: Vector, d: Vector, low: Number, high: Number) -> tuple[Vector, Vector]:
    """Where rays enter and leave low ≤ o + t·d ≤ high."""
    a, b = (low - o) / d, (high - o) / d
    return np.minimum(a, b), np.maximum(a, b)


def _quadric(
    ox: Vector, oy: Vector, oz: Vector, dx: Vector, dy: Vector, dz: Vector, square: Number, bend: Number
) -> tuple[Vector, Vector]:
    """Where rays enter and leave x² + y² ≤ square + bend·z²; NaN where they miss. Of a double cone, the lower half."""
    a = dx * dx + dy * dy - bend * dz * dz
    b = ox * dx + oy * dy - bend * oz * dz
    c = ox * ox + oy * oy - bend * oz * oz - square
    root = np.sqrt(b * b - a * c)
    near, far = (-b - root) / a, (-b + root) / a
    if bend > 0:  # a ray steeper than the cone goes on inside for ever, downwards
        near, far = np.where((a < 0) & (dz > 0), -np.inf, near), np.where((a < 0) & (dz < 0), np.inf, far)
    return near, far


def normals_at(solid: Solid, points: Vector) -> Vector:
    """Outward unit normals (3, n) at surface points (3, n)."""
    x, y, z = _local(solid, points, True)
    if solid.shape == "box":
        offsets = np.stack([x / solid.radius, y / solid.radius, z * (2 / solid.height) - 1])
        face = np.abs(offsets).argmax(axis=0)
        x, y, z = np.sign(offsets) * (face == np.arange(3)[:, None])
        c, s = np.float32(np.cos(solid.yaw)), np.float32(np.sin(solid.yaw))
        return np.stack([c * x - s * y, s * x + c * y, z])
    if solid.shape == "sphere":
        return np.stack([x, y, z - solid.radius]) / np.float32(solid.radius)
    slope = 0.0 if solid.shape == "cylinder" else solid.radius / solid.height
    away = np.hypot(x, y)
    on_cap = np.minimum(z, solid.height - z) < solid.radius - slope * z - away  # nearer to an end than to the side
    cap = np.copysign(np.float32(1), z - solid.height / 2)
    length = np.maximum(away, np.float32(1e-6)) * math.hypot(1, slope)
    up = np.float32(slope / math.hypot(1, slope))
    return np.stack([np.where(on_cap, 0, x / length), np.where(on_cap, 0, y / length), np.where(on_cap, cap, up)])
