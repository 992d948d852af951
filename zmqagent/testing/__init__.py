"""Faults on demand, to test what a job does about them. Importing this package makes ``rpc.BackendType.FAULTY_ZMQ`` exist.

``FAULTY_ZMQ`` is the ZMQ backend, except that messages of the types that its options name fail to be sent, or leave late. It is
what torch's ``FAULTY_TENSORPIPE`` is to TENSORPIPE, and takes the same options under the same names::

    import torch.distributed.rpc as rpc
    from zmqagent.testing import FaultyZmqRpcBackendOptions

    options = FaultyZmqRpcBackendOptions(num_fail_sends=2, messages_to_fail=["RREF_FORK_REQUEST"])
    rpc.init_rpc("worker0", backend=rpc.BackendType.FAULTY_ZMQ, rank=0, world_size=2, rpc_backend_options=options)
"""

from zmqagent.testing.backend import register, stop_faults
from zmqagent.testing.options import FaultyZmqRpcBackendOptions

__all__ = ["FaultyZmqRpcBackendOptions", "stop_faults"]

register()
