"""Small rendered scenes with exact depth and panoptic labels: a vectorised NumPy ray caster.

World frame: x right, y away from the camera, z up, metres; the camera stands at (0, 0, height). Rays are scaled so
that the ray parameter *is* the distance along the optical axis, which is therefore the depth that is returned.
"""

import itertools
import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pipelines.demo_world.solids import SHAPES, Solid, Vector, intersect, normals_at

#: Panoptic classes; stuff first. A pedestal is a thing of its own.
CLASSES = ("floor", "wall", "pedestal", *SHAPES)
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.85, 0.10, 0.10),
    "green": (0.10, 0.65, 0.15),
    "blue": (0.10, 0.20, 0.85),
    "yellow": (0.95, 0.85, 0.10),
    "purple": (0.55, 0.10, 0.70),
    "orange": (0.95, 0.48, 0.05),
    "cyan": (0.10, 0.80, 0.85),
    "white": (0.95, 0.95, 0.95),
}
#: Who uses scenes; every split draws from seeds of its own.
SPLITS = ("pretrain", "finetune", "probe", "benchmark", "teachers", "gates")
PATTERNS = ("plain", "checked", "striped", "tiled")


@dataclass(frozen=True)
class Level:
    """How much there is to see in a scene, and how hard it is to see."""

    size: int  # of the image, pixels
    objects: tuple[int, int]  # fewest and most; every number in between is equally frequent
    smallest: float  # least width and height of an object, as a share of the image's
    hidden: float  # largest share of an object's rectangle that those in front of it may cover, taken together


LEVELS = {
    "easy": Level(size=64, objects=(2, 5), smallest=0.125, hidden=0.3),
    "hard": Level(size=128, objects=(4, 9), smallest=0.07, hidden=0.7),
}
EASY = LEVELS["easy"]
_CORNERS = np.array(list(itertools.product((-1, 1), repeat=3))).T[:, :, None]  # of a box, (3, 8, 1)
CANDIDATES = 30  # objects tried for each one wanted, before another camera is


@dataclass(frozen=True)
class Object:
    """A coloured solid, perhaps on a pedestal."""

    colour: str
    solid: Solid
    pedestal: Solid | None

    @property
    def name(self) -> str:
        """What it is called, unique within a scene: ``red sphere``."""
        return f"{self.colour} {self.solid.shape}"


@dataclass(frozen=True)
class Camera:
    """Pinhole camera at (0, 0, height), looking along y, pitched down; angles in radians."""

    height: float
    pitch: float
    roll: float
    tan_half_fov: float

    @cached_property
    def axes(self) -> Vector:
        """Rows: right, up, forward in the world frame, (3, 3)."""
        c, s = np.cos(self.pitch), np.sin(self.pitch)
        right, up, forward = np.array([1.0, 0, 0]), np.array([0, s, c]), np.array([0, c, -s])
        cr, sr = np.cos(self.roll), np.sin(self.roll)
        return np.stack([cr * right + sr * up, cr * up - sr * right, forward])

    def project(self, points: Vector) -> Vector:
        """World points (n, 3) → (n, 3) of u, v, depth: u, v in [-1, 1] over the image, v downwards."""
        right, up, depth = self.axes @ (points - (0, 0, self.height)).T
        scale = 1 / (np.maximum(depth, 1e-3) * self.tan_half_fov)
        return np.stack([right * scale, -up * scale, depth], axis=-1)


@dataclass(frozen=True)
class Surface:
    """Floor or wall: two muted colours in a pattern of `period` metres."""

    pattern: str
    rgb: tuple[tuple[float, float, float], tuple[float, float, float]]
    period: float


@dataclass(frozen=True)
class Scene:
    """Everything `render` needs; a pure function of its seed and level."""

    seed: int
    level: Level
    camera: Camera
    objects: tuple[Object, ...]
    floor: Surface
    wall: Surface
    wall_distance: float  # along y, on the optical axis' side
    wall_yaw: float
    light: tuple[float, float, float]  # unit vector towards the light
    ambient: float

    def depth_of(self, index: int) -> float:
        """Distance of an object's centre along the optical axis, metres."""
        return float(self.camera.project(self.objects[index].solid.centre[None])[0, 2])


