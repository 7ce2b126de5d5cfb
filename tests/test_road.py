"""Where the car is on the road, and putting it elsewhere."""

import numpy as np
import pytest
from test_car_racing_env import ACCELERATE, after_gas

from car_racing_env import make_env
from road import move_car


def test_moving_the_car_is_a_rigid_motion():
    """Hull and wheels keep places and velocities as the hull sees them."""
    car = after_gas(make_env(2, draw=False)).unwrapped.car
    hull, bodies = car.hull, (car.hull, *car.wheels)

    def shape():
        places = [[*hull.GetLocalPoint(body.position), body.angle - hull.angle] for body in bodies]
        return np.hstack([places, [hull.GetLocalVector(body.linearVelocity) for body in bodies]])

    before, place = shape(), np.array(hull.position)
    move_car(car, 2.5, (3.0, -1.0))
    np.testing.assert_allclose(shape(), before, atol=1e-4)
    np.testing.assert_allclose(np.array(hull.position), place + (3.0, -1.0), atol=1e-4)
    move_car(car, 0.0, velocity=np.array([0.0, 10.0]))
    assert all(body.linearVelocity.y == 10 and body.angularVelocity == 0 for body in bodies)


def test_the_road_is_followed():
    """Tiles driven are those that the speed along the road makes; backwards they count down; the offset is signed."""
    env, total = after_gas(make_env(2, draw=False), 0), 0.0
    car, road = env.unwrapped.car, env.road
    for _ in range(50):
        env.step(ACCELERATE)
        total += np.array(car.hull.linearVelocity) @ (-np.sin(road.heading), np.cos(road.heading)) * 2 / 50 / 3.5
    assert road.travelled == pytest.approx(total, rel=0.05) and total > 12
    offset, before = road.offset, road.travelled
    move_car(car, np.pi, 2 * np.array([np.cos(road.heading), np.sin(road.heading)]))
    road.look()
    assert road.offset - offset == pytest.approx(2, abs=0.1)
    for _ in range(10):
        env.step(0)
    assert road.travelled < before - 2


def test_a_short_cut_is_followed():
    """Beside its road the car stays on it; put on the far side of the track it is there, and has driven nothing."""
    env = after_gas(make_env(2, draw=False), 0)
    car, road = env.unwrapped.car, env.road
    own, far = road.tile, (road.tile + len(road.track) // 2) % len(road.track)
    move_car(car, 0.0, 20 * np.array([np.cos(road.heading), np.sin(road.heading)]))
    road.look()
    assert abs(road.tile - own) < 8 and road.offset > 15 and road.short_cuts == 0
    travelled = road.travelled
    move_car(car, 0.0, road.track[far, 2:] - np.array(car.hull.position))
    road.look()
    assert (road.tile, road.short_cuts, road.travelled) == (far, 1, travelled) and abs(road.offset) < 1e-3
