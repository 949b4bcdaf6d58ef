"""What HRSSM's latent-reconstruction loss compares: which part of the latent its projection reads.

python tests/bench/projection.py LOGDIR ... [--init_from latest.pt]

On batches from the replay or the logged episodes of each run; for untrained weights, for those of --init_from, and for
the run's:

masked, clean  mean cosine of the projections of a state in the mask branch and in the raw branch: the loss is 2 - 2 cos
other states   mean cosine of the projections of two states in the mask branch
stoch / deter  variance over states of what the stochastic part of the latent adds to the projection, relative to what
               the recurrent part adds. Only the former differs between the branches, which share their history
KL             nats per state from the raw branch's posterior to the mask branch's, summed over latents
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import dreamer
import envs
import exploration
import hrssm
import tools

COLUMNS = ("masked, clean", "other states", "stoch / deter", "KL")


def compare(agent: dreamer.Agent, batch: dict[str, Tensor]) -> tuple[float, ...]:
    """The numbers of COLUMNS on a batch (B,T,*) of replay. Masks and latents are drawn at random."""
    branches = agent.world_model.representation
    with torch.no_grad():
        filtered = branches(agent.world_model.preprocess(batch))
        projected, clean = branches.projector(filtered.feat), branches.raw_projector(filtered.raw_feat)
        split = [branches.dynamics.stoch_size, branches.dynamics.deter]
        parts = zip(filtered.feat.split(split, -1), branches.projector.weight.split(split, -1), strict=True)
        stoch, deter = ((part @ weight.T).flatten(0, 1).var(0).sum() for part, weight in parts)
        raw, masked = (branches.dynamics.dist(state.logit) for state in (filtered.raw_post, filtered.post))
        unit = torch.nn.functional.normalize(projected.flatten(0, 1), dim=-1)
        n = len(unit)
        return (
            torch.cosine_similarity(projected, clean, dim=-1).mean().item(),
            # All pairs without those of a state and itself, whose cosine is 1
            ((unit.sum(0).square().sum() - n) / (n * (n - 1))).item(),
            (stoch / deter).item(),
            branches.dynamics.kl(raw, masked).mean().item(),
        )


def measure(logdir: Path, init_from: str | None, batches: int) -> dict[str, Tensor]:
    """The numbers of COLUMNS by the weights that have them, means over batches."""
    config, checkpoint = tools.run_config(logdir), tools.load_checkpoint(logdir / "latest.pt")
    if checkpoint is None:
        raise tools.UserError(f"{logdir} holds no checkpoint")
    if not config.offline_traindir:
        config.offline_traindir = str(logdir / "replay")
    logged = exploration.load_logged(config)
    drawn, found = list(logged.replay.batches(batches)), {}
    load = {"untrained": lambda agent: None}
    load |= {init_from: lambda agent: dreamer.load_weights(agent, init_from)} if init_from else {}
    load |= {str(logdir): lambda agent: dreamer.load_agent(agent, checkpoint["agent"])}
    for name, fill in load.items():
        tools.seed_everything(config.seed)
        agent = dreamer.make_agent(config, logged.spaces, logged.act_space)
        if not isinstance(agent.world_model.representation, hrssm.HybridRSSM):
            raise tools.UserError(f"{logdir} was trained with --method {config.method}: only hrssm has a projection")
        fill(agent)
        found[name] = torch.tensor([compare(agent, batch) for batch in drawn]).mean(0)
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logdir", nargs="+", type=Path, help="folders of runs of --method hrssm")
    parser.add_argument("--init_from", help="weights to measure besides, of upstream or of this code")
    parser.add_argument("--batches", type=int, default=8, help="batches of the run's size (8)")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    try:
        print("".join(f"{column:>15}" for column in COLUMNS))
        for logdir in args.logdir:
            for name, values in measure(logdir, args.init_from, args.batches).items():
                print("".join(f"{value:15.3g}" if i > 1 else f"{value:15.6f}" for i, value in enumerate(values)), name)
    except (tools.UserError, envs.EnvError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
