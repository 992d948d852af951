"""Tests that are not run on a backend, and tests whose failure is known; each with its reason.

A test that is not applicable is counted as skipped. A known failure is run and counted as failed, but does not make the run
fail; once it passes, the run says so, and its line here has to go.
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

KNOWN_FAILURES: dict[str, dict[str, str]] = {
    "TENSORPIPE": {
        "DdpUnderDistAutogradTest.test_backward_ddp_inside": "fails on torch's own agent",
    },
}
"""Backend -> ``Suite.test`` -> reason."""
