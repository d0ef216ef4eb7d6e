"""Small rendered scenes with exact depth and panoptic labels: a vectorised NumPy ray caster.

World frame: x right, y away from the camera, z up, metres; the camera stands at (0, 0, height). Rays are scaled so
that the ray parameter *is* the distance along the optical axis, which is therefore the depth that is returned.
"""

import itertools
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from pipelines.demo_world.solids import SHAPES, Shape, Solid, Vector, intersect, normals_at

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
    """Everything `render` needs; a pure function of its seed."""

    seed: int
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


def sample_scene(seed: int) -> Scene:
    """Draw a scene: 2 to 5 objects of distinct (colour, shape), each clearly inside the image and mostly unoccluded.

    Sizes and pedestal heights vary widely on purpose: apparent size and height in the image must not give depth away.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    camera = Camera(
        height=rng.uniform(1.3, 2.4),
        pitch=rng.uniform(0.10, 0.32),
        roll=rng.uniform(-0.05, 0.05),
        tan_half_fov=rng.uniform(0.48, 0.66),
    )
    wanted = int(rng.integers(2, 6))
    shapes = [SHAPES[i] for i in rng.choice(len(SHAPES), size=int(rng.integers(1, 4)), replace=False)]
    objects: list[Object] = []
    rectangles: list[Vector] = []
    for attempt in itertools.count():
        if len(objects) == wanted or (attempt >= 60 and len(objects) >= 2):
            break
        candidate = _sample_object(rng, camera, shapes)
        rectangle = _rectangle(camera, candidate.solid)
        width, height = rectangle[2] - rectangle[0], rectangle[3] - rectangle[1]
        if np.abs(rectangle).max() > 0.98 or min(width, height) < 0.25:
            continue
        if any(o.name == candidate.name or _touch(candidate, o) for o in objects):
            continue
        # A pedestal may hide others too, so it counts as part of what must not cover them.
        tall = _rectangle(camera, candidate.solid, candidate.pedestal)
        if any(_overlap(tall, other) > 0.3 or _overlap(rectangle, other) > 0.3 for other in rectangles):
            continue
        objects.append(candidate)
        rectangles.append(tall)
    azimuth, elevation = rng.uniform(-np.pi, 0.0), rng.uniform(0.6, 1.2)  # the light stands on the camera's side
    light = (np.cos(azimuth) * np.cos(elevation), np.sin(azimuth) * np.cos(elevation), np.sin(elevation))
    return Scene(
        seed=seed,
        camera=camera,
        objects=tuple(objects),
        floor=_sample_surface(rng),
        wall=_sample_surface(rng),
        wall_distance=rng.uniform(9.5, 13.0),
        wall_yaw=rng.uniform(-0.3, 0.3),
        light=tuple(float(v) for v in light),  # type: ignore[arg-type]
        ambient=rng.uniform(0.3, 0.5),
    )


def _sample_object(rng: np.random.Generator, camera: Camera, shapes: list[Shape]) -> Object:
    shape = shapes[int(rng.integers(len(shapes)))]
    colour = list(COLOURS)[int(rng.integers(len(COLOURS)))]
    y = rng.uniform(2.6, 8.5)
    x = rng.uniform(-1, 1) * y * camera.tan_half_fov * 0.9
    radius = float(np.exp(rng.uniform(np.log(0.34), np.log(0.95))))
    height = 2 * radius if shape == "sphere" else radius * rng.uniform(1.5, 2.4)
    lift = rng.uniform(0.25, 1.5) if rng.random() < 0.55 else 0.0
    yaw = rng.uniform(0, np.pi / 2)
    rgb = tuple(np.clip(np.array(COLOURS[colour]) + rng.uniform(-0.05, 0.05, 3), 0, 1).tolist())
    grey = rng.uniform(0.35, 0.6) * np.array([1.0, 0.93, 0.82])
    pedestal = None
    if lift:
        pedestal = Solid(
            "box", (x, y, 0.0), radius * rng.uniform(0.75, 1.1), lift, rng.uniform(0, np.pi / 2), tuple(grey)
        )
    return Object(colour, Solid(shape, (x, y, lift), radius, height, yaw, rgb), pedestal)


def _sample_surface(rng: np.random.Generator) -> Surface:
    """Muted colours, so that no surface is mistaken for an object."""
    first = rng.uniform(0.3, 0.75) + rng.uniform(-0.08, 0.08, 3)
    second = np.clip(first + rng.choice([-1, 1]) * rng.uniform(0.1, 0.25), 0, 1)
    pattern = PATTERNS[int(rng.integers(len(PATTERNS)))]
    return Surface(pattern, (tuple(first.tolist()), tuple(second.tolist())), rng.uniform(0.9, 2.0))


def _rectangle(camera: Camera, *solids: Solid | None) -> Vector:
    """Projected (left, top, right, bottom) of some solids' bounding boxes, in [-1, 1] over the image, (4,)."""
    corners = [
        (s.base[0] + dx * s.radius, s.base[1], s.base[2] + dz)
        for s in solids
        if s
        for dx in (-1, 1)
        for dz in (0, s.height)
    ]
    seen = camera.project(np.array(corners))[:, :2]
    return np.concatenate([seen.min(axis=0), seen.max(axis=0)])


def _overlap(a: Vector, b: Vector) -> float:
    """Intersection of two rectangles over the smaller one's area."""
    (al, at, ar, ab), (bl, bt, br, bb) = a.tolist(), b.tolist()
    shared = max(min(ar, br) - max(al, bl), 0.0) * max(min(ab, bb) - max(at, bt), 0.0)
    return float(shared / min((ar - al) * (ab - at), (br - bl) * (bb - bt)))