@dataclass(frozen=True)
class Segment:
    """One panoptic segment; `object` is the index into `Scene.objects`, None for floor and wall."""

    id: int
    category: str
    object: int | None


@dataclass(frozen=True)
class Rendering:
    """An image and its truth."""

    image: NDArray[np.uint8]  # (size, size, 3) RGB
    depth: NDArray[np.float32]  # (size, size) metres along the optical axis
    panoptic: NDArray[np.int32]  # (size, size) segment ids
    segments: tuple[Segment, ...]

    def pixels(self, index: int) -> int:
        """How many pixels show object `index` itself (not its pedestal)."""
        return int((self.panoptic == self.segment_id(index)).sum())

    def box(self, index: int) -> tuple[float, float, float, float] | None:
        """Visible 2-D box of object `index` as (left, top, right, bottom) in [0, 1]; None if no pixel shows it."""
        rows, columns = np.nonzero(self.panoptic == self.segment_id(index))
        if not rows.size:
            return None
        size = len(self.panoptic)
        return tuple(float(v) / size for v in (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1))  # type: ignore[return-value]

    def semantic(self) -> NDArray[np.int64]:
        """Class index (into `CLASSES`) per pixel, (size, size)."""
        table = np.zeros(max(s.id for s in self.segments) + 1, np.int64)
        for segment in self.segments:
            table[segment.id] = CLASSES.index(segment.category)
        return table[self.panoptic]

    def segment_id(self, index: int) -> int:
        """Panoptic id of object `index` itself."""
        return next(s.id for s in self.segments if s.object == index and s.category != "pedestal")


def scene_seed(split: str, index: int, seed: int = 0) -> int:
    """Seed of scene `index` (< 10⁸) of a split: no two (split, index, seed) share one."""
    return (seed * len(SPLITS) + SPLITS.index(split)) * 10**8 + index


