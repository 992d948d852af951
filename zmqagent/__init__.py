"""A backend for ``torch.distributed.rpc`` in pure Python over ZeroMQ.

Importing the package registers it::

    import torch.distributed.rpc as rpc
    import zmqagent

    rpc.init_rpc("worker0", backend=rpc.BackendType.ZMQ, rank=0, world_size=2)
"""

from zmqagent.backend import register
from zmqagent.options import ZmqRpcBackendOptions
from zmqagent.version import __version__

__all__ = ["ZmqRpcBackendOptions", "__version__"]

register()
