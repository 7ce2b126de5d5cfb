"""The compiled polygons against pygame's gfxdraw, pixel for pixel."""

import numpy as np
import pygame
import pytest
from pygame import gfxdraw

from rasterizer import draw_polygons

WIDTH, HEIGHT = 1000, 800


@pytest.mark.parametrize("size", [4, 30, 200, 1500, 4000, 14_000])
@pytest.mark.parametrize("seed", range(5))
def test_random_quadrilaterals(size, seed):
    """Inside, across and outside the window; convex and crossing themselves; level, upright and diagonal edges."""
    rng = np.random.default_rng([size, seed])
    surface = pygame.Surface((WIDTH, HEIGHT), depth=32, masks=(0xFF0000, 0xFF00, 0xFF, 0))
    surface.fill(0x66CC66)
    pixels = np.zeros((HEIGHT, WIDTH), dtype=np.uint32)
    polygons, colors = [], []
    for kind in range(100):
        corners = rng.uniform((-300, -300), (1300, 1100)) + rng.uniform(-size, size, (4, 2))
        if kind % 5 == 1:
            corners[1, 0] = corners[0, 0]
        elif kind % 5 == 2:
            corners[2, 1] = corners[1, 1]
        elif kind % 5 == 3:
            corners = corners.round()
            corners[3] = corners[2] + (corners[2, 0] - corners[0, 0]) * np.array([1, -1])
        color = rng.integers(0, 256, 3)
        for peer in (gfxdraw.aapolygon, gfxdraw.filled_polygon):
            peer(surface, corners.tolist(), color.tolist())
        polygons.append(corners), colors.append(color + 0.5)
    draw_polygons(pixels, 0x66CC66, np.array(polygons), np.array(colors), 1.0, 1.0, 0.0, 0.0, 0.0)
    assert np.array_equal(pygame.surfarray.array2d(surface).T, pixels)


def test_camera():
    rng = np.random.default_rng(0)
    polygons = rng.uniform(-50, 50, (30, 1, 2)) + rng.uniform(-8, 8, (30, 4, 2))
    colors = rng.integers(0, 256, (30, 3)).astype(np.float64)
    zoom, cos, sin, shift = 9.3, np.cos(0.7), np.sin(0.7), (420.5, 310.25)
    surface = pygame.Surface((WIDTH, HEIGHT), depth=32, masks=(0xFF0000, 0xFF00, 0xFF, 0))
    for corners, color in zip(polygons, colors.astype(int).tolist()):
        rotated = corners @ np.array([[cos, sin], [-sin, cos]])
        for peer in (gfxdraw.aapolygon, gfxdraw.filled_polygon):
            peer(surface, (rotated * zoom + shift).tolist(), color)
    pixels = np.zeros((HEIGHT, WIDTH), dtype=np.uint32)
    draw_polygons(pixels, 0, polygons, colors, zoom, cos, sin, *shift)
    assert np.array_equal(pygame.surfarray.array2d(surface).T, pixels) and pixels.any()