def sample_scene(seed: int, level: Level = EASY) -> Scene:
    """Draw a scene of objects of distinct (colour, shape), each visible and, but for corners, inside the image.

    How many is drawn once; camera and kinds of shapes are drawn again until that many find room. Sizes and pedestal
    heights vary widely on purpose: apparent size and height in the image must not give depth away.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    wanted = int(rng.integers(level.objects[0], level.objects[1] + 1))
    objects: list[Object] = []
    while len(objects) < wanted:
        camera = Camera(
            height=rng.uniform(1.3, 2.4),
            pitch=rng.uniform(0.10, 0.32),
            roll=rng.uniform(-0.05, 0.05),
            tan_half_fov=rng.uniform(0.48, 0.66),
        )
        objects = _sample_objects(rng, camera, wanted, level)
    azimuth, elevation = rng.uniform(-np.pi, 0.0), rng.uniform(0.6, 1.2)  # the light stands on the camera's side
    light = (np.cos(azimuth) * np.cos(elevation), np.sin(azimuth) * np.cos(elevation), np.sin(elevation))
    return Scene(
        seed=seed,
        level=level,
        camera=camera,
        objects=tuple(objects),
        floor=_sample_surface(rng),
        wall=_sample_surface(rng),
        wall_distance=rng.uniform(9.5, 13.0),
        wall_yaw=rng.uniform(-0.3, 0.3),
        light=tuple(float(v) for v in light),  # type: ignore[arg-type]
        ambient=rng.uniform(0.3, 0.5),
    )


def _sample_objects(rng: np.random.Generator, camera: Camera, wanted: int, level: Level) -> list[Object]:
    """At most `wanted` objects of one to three shapes: candidates one after the other, if they find room."""
    # All candidates are drawn, projected and compared at once: an array costs little more than a number.
    n = CANDIDATES * wanted
    kinds = rng.permutation(len(SHAPES))[: rng.integers(1, 4)]
    shape, colour = kinds[rng.integers(len(kinds), size=n)], rng.integers(len(COLOURS), size=n)
    y = rng.uniform(2.6, 8.5, n)
    x = rng.uniform(-0.9, 0.9, n) * y * camera.tan_half_fov
    radius = np.exp(rng.uniform(np.log(0.34), np.log(0.95), n))
    height = radius * np.where(shape == SHAPES.index("sphere"), 2.0, rng.uniform(1.5, 2.4, n))
    raised = rng.random(n) < 0.55
    lift, foot = raised * rng.uniform(0.25, 1.5, n), raised * radius * rng.uniform(0.75, 1.1, n)
    body = _rectangles(camera, (x, y, lift + height / 2), (radius, 0 * y, height / 2))  # a cut through the middle
    fit = (np.abs(body).max(axis=0) < 0.98) & ((body[2:] - body[:2]).min(axis=0) > 2 * level.smallest)
    body, shape, colour = body[:, fit], shape[fit], colour[fit]
    x, y, lift, radius, height, foot = columns = np.stack([x, y, lift, radius, height, foot])[:, fit]

    reach = np.maximum(radius * np.where(shape == SHAPES.index("box"), 1.42, 1.0), 1.42 * foot)
    same = (shape == shape[:, None]) & (colour == colour[:, None])
    apart = (x - x[:, None]) ** 2 + (y - y[:, None]) ** 2
    clash = same | (apart < (reach + reach[:, None]) ** 2)
    top = (lift + height) / 2  # a pedestal hides others, too
    whole = _rectangles(camera, (x, y, top), (reach, reach, top))
    chosen = _choose(wanted, clash, _covered(body, whole) * (y[:, None] > y), level.hidden)

    yaws = rng.uniform(0, np.pi / 2, (2, len(chosen))).tolist()
    tints = np.array(list(COLOURS.values()))[colour[chosen]] + rng.uniform(-0.05, 0.05, (len(chosen), 3))
    greys = rng.uniform(0.35, 0.6, (len(chosen), 1)) * (1.0, 0.93, 0.82)
    objects = []
    for i, solid_yaw, yaw, rgb, grey, (at_x, at_y, z, r, h, f) in zip(
        chosen, *yaws, np.clip(tints, 0, 1).tolist(), greys.tolist(), columns[:, chosen].T.tolist(), strict=True
    ):
        solid = Solid(SHAPES[shape[i]], (at_x, at_y, z), r, h, solid_yaw, tuple(rgb))
        pedestal = Solid("box", (at_x, at_y, 0.0), f, z, yaw, tuple(grey)) if z else None
        objects.append(Object(list(COLOURS)[colour[i]], solid, pedestal))
    return objects


def _choose(wanted: int, clash: NDArray[np.bool_], covered: Vector, most: float) -> list[int]:
    """The first candidates, at most `wanted`, that go together.

    Args:
        clash: which pairs cannot both be chosen, (n, n).
        covered: share of each one's rectangle that each other one would cover, (n, n).
        most: of each rectangle, how much all the others together may cover.
    """
    free = np.ones(len(clash), bool)
    hidden = np.zeros(len(clash))
    chosen: list[int] = []
    while len(chosen) < wanted and free.any():
        new = int(free.argmax())
        chosen.append(new)
        hidden += covered[:, new]
        free &= ~clash[new] & (hidden <= most) & (hidden[chosen, None] + covered[chosen] <= most).all(axis=0)
    return chosen


def _sample_surface(rng: np.random.Generator) -> Surface:
    """Muted colours, so that no surface is mistaken for an object."""
    first = rng.uniform(0.3, 0.75) + rng.uniform(-0.08, 0.08, 3)
    second = np.clip(first + rng.choice([-1, 1]) * rng.uniform(0.1, 0.25), 0, 1)
    pattern = PATTERNS[int(rng.integers(len(PATTERNS)))]
    return Surface(pattern, (tuple(first.tolist()), tuple(second.tolist())), rng.uniform(0.9, 2.0))


def _rectangles(camera: Camera, centres: ArrayLike, halves: ArrayLike) -> Vector:
    """What of the image upright boxes take, (4, n): rows left, top, right, bottom, in [-1, 1] over the image.

    Args:
        centres, halves: middles and half extents along x, y, z, (3, n) each, all in front of the camera.
    """
    corners = np.asarray(centres)[:, None] + np.asarray(halves)[:, None] * _CORNERS  # (3, 8, n)
    u, v, _ = camera.project(corners.reshape(3, -1).T).T.reshape(corners.shape)
    return np.stack([u.min(axis=0), v.min(axis=0), u.max(axis=0), v.max(axis=0)])


def _covered(rectangles: Vector, covers: Vector) -> Vector:
    """Share of the area of each of n rectangles (4, n) that each of m covers (4, m) overlaps, (n, m)."""
    left, top, right, bottom = rectangles[:, :, None]
    width = np.minimum(right, covers[2]) - np.maximum(left, covers[0])
    height = np.minimum(bottom, covers[3]) - np.maximum(top, covers[1])
    shared = np.maximum(width, 0) * np.maximum(height, 0)
    share: Vector = shared / ((right - left) * (bottom - top))
    return share


def render(scene: Scene) -> Rendering:
    """Cast one ray per pixel, and a shadow ray where that meets a lit surface, at the size of the scene's level.

    Returns:
        image uint8, depth float32 and panoptic int32, all (size, size); every id that is visible is in `segments`.
    """
    camera, size = scene.camera, scene.level.size
    solids, segments = _list(scene)
    steps = ((np.arange(size) + 0.5) / size * 2 - 1) * camera.tan_half_fov
    right, up, forward = camera.axes[:, :, None, None]
    rays = (right * steps - up * steps[:, None] + forward).astype(np.float32)  # (3, size, size)
    depth, shown = _cast(scene, solids, rays)

    origin = np.array([0, 0, camera.height], np.float32)
    points = origin[:, None] + (depth * rays).reshape(3, -1)
    colour = _shade(scene, solids, points, shown.ravel()).reshape(rays.shape)
    colour += (0.7 - colour) * (1 - np.exp(-0.02 * depth))  # haze
    noise = np.random.Generator(np.random.PCG64([scene.seed, 1]))
    colour += 0.012 * noise.standard_normal(colour.shape, np.float32)
    image = (np.clip(colour, 0, 1) * 255 + 0.5).astype(np.uint8).transpose(1, 2, 0)
    ids = np.array([s.id for s in segments], np.int32)
    return Rendering(np.ascontiguousarray(image), depth, ids.take(shown), tuple(segments))


def _list(scene: Scene) -> tuple[list[Solid], list[Segment]]:
    """The solids, and all segments: floor, wall, then one per solid in the same order."""
    solids: list[Solid] = []
    segments = [Segment(1, "floor", None), Segment(2, "wall", None)]
    for index, item in enumerate(scene.objects):
        solids.append(item.solid)
        segments.append(Segment(len(segments) + 1, item.solid.shape, index))
        if item.pedestal:
            solids.append(item.pedestal)
            segments.append(Segment(len(segments) + 1, "pedestal", index))
    return solids, segments


def _wall_normal(scene: Scene) -> Vector:
    return np.array([np.sin(scene.wall_yaw), -np.cos(scene.wall_yaw), 0], np.float32)


def _cast(scene: Scene, solids: list[Solid], rays: Vector) -> tuple[Vector, NDArray[np.intp]]:
    """Depth and number of the segment that is seen (0 floor, 1 wall, then the solids), (size, size) each."""
    height = np.float32(scene.camera.height)
    to_floor = height / np.maximum(-rays[2], np.float32(1e-6))  # beyond the wall for rays that rise
    to_wall = np.float32(-scene.wall_distance * np.cos(scene.wall_yaw)) / _dot(_wall_normal(scene), rays)
    depth, shown = np.minimum(to_floor, to_wall), np.where(to_floor <= to_wall, 0, 1)
    for number, (solid, window) in enumerate(zip(solids, _windows(scene, solids), strict=True), 2):
        t = intersect(solid, np.array([0, 0, height], np.float32), rays[:, *window])
        closer = t < depth[window]
        np.copyto(depth[window], t, where=closer)
        np.copyto(shown[window], number, where=closer)
    return depth, shown


def _windows(scene: Scene, solids: list[Solid]) -> list[tuple[slice, slice]]:
    """Rows and columns of the image that hold each solid: those of its bounding box."""
    size = scene.level.size
    halves = [(s.reach, s.reach, s.height / 2) for s in solids]
    rectangles = _rectangles(scene.camera, np.transpose([s.centre for s in solids]), np.transpose(halves))
    pixels = (rectangles + 1) / 2 * size - 0.5
    ends = np.concatenate([np.floor(pixels[:2]), np.ceil(pixels[2:]) + 1]).clip(0, size).astype(int)
    return [(slice(top, bottom), slice(left, right)) for left, top, right, bottom in ends.T.tolist()]


def _shade(scene: Scene, solids: list[Solid], points: Vector, shown: NDArray[np.intp]) -> Vector:
    """Colours (3, n) of points (3, n) on the segments `shown` (n,): Lambert's law, with ambient light and shadows."""
    light, wall_normal = np.array(scene.light, np.float32), _wall_normal(scene)
    pixels = [np.flatnonzero(shown == number) for number in range(2 + len(solids))]
    facing = np.empty(len(shown), np.float32)  # cosine between normal and light
    facing[pixels[0]], facing[pixels[1]] = light[2], _dot(wall_normal, light)
    for solid, mine in zip(solids, pixels[2:], strict=True):
        facing[mine] = _dot(light, normals_at(solid, points.take(mine, axis=1)))
    lit = np.flatnonzero(facing > 0)
    diffuse = np.zeros_like(facing)
    diffuse[lit] = facing[lit] * ~_shadowed(points.take(lit, axis=1), shown[lit], light, solids)

    tone = 2 * shown  # column of the palette: two for each segment
    x, y, _ = points.take(pixels[0], axis=1)
    tone[pixels[0]] += _pattern(scene.floor, x, y)
    x, y, z = points.take(pixels[1], axis=1)
    tone[pixels[1]] += _pattern(scene.wall, wall_normal[1] * x - wall_normal[0] * y, z)
    palette = np.array([*scene.floor.rgb, *scene.wall.rgb, *(s.rgb for s in solids for _ in range(2))], np.float32)
    return palette.T.take(tone, axis=1) * (scene.ambient + (1 - scene.ambient) * diffuse)


