"""Polygons as pygame's gfxdraw draws them, pixel for pixel, compiled by numba.

Reads and writes nothing, except numba's cache in __pycache__: the first call on a machine compiles for some seconds.

CarRacing draws each polygon by `gfxdraw.aapolygon` and then `gfxdraw.filled_polygon` (SDL_gfx): edges after X. Wu ("An
efficient antialiasing technique", SIGGRAPH 1991) in fixed point with fractions of 16 bits, clipped to the window by
Cohen and Sutherland's method in single precision, then a scan-line fill. Here the same integers come out, without a
function call, a format lookup and three masks per pixel. Colours are 0xRRGGBB.
"""

import numpy as np
from numba import njit

LEFT, RIGHT, BELOW, ABOVE = 1, 2, 4, 8


@njit(cache=True)
def draw_polygons(pixels, hidden, background, polygons, colors, zoom, cos, sin, shift_x, shift_y):
    """Draw what the camera sees of the polygons, in their order, over `background`.

    `pixels` is the window, uint32 (H, W), changed in place; its first `hidden` rows are covered later and may get
    anything. `polygons` float64 (N, 4, 2) are corners in the world, `colors` float64 (N, 3) in 0..255. The camera turns
    by `cos`, `sin`, multiplies by `zoom` and shifts by pixels.
    """
    height, width = pixels.shape
    pixels[hidden:] = background  # pygame's own fill would put the window out of the processor's cache
    x, y = np.empty(4, np.int64), np.empty(4, np.int64)
    for n in range(len(polygons)):
        left, above, right, below = True, True, True, True
        for i in range(4):
            px, py = polygons[n, i, 0], polygons[n, i, 1]
            x[i] = int((cos * px - sin * py) * zoom + shift_x)
            y[i] = int((sin * px + cos * py) * zoom + shift_y)
            left, right = left and x[i] < -1, right and x[i] > width
            above, below = above and y[i] < -1, below and y[i] > height
        if left or right or above or below:
            continue
        color = np.uint32((int(colors[n, 0]) << 16) | (int(colors[n, 1]) << 8) | int(colors[n, 2]))
        for i in range(4):
            draw_edge(pixels, x[i], y[i], x[(i + 1) % 4], y[(i + 1) % 4], color)
        fill(pixels, hidden, x, y, color)


@njit(cache=True)
def fill(pixels, top, x, y, color):
    """Fill a quadrilateral, which may cross itself, from the row `top` on."""
    height, width = pixels.shape
    bottom = y.max()
    crossings = np.empty(4, np.int64)
    for row in range(max(y.min(), top), min(bottom, height - 1) + 1):
        count = 0
        for i in range(4):
            x1, y1, x2, y2 = x[i - 1], y[i - 1], x[i], y[i]
            if y1 > y2:
                x1, y1, x2, y2 = x2, y2, x1, y1
            if y1 <= row < y2 or (row == bottom and y1 < row <= y2):
                crossing = ((row - y1) << 16) // (y2 - y1) * (x2 - x1) + (x1 << 16)
                place = count
                while place and crossings[place - 1] > crossing:
                    crossings[place] = crossings[place - 1]
                    place -= 1
                crossings[place] = crossing
                count += 1
        for i in range(0, count, 2):
            first, last = (crossings[i] + 1 + 32768) >> 16, (crossings[i + 1] - 1 + 32768) >> 16
            if first > last:
                first, last = last, first
            first, after = max(first, 0), min(last, width - 1) + 1
            pixels[row, first : max(first, after)] = color  # by a loop over the columns all took 1.6 times as long


@njit(cache=True)
def draw_edge(pixels, x1, y1, x2, y2, color):
    """One antialiased line without its last pixel, but a horizontal or vertical one with it."""
    visible, x1, y1, x2, y2 = clip(x1, y1, x2, y2, pixels.shape[1] - 1, pixels.shape[0] - 1)
    if not visible:
        return
    pixels[y1, x1] = color
    if y1 > y2:
        x1, y1, x2, y2 = x2, y2, x1, y1
    dx, dy = x2 - x1, y2 - y1
    if dx == 0 or dy == 0:
        pixels[y1 : y2 + 1, min(x1, x2) : max(x1, x2) + 1] = color
        return
    step = 1 if dx > 0 else -1
    dx = abs(dx)
    steep = dy > dx
    slope = (dx << 16) // dy if steep else (dy << 16) // dx
    error = 0
    for _ in range((dy if steep else dx) - 1):
        error += slope
        over = error >= 65536  # the line enters the next pixel
        error &= 65535
        if steep:
            y1 += 1
            x1 += step * over
        else:
            x1 += step
            y1 += over
        weight = error >> 8
        blend(pixels, x1, y1, color, 255 - weight)
        if steep:
            blend(pixels, x1 + step, y1, color, weight)
        else:
            blend(pixels, x1, y1 + 1, color, weight)


@njit(cache=True)
def blend(pixels, x, y, color, weight):
    """Mix `color` into one pixel, weight 0..255, rounding each channel down."""
    if x < 0 or y < 0 or y >= pixels.shape[0] or x >= pixels.shape[1]:
        return
    old, new = np.int64(pixels[y, x]), np.int64(color)
    alpha = 255 * weight >> 8
    mixed = 0
    for shift in (0, 8, 16):
        a, b = (old >> shift) & 255, (new >> shift) & 255
        mixed |= (a + ((b - a) * alpha >> 8)) << shift
    pixels[y, x] = mixed


@njit(cache=True)
def clip(x1, y1, x2, y2, right, bottom):
    """Cohen-Sutherland in float32, cutting towards zero: `(visible, x1, y1, x2, y2)`, the ends perhaps swapped."""
    while True:
        code1, code2 = outside(x1, y1, right, bottom), outside(x2, y2, right, bottom)
        if code1 & code2 or not code1 | code2:
            return not code1 | code2, x1, y1, x2, y2
        if not code1:
            x1, y1, x2, y2, code1 = x2, y2, x1, y1, code2
        slope = np.float32(1)
        if x1 != x2:
            slope = np.float32(y2 - y1) / np.float32(x2 - x1)
        if code1 & (LEFT | RIGHT):
            edge = 0 if code1 & LEFT else right
            y1 += int(np.float32(edge - x1) * slope)
            x1 = edge
        else:
            edge = bottom if code1 & BELOW else 0
            if x1 != x2:
                x1 += int(np.float32(edge - y1) / slope)
            y1 = edge


@njit(cache=True)
def outside(x, y, right, bottom):
    code = LEFT if x < 0 else RIGHT if x > right else 0
    return code | (ABOVE if y < 0 else BELOW if y > bottom else 0)
