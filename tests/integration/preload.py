"""What the server of `harness` imports once, so that no rank has to. Nothing here may start a thread."""

import os

# Before torch is imported: a test has several processes, and each would use every core.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch.distributed.rpc

import zmqagent

__all__ = ["pytest", "torch", "zmqagent"]
