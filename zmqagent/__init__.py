"""A backend for ``torch.distributed.rpc`` in pure Python over ZeroMQ.

Importing the package registers it::

    import torch.distributed.rpc as rpc
    import zmqagent

    rpc.init_rpc("worker0", backend=rpc.BackendType.ZMQ, rank=0, world_size=2)
"""

# First, and whole: torch may load zmqagent itself, by its entry point, and must not find it half made.
import torch  # noqa: F401

from zmqagent.backend import register
from zmqagent.options import ZmqRpcBackendOptions
from zmqagent.version import __version__

__all__ = ["ZmqRpcBackendOptions", "__version__"]

register()