def _shadowed(points: Vector, shown: NDArray[np.intp], light: Vector, solids: list[Solid]) -> NDArray[np.bool_]:
    """Which points (3, n), facing the light on the segments `shown`, see none as another solid is in the way, (n,)."""
    x, y, z = light.tolist()
    q = math.hypot(x, y)
    first, second = np.array([[y / q, -x / q, 0], [x * z / q, y * z / q, -q]], np.float32)  # both across the light
    a, b = _dot(first, points), _dot(second, points)
    dark = np.zeros(points.shape[1], bool)
    for number, solid in enumerate(solids, 2):
        # Seen from the light, a solid stays within its ball; and being convex, it cannot shade its own lit side.
        centre = solid.centre.astype(np.float32)
        off_a, off_b = a - _dot(first, centre), b - _dot(second, centre)
        near = np.flatnonzero((off_a * off_a + off_b * off_b < solid.bound**2) & (shown != number))
        dark[near] |= np.isfinite(intersect(solid, points.take(near, axis=1), light))
    return dark


def _dot(vector: Vector, vectors: Vector) -> Vector:
    """Dot products of (3,) with (3, …); spelled out, as BLAS may round otherwise with another number of threads."""
    product: Vector = vector[0] * vectors[0] + vector[1] * vectors[1] + vector[2] * vectors[2]
    return product


def _pattern(surface: Surface, a: Vector, b: Vector) -> NDArray[np.bool_]:
    """Where the surface shows its second colour, of coordinates a, b (n,) in metres."""
    i, j = a / surface.period, b / surface.period
    second: NDArray[np.bool_] = np.zeros(i.shape, bool)
    if surface.pattern == "checked":
        second = (np.floor(i) + np.floor(j)) % 2 > 0
    elif surface.pattern == "striped":
        second = np.floor(2 * i) % 2 > 0
    elif surface.pattern == "tiled":  # thin joints
        second = (i - np.floor(i) < 0.12) | (j - np.floor(j) < 0.12)
    return second
