"""What the server of processes imports once, so that no process has to. Nothing here may start a thread."""

from __future__ import annotations

import torch.distributed.autograd
import torch.distributed.optim
import torch.distributed.rpc

import zmqagent
from zmqagent.cli.bench import floors, group, growth_workloads, workloads

__all__ = ["floors", "group", "growth_workloads", "torch", "workloads", "zmqagent"]
