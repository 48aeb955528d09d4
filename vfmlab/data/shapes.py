"""Shapes and textures of the procedural images, as distance functions on arrays.

Every function takes local coordinates u (right), v (down), in which the object has radius about 1. Only
operations that IEEE 754 rounds exactly are used on pixels (+ - * / sqrt, min, max, floor), so that a pixel
does not depend on the batch it is drawn in.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy import abs, floor, maximum, minimum, sqrt

Array = np.ndarray
f32 = np.float32
HALF, SIN60, SIN45 = f32(0.5), f32(0.8660254), f32(0.70710678)


def _length(u: Array, v: Array) -> Array:
    return sqrt(u * u + v * v)


def disc(u: Array, v: Array) -> Array:
    return _length(u, v) - f32(1)


def square(u: Array, v: Array) -> Array:
    return maximum(abs(u), abs(v)) - f32(0.82)


def triangle(u: Array, v: Array) -> Array:
    return maximum(v, SIN60 * abs(u) - HALF * v) - f32(0.58)


def cross(u: Array, v: Array) -> Array:
    a, b = abs(u), abs(v)
    return minimum(maximum(a - f32(1), b - f32(0.34)), maximum(a - f32(0.34), b - f32(1)))


def ring(u: Array, v: Array) -> Array:
    return abs(_length(u, v) - f32(0.74)) - f32(0.26)


def bar(u: Array, v: Array) -> Array:
    return maximum(abs(u) - f32(0.36), abs(v) - f32(1.05))


def half(u: Array, v: Array) -> Array:
    below = v - f32(0.45)
    return maximum(_length(u, below) - f32(1), below)


def corner(u: Array, v: Array) -> Array:
    return maximum(maximum(abs(u), abs(v)) - f32(0.85), minimum(u + f32(0.2), f32(0.2) - v))


def star(u: Array, v: Array) -> Array:
    """Five lines; a point of a pentagram lies behind four of them or more: the second largest distance."""
    first = second = None
    for k in range(5):
        angle = 2 * np.pi * k / 5 + np.pi / 2
        d = f32(np.cos(angle)) * u + f32(np.sin(angle)) * v
        if first is None:
            first, second = d, np.full_like(d, -np.inf)
        else:
            second = maximum(second, minimum(first, d))
            first = maximum(first, d)
    return second - f32(0.36)


def heart(u: Array, v: Array) -> Array:
    a, b = abs(u), -v - f32(0.05)
    lobes = _length(a - f32(0.4), b - f32(0.4)) - f32(0.5657)
    return minimum(lobes, SIN45 * (a + abs(b)) - f32(0.5657))


def hexagon(u: Array, v: Array) -> Array:
    return maximum(abs(u), HALF * abs(u) + SIN60 * abs(v)) - f32(0.88)


def arrow(u: Array, v: Array) -> Array:
    head = maximum(-u, SIN45 * (u + abs(v) - f32(1)))
    return minimum(head, maximum(abs(v) - f32(0.32), abs(u + f32(0.5)) - f32(0.55)))


def crescent(u: Array, v: Array) -> Array:
    return maximum(_length(u, v) - f32(1), f32(0.8) - _length(u - f32(0.5), v))


def drop(u: Array, v: Array) -> Array:
    """A disc of radius .65 and the cone of its tangents from the tip: half angle 30 degrees."""
    cone = maximum(SIN60 * abs(u) - HALF * (v + f32(1)), v + f32(0.025))
    return minimum(_length(u, v - f32(0.3)) - f32(0.65), cone)


def trefoil(u: Array, v: Array) -> Array:
    lower = _length(abs(u) - f32(0.48), v - f32(0.28)) - f32(0.5)
    return minimum(lower, _length(u, v + f32(0.55)) - f32(0.5))


def hourglass(u: Array, v: Array) -> Array:
    return maximum(abs(v) - f32(0.88), f32(0.74) * (abs(u) - f32(0.9) * abs(v) - f32(0.1)))


Edge = Callable[[Array], Array]
"""Signed distance in local units -> coverage in [0, 1] of the inside, one pixel wide."""


def _wave(x: Array, period: float) -> Array:
    """Distance to the nearest edge of stripes of equal width: positive inside a stripe, negative outside."""
    t = x * f32(1 / period)
    return (abs(t - floor(t) - HALF) - f32(0.25)) * f32(period)


def plain(u: Array, v: Array, edge: Edge) -> Array:
    return np.zeros_like(u)


def striped(u: Array, v: Array, edge: Edge) -> Array:
    return edge(_wave(v, 0.62))


def shaded(u: Array, v: Array, edge: Edge) -> Array:
    return minimum(maximum(HALF + HALF * v, f32(0)), f32(1))


def dotted(u: Array, v: Array, edge: Edge) -> Array:
    t, s = u * f32(1 / 0.6), v * f32(1 / 0.6)
    return edge((_length(t - floor(t) - HALF, s - floor(s) - HALF) - f32(0.3)) * f32(0.6))


def checked(u: Array, v: Array, edge: Edge) -> Array:
    a, b = edge(_wave(u, 1.0)), edge(_wave(v, 1.0))
    return a + b - f32(2) * a * b
