"""The whole agent learns a task from pictures alone."""

import json

import numpy as np
import pytest

import dreamer
from tests.centre_task import Centre

# Preset small with smaller networks, for pictures of 16 x 16 and episodes of 24 steps.
OPTIONS = """--configs small --task gym_tests.centre_task:Centre-v0 --size 16,16 --patch_size 4 --action_repeat 1
    --time_limit 24 --parallel False --overlap False --simple_log True --device cpu --threads 1
    --dyn_deter 64 --dyn_hidden 64 --units 64 --dyn_stoch 8 --dyn_discrete 8 --batch_length 16 --train_ratio 64
    --steps 5000 --prefill 1000 --pretrain 300 --actor_start 200 --eval_every 4000 --eval_episode_num 40
    --actor_lr 1e-3 --value_lr 1e-3 --actor_entropy 3e-3 --imag_horizon 5 --discount 0.9"""


def play(policy, episodes=300):
    """Mean return of policy(place, generator) -> action."""
    env, returns = Centre(), []
    for seed in range(episodes):
        generator, over = np.random.default_rng(seed), False
        place, _ = env.reset(seed=seed)
        returns.append(0.0)
        while not over:
            place, reward, _, over, _ = env.step(policy(place, generator))
            returns[-1] += reward
    return np.mean(returns)


def test_agents_that_do_not_see_are_worth_chance():
    """What a random policy and policies of a collapsed latent reach, and what there is to reach."""
    blind = [lambda place, _, a=a: np.array(a) for a in ((0, 0), (1, 0), (1, 1), (-0.3, 0.7))]
    assert max(map(play, [lambda _, generator: generator.uniform(-1, 1, 2), *blind])) < 8
    assert play(lambda place, _: np.clip(-place / 0.25, -1, 1)) > 22


@pytest.mark.slow
def test_hrssm_learns_from_pictures_alone(tmp_path):
    """1,300 updates. Seen: 18 and 19 of at most 23 after 5000 steps; 6 before learning."""
    assert dreamer.main([*OPTIONS.split(), "--logdir", str(tmp_path)]) == 0
    rows = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    untrained, trained = (row["eval/return"] for row in rows if "eval/return" in row)
    assert untrained < 9 and trained > 13
