"""The tasks of Realistic ManiSkill as subclasses of mani_skill2's; importing this file requires mani_skill2.

Poses, cameras, rooms and rewards are those of the public code of RePo and HRSSM.
"""

from pathlib import Path

import numpy as np
from dm_control.utils.rewards import tolerance

from envs.maniskill import import_mani_skill

import_mani_skill()

from mani_skill2.envs.assembly.assembling_kits import AssemblingKitsEnv  # noqa: E402
from mani_skill2.envs.assembly.peg_insertion_side import PegInsertionSideEnv  # noqa: E402
from mani_skill2.envs.assembly.plug_charger import PlugChargerEnv  # noqa: E402
from mani_skill2.envs.misc.avoid_obstacles import PandaAvoidObstaclesEnv  # noqa: E402
from mani_skill2.envs.misc.turn_faucet import TurnFaucetEnv  # noqa: E402
from mani_skill2.envs.pick_and_place.pick_cube import LiftCubeEnv, PickCubeEnv  # noqa: E402
from mani_skill2.sensors.camera import CameraConfig  # noqa: E402
from mani_skill2.utils.sapien_utils import look_at  # noqa: E402
from sapien.core import Pose  # noqa: E402

# Joint angles of the Panda in radians, then its fingers in metres: the gripper around the cube, or above the faucet.
LOW = np.array([0, np.pi / 4, 0, -5 * np.pi / 8, 0, 7 * np.pi / 8, np.pi / 4, 0.04, 0.04])
HIGH = np.array([0, np.pi / 8, 0, -5 * np.pi / 8, 0, 6 * np.pi / 8, np.pi / 4, 0.04, 0.04])
# Rotation (w, x, y, z) of the visual and position of the actor in metres. ReplicaCAD stages have y up.
MATTERPORT = Pose(q=[0, 0, 0, 1]), Pose([0, 0, -0.8])
REPLICA_CAD = Pose(q=[0.707, 0.707, 0, 0]), Pose([2, 3, -0.8])
REPLICA_CAD_FOLDER = "hab2_bench_assets"  # the name in its archive
RENDER_SIZE = 256
# Positions of robot and cube in the cube tasks, and half the cube's edge, in metres.
BASE, CUBE, HALF_SIZE = (-0.615, 0.0, 0.05), (0.0, 0.0, 0.02), 0.02
GOALS = {"push_cube": (0.2, 0.2, 0.0), "lift_cube": (0.0, 0.0, 0.3), "pick_cube": (0.1, 0.0, 0.3)}
THRESHOLD = 0.025  # metres from the goal that count as reached


class InRoom:
    """Mixin: a visual-only room instead of the visible ground, and episodes that do not end."""

    scene_file: str | None = None

    def _load_background(self):
        if self.scene_file is None:
            return
        replica = REPLICA_CAD_FOLDER in Path(self.scene_file).parts
        rotation, place = REPLICA_CAD if replica else MATTERPORT
        builder = self._scene.create_actor_builder()
        builder.add_visual_from_file(self.scene_file, rotation)
        builder.build_static("room").set_pose(place)

    def _add_ground(self, altitude=0.0, render=True):
        return super()._add_ground(altitude, render=False)

    def _clear(self):
        super()._clear()
        self._renderer.clear_cached_resources()  # otherwise all rooms loaded so far stay in memory

    def _register_render_cameras(self):
        camera = self._register_cameras()
        camera.uid, camera.width, camera.height = "render_camera", RENDER_SIZE, RENDER_SIZE
        return camera

    def get_done(self, info, **kwargs):
        return False


class FixedStart(InRoom):
    """A fixed initial pose of the robot, and a camera at its front left."""

    start_qpos = LOW

    def _initialize_agent(self):
        self.agent.reset(self.start_qpos)
        self.agent.robot.set_pose(Pose(BASE))

    def _register_cameras(self):
        pose = look_at([0.2, -0.4, 0.4], [0.0, 0.0, 0.3])
        return CameraConfig("base_camera", pose.p, pose.q, 64, 64, np.pi / 2, 0.01, 10)


class FixedCube(FixedStart):
    """Cube and goal at fixed positions, and `cube_reward`."""

    name: str

    def _initialize_actors(self):
        self.obj.set_pose(Pose(CUBE))

    def _initialize_task(self):
        self.goal_pos = np.array(GOALS[self.name])
        self.goal_site.set_pose(Pose(self.goal_pos))

    def compute_dense_reward(self, info, **kwargs):
        fingers = np.linalg.norm(self.agent.finger1_link.pose.p - self.agent.finger2_link.pose.p)
        grasped = self.agent.check_grasp(self.obj, max_angle=30)
        return cube_reward(self.name, self.obj.pose.p, self.tcp.pose.p, fingers, grasped)


def cube_reward(task: str, cube: np.ndarray, tcp: np.ndarray, fingers: float, grasped: bool) -> float:
    """Reward of the cube tasks from the positions of cube and tool centre (3,) and the finger distance, in metres.

    Up to 1 for reaching the cube and 0.5 for closing the gripper around it; with the cube grasped, up to 5 for its
    distance to the goal (push), its height (lift), or its height and then another 5 for its position (pick).
    """
    goal, start, base = np.array(GOALS[task]), np.array(CUBE), np.array(BASE)
    distance = np.linalg.norm(cube - tcp)
    reward = tolerance(distance, (0, HALF_SIZE), margin=np.linalg.norm(start - base), sigmoid="long_tail")
    if distance < HALF_SIZE:
        reward += 0.5 * tolerance(fingers, (0, 2 * HALF_SIZE), margin=HALF_SIZE, sigmoid="linear")
    if not grasped:
        return float(reward)

    def near(part: slice) -> float:
        margin = np.linalg.norm(goal[part] - start[part])
        return tolerance(np.linalg.norm(goal[part] - cube[part]), (0, THRESHOLD), margin=margin, sigmoid="linear")

    if task == "push_cube":
        return float(reward + 5 * near(slice(3)))
    reward += 5 * near(slice(2, 3))
    if task == "pick_cube" and abs(goal[2] - cube[2]) < THRESHOLD:
        reward += 5 * near(slice(2))
    return float(reward)


class PushCube(FixedCube, PickCubeEnv):
    name = "push_cube"


class LiftCube(FixedCube, LiftCubeEnv):
    name = "lift_cube"


class PickCube(FixedCube, PickCubeEnv):
    name = "pick_cube"


class TurnFaucet(FixedStart, TurnFaucetEnv):
    start_qpos = HIGH

    def _initialize_articulations(self):
        self.faucet.set_pose(Pose([0.1, 0, 0]))


class AssemblingKits(InRoom, AssemblingKitsEnv):
    pass


class PegInsertionSide(InRoom, PegInsertionSideEnv):
    pass


class PlugCharger(InRoom, PlugChargerEnv):
    pass


class PandaAvoidObstacles(InRoom, PandaAvoidObstaclesEnv):
    pass


CLASSES = {
    "push_cube": PushCube,
    "lift_cube": LiftCube,
    "pick_cube": PickCube,
    "turn_faucet": TurnFaucet,
    "assembling_kits": AssemblingKits,
    "peg_insertion_side": PegInsertionSide,
    "plug_charger": PlugCharger,
    "panda_avoid_obstacles": PandaAvoidObstacles,
}
