"""Gymnasium's CarRacing with the same physics, rewards and pixels, drawn faster or not at all."""

import functools
import math
import threading

import numpy as np
import pygame
from gymnasium.envs.box2d import car_dynamics
from gymnasium.envs.box2d import car_racing as stock
from pygame.surfarray import pixels2d
from pygame.transform import smoothscale

from fast.car import FastCar
from fast.rasterizer import draw_polygons

BAR = stock.WINDOW_H // 8  # rows of the window that the instruments cover
FIELD = stock.PLAYFIELD * np.array([[(1, 1), (1, -1), (-1, -1), (-1, 1)]], dtype=np.float64)
GRASS_SQUARES = stock.GRASS_DIM * np.array(  # the playfield's light squares, in the order the stock class draws them
    [[(x + 1, y), (x, y), (x, y + 1), (x + 1, y + 1)] for x in range(-20, 20, 2) for y in range(-20, 20, 2)],
    dtype=np.float64,
)


class Surfaces(threading.local):
    """What a thread's environments draw on, one after the other: 3 MB for each would put all out of the cache."""

    def __init__(self):
        masks = (0xFF0000, 0xFF00, 0xFF, 0)  # the rasteriser's, also where a window is open
        make = functools.partial(pygame.Surface, depth=32, masks=masks)
        self.scene = make((stock.WINDOW_W, stock.WINDOW_H))
        self.instruments = make((stock.WINDOW_W, stock.WINDOW_H))
        self.narrow = make((stock.STATE_W, stock.WINDOW_H))
        self.upside_down = make((stock.STATE_W, stock.WINDOW_H - BAR))
        self.bar = self.narrow.subsurface((0, stock.WINDOW_H - BAR, stock.STATE_W, BAR))


SURFACES = Surfaces()