def _touch(a: Object, b: Object) -> bool:
    def reach(o: Object) -> float:
        return 1.42 * max(o.solid.radius, o.pedestal.radius if o.pedestal else 0.0)

    return bool(np.hypot(a.solid.base[0] - b.solid.base[0], a.solid.base[1] - b.solid.base[1]) < reach(a) + reach(b))


def render(scene: Scene, size: int = 64) -> Rendering:
    """Cast one ray per pixel, and one shadow ray per hit.

    Returns:
        image uint8, depth float32 and panoptic int32, all (size, size); every id of `segments` that is visible is in
        `panoptic`.
    """
    camera = scene.camera
    solids, segments = _list(scene)
    steps = ((np.arange(size) + 0.5) / size * 2 - 1).astype(np.float32)
    u, v = np.meshgrid(steps * camera.tan_half_fov, -steps * camera.tan_half_fov)
    rays = np.stack([u, v, np.ones_like(u)], axis=-1).reshape(-1, 3) @ camera.axes.astype(np.float32)
    origin = np.array([0, 0, camera.height], np.float32)

    wall_normal = np.array([np.sin(scene.wall_yaw), -np.cos(scene.wall_yaw), 0], np.float32)
    with np.errstate(divide="ignore"):
        to_floor = np.where(rays[:, 2] < -1e-6, -camera.height / rays[:, 2], np.inf)
        facing = -(rays @ wall_normal)
        to_wall = np.where(facing > 1e-6, scene.wall_distance * np.cos(scene.wall_yaw) / facing, np.inf)
    depth = np.minimum(to_floor, to_wall).astype(np.float32)
    ids = np.where(to_floor <= to_wall, segments[0].id, segments[1].id).astype(np.int32)
    for solid, segment in zip(solids, segments[2:], strict=True):
        hit = _near(camera, solid, rays)
        t = intersect(solid, origin, rays[hit])
        closer = t < depth[hit]
        depth[hit[closer]] = t[closer]
        ids[hit[closer]] = segment.id

    points = origin + depth[:, None] * rays
    normals = np.empty_like(points)
    albedo = np.empty_like(points)
    on_floor, on_wall = ids == segments[0].id, ids == segments[1].id
    normals[on_floor], normals[on_wall] = (0, 0, 1), wall_normal
    albedo[on_floor] = _texture(scene.floor, points[on_floor, 0], points[on_floor, 1])
    along = points[on_wall] @ np.array([wall_normal[1], -wall_normal[0], 0], np.float32)
    albedo[on_wall] = _texture(scene.wall, along, points[on_wall, 2])
    for solid, segment in zip(solids, segments[2:], strict=True):
        mine = np.flatnonzero(ids == segment.id)
        normals[mine] = normals_at(solid, points[mine])
        albedo[mine] = solid.rgb

    light = np.array(scene.light, np.float32)
    diffuse = np.maximum(normals @ light, 0) * ~_shadowed(points + 2e-3 * normals, light, solids)
    colour = albedo * (scene.ambient + (1 - scene.ambient) * diffuse)[:, None]
    haze = 1 - np.exp(-0.02 * depth)[:, None]
    noise = np.random.Generator(np.random.PCG64([scene.seed, 1])).standard_normal(colour.shape, np.float32)
    colour = colour * (1 - haze) + 0.7 * haze + 0.012 * noise
    image = (np.clip(colour, 0, 1) * 255 + 0.5).astype(np.uint8)
    return Rendering(image.reshape(size, size, 3), depth.reshape(size, size), ids.reshape(size, size), tuple(segments))


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


def _near(camera: Camera, solid: Solid, rays: Vector) -> NDArray[np.int64]:
    """Indices of the rays that pass the solid's bounding ball: only those are intersected exactly."""
    centre = (solid.centre - np.array([0, 0, camera.height])).astype(np.float32)
    along = rays @ centre
    return np.flatnonzero(along**2 >= (centre @ centre - solid.bound**2) * np.einsum("ij,ij->i", rays, rays))


def _shadowed(points: Vector, light: Vector, solids: list[Solid]) -> NDArray[np.bool_]:
    """Which points (n, 3) see no light because a solid is in the way."""
    first = np.cross(light, (0, 0, 1))
    across = np.stack([first / np.linalg.norm(first), np.cross(light, first / np.linalg.norm(first))]).astype(
        np.float32
    )
    flat = points @ across.T
    dark = np.zeros(len(points), bool)
    for solid in solids:
        away = flat - across @ solid.centre.astype(np.float32)
        near = np.flatnonzero((np.einsum("ij,ij->i", away, away) < solid.bound**2) & ~dark)
        dark[near] = np.isfinite(intersect(solid, points[near], light[None]))
    return dark


def _texture(surface: Surface, a: Vector, b: Vector) -> Vector:
    """Colours (n, 3) at surface coordinates a, b (n,) in metres."""
    i, j = a / surface.period, b / surface.period
    if surface.pattern == "plain":
        mix = np.zeros_like(i)
    elif surface.pattern == "checked":
        mix = (np.floor(i) + np.floor(j)) % 2
    elif surface.pattern == "striped":
        mix = np.floor(2 * i) % 2
    else:  # tiles: thin joints
        mix = ((i % 1 < 0.12) | (j % 1 < 0.12)).astype(np.float32)
    first, second = (np.array(c, np.float32) for c in surface.rgb)
    return first + mix[:, None].astype(np.float32) * (second - first)
