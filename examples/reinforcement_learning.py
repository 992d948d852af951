"""Reinforcement learning: one agent decides, several observers live in worlds of their own and ask it what to do.

The policy lives with the agent only. An observer sends what it sees and gets an action; after each round of episodes the agent
makes what went well more likely (REINFORCE, Williams 1992). The world is the cart-pole of Barto, Sutton and Anderson (1983): a
cart has to be pushed left and right so that the pole on it does not fall.

    python examples/reinforcement_learning.py
    torchrun --nproc-per-node 3 examples/reinforcement_learning.py
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile

import torch
from torch import Tensor, nn
from torch.distributed import rpc

import zmqagent  # noqa: F401 - registers rpc.BackendType.ZMQ

WORLD_SIZE = 3
OBSERVERS = WORLD_SIZE - 1
LONGEST_EPISODE = 200
GOAL = 80
"""Steps that the pole has to stay up, as the mean of the last ten rounds; without any learning it stays up for about 20."""
ROUNDS = 300


class CartPole:
    """State: position (m) and speed of the cart, angle (rad) and angular speed of the pole."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def reset(self) -> Tensor:
        self.state = 0.1 * torch.rand(4, generator=self.generator, dtype=torch.float64) - 0.05
        return self.state.float()

    def step(self, action: int) -> tuple[Tensor, bool]:
        """The state 0.02 s later, after a push of 10 N to the left (0) or to the right (1), and whether the pole has fallen."""
        gravity, mass_cart, mass_pole, half_length, step = 9.8, 1.0, 0.1, 0.5, 0.02
        _position, speed, angle, angular_speed = self.state.tolist()
        sine, cosine, mass = math.sin(angle), math.cos(angle), mass_cart + mass_pole
        push = ((10 if action else -10) + mass_pole * half_length * angular_speed**2 * sine) / mass
        turn = (gravity * sine - cosine * push) / (half_length * (4 / 3 - mass_pole * cosine**2 / mass))
        accelerate = push - mass_pole * half_length * turn * cosine / mass
        derivative = torch.tensor([speed, accelerate, angular_speed, turn], dtype=torch.float64)
        self.state = self.state + step * derivative
        return self.state.float(), bool(abs(self.state[0]) > 2.4 or abs(self.state[2]) > math.radians(12))


class Observer:
    """Lives on a worker of its own, with its own world."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.world = CartPole(seed=index)

    def run_episode(self, agent: rpc.RRef) -> int:
        """Asks the agent at each step; returns for how many the pole stayed up."""
        state = self.world.reset()
        for step in range(LONGEST_EPISODE):
            state, fallen = self.world.step(agent.rpc_sync().select_action(self.index, state))
            if fallen:
                return step
        return LONGEST_EPISODE


class Agent:
    def __init__(self) -> None:
        torch.manual_seed(0)
        self.policy = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 2))
        self.optimizer = torch.optim.Adam(self.policy.parameters(), lr=0.01)
        self.generators = [torch.Generator().manual_seed(index) for index in range(OBSERVERS)]
        # Observers ask at the same time, on several threads, but each appends to its own list only.
        self.log_probabilities: list[list[Tensor]] = [[] for _ in range(OBSERVERS)]

    def select_action(self, observer: int, state: Tensor) -> int:
        logs = torch.log_softmax(self.policy(state), 0)
        action = int(torch.multinomial(logs.detach().exp(), 1, generator=self.generators[observer]))
        self.log_probabilities[observer].append(logs[action])
        return action

    def learn(self) -> None:
        """Each step is worth how long the pole stayed up after it; what is worth more than the average becomes more likely."""
        worths = []
        for logs in self.log_probabilities:
            discounts = 0.99 ** torch.arange(len(logs), dtype=torch.float32)
            worths.append(discounts.cumsum(0).flip(0))
        worth = torch.cat(worths)
        worth = (worth - worth.mean()) / (worth.std() + 1e-6)
        chosen = torch.stack([log for logs in self.log_probabilities for log in logs])
        self.optimizer.zero_grad()
        (-chosen * worth).mean().backward()
        self.optimizer.step()
        self.log_probabilities = [[] for _ in range(OBSERVERS)]


def teach() -> None:
    agent = Agent()
    reference = rpc.RRef(agent)
    observers = [rpc.remote(f"observer{index}", Observer, args=(index,)) for index in range(OBSERVERS)]
    steps: list[float] = []
    for number in range(1, ROUNDS + 1):
        episodes = [observer.rpc_async().run_episode(reference) for observer in observers]
        steps.append(sum(torch.futures.wait_all(episodes)) / OBSERVERS)
        agent.learn()
        recent = sum(steps[-10:]) / len(steps[-10:])
        if number % 10 == 0:
            print(f"round {number:3}   the pole stays up for {recent:5.1f} steps", flush=True)
            if recent >= GOAL:
                return
    raise AssertionError(f"after {ROUNDS} rounds the pole stays up for {recent} steps only")


def run(rank: int, backend: str, init_method: str) -> None:
    """One process: the agent, or an observer."""
    torch.set_num_threads(1)
    name = "agent" if rank == 0 else f"observer{rank - 1}"
    kind = rpc.BackendType[backend]
    options = rpc.backend_registry.construct_rpc_backend_options(kind, init_method=init_method)
    rpc.init_rpc(name, backend=kind, rank=rank, world_size=WORLD_SIZE, rpc_backend_options=options)
    if rank == 0:
        teach()
    rpc.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description="One agent, several observers, and a pole that must not fall.")
    parser.add_argument("--backend", choices=("ZMQ", "TENSORPIPE"), default="ZMQ")
    backend = parser.parse_args().backend
    if "RANK" in os.environ:  # torchrun started this process, and says where all meet
        if int(os.environ["WORLD_SIZE"]) != WORLD_SIZE:
            sys.exit(f"start {WORLD_SIZE} processes: torchrun --nproc-per-node {WORLD_SIZE}")
        run(int(os.environ["RANK"]), backend, "env://")
    else:  # start the processes here, and let them meet through a file
        with tempfile.TemporaryDirectory() as directory:
            torch.multiprocessing.spawn(run, (backend, f"file://{directory}/rendezvous"), nprocs=WORLD_SIZE)


if __name__ == "__main__":
    main()