class FastCarRacing(stock.CarRacing):
    """`CarRacing` with the same constructor.

    The stock class transforms some 700 polygons a frame in Python, and pygame draws the visible 20 pixel by pixel; here
    `rasterizer.py` does both. The picture is narrowed before it is flipped, since narrowing works row by row; surfaces
    and score texts are kept.

    Set `drawing = False` to leave frames undrawn: `step` then returns None as observation, and `draw()` makes up
    for the last one.
    """

    drawing = True
    _score = 0.0  # what the last frame shows; the stock class draws before it subtracts the step's 0.1
    _scores = {}  # rendered score texts, shared by the environments of a process

    def draw(self):
        """Draw the last undrawn step as the stock class would have, uint8 (96, 96, 3)."""
        reward, drawing = self.reward, self.drawing
        self.reward, self.drawing = self._score, True
        self.state = self._render("state_pixels")
        self.reward, self.drawing = reward, drawing
        return self.state

    def step(self, action):
        self.car.__class__ = FastCar  # the stock class, which makes the car, names its own
        # all that the car computes from one of numpy's integers would be numpy's, too
        return super().step(int(action) if isinstance(action, np.integer) else action)

    def close(self):
        """Also destroy the bodies: Box2D holds on to Python objects in them, which would outlive the world."""
        self._destroy()
        super().close()

    def _create_track(self):
        if not super()._create_track():
            return False
        polygons, colors = zip(*self.road_poly)
        self._polygons = np.concatenate([FIELD, GRASS_SQUARES, np.array(polygons, dtype=np.float64)])
        grass = np.tile(self.grass_color, (len(GRASS_SQUARES), 1))
        self._colors = np.concatenate([[self.bg_color], grass, colors]).astype(np.float64)
        # a visited tile changes its colour in place: from now on in a row of this array
        rows = self._colors[-len(colors) :]
        views = dict(zip(map(id, colors), rows))
        for tile in self.road:
            tile.color = views[id(tile.color)]
        self.road_poly = list(zip(polygons, rows))
        return True

    def _render(self, mode):
        if mode == "state_pixels":
            self._score = self.reward
            if not self.drawing:
                return None
        if mode != "state_pixels" or self._dials_overflow():
            return super()._render(mode)
        scene, upside_down = SURFACES.scene, SURFACES.upside_down
        zoom = 0.1 * stock.SCALE * max(1 - self.t, 0) + stock.ZOOM * stock.SCALE * min(self.t, 1)
        angle, (x, y) = -self.car.hull.angle, self.car.hull.position
        scroll = pygame.math.Vector2((-x * zoom, -y * zoom)).rotate_rad(angle)
        translation = (stock.WINDOW_W / 2 + scroll[0], stock.WINDOW_H / 4 + scroll[1])
        cos, sin = pygame.math.Vector2(1, 0).rotate_rad(angle)  # the same rounding as the stock rotation

        reach = math.hypot(stock.WINDOW_W / 2, 0.75 * stock.WINDOW_H) / zoom  # from the car to the farthest corner
        inside = max(abs(x), abs(y)) + reach < stock.PLAYFIELD
        background = scene.map_rgb([int(c) for c in self.bg_color]) if inside else 0
        first = 1 if inside else 0  # the field, the first polygon, is then the background
        world = self._polygons[first:], self._colors[first:]
        draw_polygons(pixels2d(scene).T, BAR, background, *world, zoom, cos, sin, *translation)
        self._draw_car(scene, zoom, translation, cos, sin)
        rows = stock.WINDOW_H - BAR
        smoothscale(scene.subsurface((0, BAR, stock.WINDOW_W, rows)), upside_down.get_size(), upside_down)

        self.surf = instruments = SURFACES.instruments
        self._render_indicators(stock.WINDOW_W, stock.WINDOW_H)
        text = self._score_text(f"{self.reward:04.0f}")
        instruments.blit(text, text.get_rect(center=(60, stock.WINDOW_H - stock.WINDOW_H * 2.5 / 40.0)))
        smoothscale(instruments.subsurface((0, rows, stock.WINDOW_W, BAR)), SURFACES.bar.get_size(), SURFACES.bar)
        np.copyto(pixels2d(SURFACES.narrow)[:, :rows], pixels2d(upside_down)[:, ::-1])
        picture = smoothscale(SURFACES.narrow, (stock.STATE_W, stock.STATE_H))
        packed = np.frombuffer(pygame.image.tobytes(picture, "RGB"), np.uint8)
        return packed.reshape(stock.STATE_H, stock.STATE_W, 3).copy()  # the bytes are read-only

    def _draw_car(self, scene, zoom, translation, cos, sin):
        """`Car.draw` without skid marks, all corners moved at once, in the single precision of Box2D."""
        corners, owners, polygons = self._car_polygons
        corners, bodies, hidden = corners.copy(), self.car.drawlist, set()
        for i, wheel in enumerate(bodies[:4]):
            ends = wheel.phase, wheel.phase + 1.2  # of the white stripe, radians
            behind = [math.sin(end) > 0 for end in ends]
            if all(behind):
                hidden.add(2 * i + 1)
                continue
            heights = [np.sign(math.cos(end)) if away else math.cos(end) for end, away in zip(ends, behind)]
            low, high = (car_dynamics.WHEEL_R * height * car_dynamics.SIZE for height in heights)
            corners[8 * i + 4 : 8 * i + 8, 1] = low, low, high, high
        transforms = [body.transform for body in bodies]
        turned = np.array([(t.q.c, t.q.s, t.position.x, t.position.y) for t in transforms], np.float32)[owners]
        (c, s, px, py), (x, y) = turned.T, corners.T
        x, y = ((c * x - s * y) + px).astype(np.float64), ((s * x + c * y) + py).astype(np.float64)
        shown = np.stack([(cos * x - sin * y) * zoom + translation[0], (sin * x + cos * y) * zoom + translation[1]], 1)
        points = shown.tolist()
        for i, (first, last, color) in enumerate(polygons):
            if i not in hidden:
                pygame.draw.polygon(scene, color, points[first:last])

    @functools.cached_property
    def _car_polygons(self):
        """The car: corners float32 (N, 2), their bodies' numbers (N,), and polygons `(first, last, color)`.

        Each wheel is followed by its white stripe, which gets its height when it is drawn.
        """
        corners, owners, polygons = [], [], []
        for number, body in enumerate(self.car.drawlist):
            shapes = [(fixture.shape.vertices, [int(255 * x) for x in body.color]) for fixture in body.fixtures]
            if number < 4:
                width = car_dynamics.WHEEL_W * car_dynamics.SIZE
                shapes.append(([(-width, 0), (width, 0), (width, 0), (-width, 0)], car_dynamics.WHEEL_WHITE))
            for vertices, color in shapes:
                polygons.append((len(corners), len(corners) + len(vertices), color))
                corners += vertices
                owners += [number] * len(vertices)
        return np.array(corners, np.float32), np.array(owners), polygons

    def _dials_overflow(self):
        """Whether a dial rises above the instrument bar, as with wheels that spin without grip."""
        return self.car.hull.linearVelocity.length > 190 or any(wheel.omega > 390 for wheel in self.car.wheels)

    def _score_text(self, score):
        if score not in self._scores:
            pygame.font.init()
            font = pygame.font.Font(pygame.font.get_default_font(), 42)
            self._scores[score] = font.render(score, True, (255, 255, 255), (0, 0, 0))
        return self._scores[score]
