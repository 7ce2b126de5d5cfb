"""Gymnasium's car, its step computed with plain floats: the same bits sooner."""

import math

from gymnasium.envs.box2d import car_dynamics
from gymnasium.envs.box2d.car_dynamics import ENGINE_POWER, FRICTION_LIMIT, SIZE, WHEEL_MOMENT_OF_INERTIA

GRASS_FRICTION = FRICTION_LIMIT * 0.6
BRAKE_FORCE = 15  # radians per second
STIFFNESS = 205000 * SIZE * SIZE


class FastCar(car_dynamics.Car):
    """`Car` whose `gas` and `step`, called in every frame, avoid numpy's scalars, which are slower than floats."""

    def gas(self, gas):
        gas = max(0, min(gas, 1))
        for wheel in self.wheels[2:4]:
            wheel.gas += min(gas - wheel.gas, 0.1)  # gradually up, at once down

    def step(self, dt):
        for wheel in self.wheels:
            error = wheel.steer - wheel.joint.angle
            wheel.joint.motorSpeed = math.copysign(min(50.0 * abs(error), 3.0), error)
            friction_limit, grass = GRASS_FRICTION, not wheel.tiles
            for tile in wheel.tiles:
                friction_limit = max(friction_limit, FRICTION_LIMIT * tile.road_friction)

            omega, power = wheel.omega, dt * ENGINE_POWER * wheel.gas
            omega += power / WHEEL_MOMENT_OF_INERTIA / (abs(omega) + 5.0)
            self.fuel_spent += power
            if wheel.brake >= 0.9:
                omega = 0.0
            elif wheel.brake > 0:
                omega -= math.copysign(min(BRAKE_FORCE * wheel.brake, abs(omega)), omega)
            wheel.phase += omega * dt

            # the wheel pushes against the difference of its speed and the road's, as far as friction lets it
            (fx, fy), (sx, sy) = wheel.GetWorldVector((0, 1)), wheel.GetWorldVector((1, 0))  # its forward and its side
            vx, vy = wheel.linearVelocity
            along = (-(fx * vx + fy * vy) + omega * wheel.wheel_rad) * STIFFNESS
            across = -(sx * vx + sy * vy) * STIFFNESS
            force = math.sqrt(along * along + across * across)
            self._leave_skid_mark(wheel, force > 2.0 * friction_limit, grass)
            if force > friction_limit:
                along, across = along / force * friction_limit, across / force * friction_limit
            wheel.omega = omega - dt * along * wheel.wheel_rad / WHEEL_MOMENT_OF_INERTIA
            wheel.ApplyForceToCenter((across * sx + along * fx, across * sy + along * fy), True)

    def _leave_skid_mark(self, wheel, skids, grass):
        """Frames for people show these marks; the observation does not."""
        mark = wheel.skid_particle
        if not skids:
            wheel.skid_start = wheel.skid_particle = None
        elif mark and mark.grass == grass and len(mark.poly) < 30:
            mark.poly.append((wheel.position[0], wheel.position[1]))
        elif wheel.skid_start is None:
            wheel.skid_start = wheel.position
        else:
            wheel.skid_particle = self._create_particle(wheel.skid_start, wheel.position, grass)
            wheel.skid_start = None
