"""The solids of the demo world, and where rays meet them."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.floating[Any]]
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
        return float(np.hypot(self.radius * (1.4143 if self.shape == "box" else 1.0), self.height / 2))


def _local(solid: Solid, vectors: Vector, is_point: bool) -> tuple[Vector, Vector, Vector]:
    """World vectors (n, 3) in the solid's frame: foot at the origin, yaw undone."""
    x, y, z = vectors.T
    if is_point:
        x, y, z = x - np.float32(solid.base[0]), y - np.float32(solid.base[1]), z - np.float32(solid.base[2])
    if solid.shape == "box":
        c, s = np.float32(np.cos(solid.yaw)), np.float32(np.sin(solid.yaw))
        x, y = c * x + s * y, c * y - s * x
    return x, y, z


def intersect(solid: Solid, origins: Vector, directions: Vector) -> Vector:
    """Smallest positive ray parameter at which each ray enters the solid, inf where it misses.

    One of `origins`, `directions` may hold a single vector; both (n, 3) or broadcastable.
    """
    ox, oy, oz = _local(solid, np.atleast_2d(origins), True)
    dx, dy, dz = _local(solid, directions, False)
    radius, height = np.float32(solid.radius), np.float32(solid.height)
    with np.errstate(divide="ignore", invalid="ignore"):
        if solid.shape == "box":
            near: Vector | np.float32 = np.float32(-np.inf)
            far: Vector | np.float32 = np.float32(np.inf)
            for o, d, low, high in (
                (ox, dx, -radius, radius),
                (oy, dy, -radius, radius),
                (oz, dz, np.float32(0), height),
            ):
                a, b = (low - o) / d, (high - o) / d
                near, far = np.maximum(near, np.minimum(a, b)), np.minimum(far, np.maximum(a, b))
            return np.where((near <= far) & (near > 0), near, np.inf)
        if solid.shape == "sphere":
            oz = oz - radius
            a, b, c = dx * dx + dy * dy + dz * dz, ox * dx + oy * dy + oz * dz, ox * ox + oy * oy + oz * oz - radius**2
        elif solid.shape == "cylinder":
            a, b, c = dx * dx + dy * dy, ox * dx + oy * dy, ox * ox + oy * oy - radius**2
        else:  # a cone: the radius shrinks linearly to 0 at `height`
            slope = radius / height
            rest, change = slope * (height - oz), -slope * dz
            a, b, c = dx * dx + dy * dy - change**2, ox * dx + oy * dy - rest * change, ox * ox + oy * oy - rest**2
        root = np.sqrt(b * b - a * c)  # NaN where the ray misses: every comparison below is then False
        best = np.full(root.shape, np.inf, np.float32)
        for t in ((-b - root) / a, (-b + root) / a):
            z = oz + t * dz
            inside = (t > 0) & (t < best)
            if solid.shape != "sphere":
                inside &= (z >= 0) & (z <= height)
            best = np.where(inside, t, best)
        if solid.shape == "cylinder":
            t = (height - oz) / dz
            x, y = ox + t * dx, oy + t * dy
            best = np.where((t > 0) & (t < best) & (x * x + y * y <= radius**2), t, best)
    return best


def normals_at(solid: Solid, points: Vector) -> Vector:
    """Outward unit normals (n, 3) at surface points (n, 3)."""
    x, y, z = _local(solid, points, True)
    if solid.shape == "box":
        offsets = np.stack([x / solid.radius, y / solid.radius, (z - solid.height / 2) / (solid.height / 2)], axis=-1)
        face = np.abs(offsets).argmax(axis=-1)
        local = np.zeros_like(offsets)
        rows = np.arange(len(offsets))
        local[rows, face] = np.sign(offsets[rows, face])
        c, s = np.cos(solid.yaw), np.sin(solid.yaw)
        return np.stack([c * local[:, 0] - s * local[:, 1], s * local[:, 0] + c * local[:, 1], local[:, 2]], axis=-1)
    if solid.shape == "sphere":
        normals = np.stack([x, y, z - solid.radius], axis=-1)
    elif solid.shape == "cylinder":
        top = z > solid.height - 1e-3
        normals = np.stack([np.where(top, 0, x), np.where(top, 0, y), np.where(top, 1, 0)], axis=-1)
    else:
        normals = np.stack([x, y, np.hypot(x, y) * solid.radius / solid.height], axis=-1)
    lengths: Vector = np.linalg.norm(normals, axis=-1, keepdims=True)
    return normals / np.maximum(lengths, 1e-6)
