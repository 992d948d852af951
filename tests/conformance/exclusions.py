"""Tests that are not run on a backend, and tests whose failure is known; each with its reason.

A test that is not applicable is counted as skipped. A test known to fail, always or at times, is run; a failure is counted as
such, but does not make the run fail.
"""

from __future__ import annotations

__all__ = ["KNOWN_FAILURES", "NOT_APPLICABLE"]

_NAMES_TENSORPIPE = "names TENSORPIPE itself, so that it proves nothing of another backend"

NOT_APPLICABLE: dict[str, dict[str, str]] = {
    "ZMQ": {
        "TensorPipeAgentRpcTest.test_infer_backend_from_options": _NAMES_TENSORPIPE,
        "TensorPipeAgentRpcTest.test_mismatched_type_for_options": _NAMES_TENSORPIPE,
    },
}
"""Backend -> ``Suite.test`` -> reason."""

_RACES = "the test races with itself: new_group is called by RPC on a worker that may not have joined the process group yet"

KNOWN_FAILURES: dict[str, dict[str, str]] = {
    "TENSORPIPE": {"DdpUnderDistAutogradTest.test_backward_ddp_inside": _RACES},
    "ZMQ": {"DdpUnderDistAutogradTest.test_backward_ddp_inside": _RACES},
}
"""Backend -> ``Suite.test`` -> reason."""
