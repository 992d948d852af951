"""Tests that are not run on a backend, each with its reason; they are counted as skipped."""

from __future__ import annotations

__all__ = ["NOT_APPLICABLE"]

_NAMES_TENSORPIPE = "names TENSORPIPE (or FAULTY_TENSORPIPE) itself, so that it proves nothing of another backend"


# TorchScript runs in C++. RPC in there, and the RRefs it knows, are those of torch's own agent, which is written in C++ too.
_CALLS_IN_SCRIPT = "calls RPC inside a TorchScript function, which runs in C++ and cannot reach an agent written in Python"
_RREF_IN_SCRIPT = "gives an RRef to a TorchScript function, which runs in C++ and takes only the RRefs of torch's own agent"
_RREF_IN_MODULE = "compiles a module that holds an RRef to TorchScript, where only torch's own RRefs can be attributes"

_SCRIPT_TESTS: dict[str, dict[str, tuple[str, ...]]] = {
    _CALLS_IN_SCRIPT: {
        "JitDistAutogradTest": (
            "test_jit_fork_within_context",
            "test_restore_context_after_swtich_to_jit_thread",
        ),
        "JitFaultyAgentRpcTest": (
            "test_timeout_in_python",
            "test_timeout_in_torchscript_function",
        ),
        "JitRpcTest": (
            "test_all_kwargs_are_populated_by_defaults",
            "test_args_and_kwargs_contain_different_types",
            "test_args_kwargs_are_neither_passed",
            "test_async_function_remote",
            "test_async_function_remote_multi",
            "test_async_function_simple",
            "test_call_python_function_remotely_from_script_not_supported",
            "test_call_rpc_with_profiling",
            "test_call_script_function_that_not_exists_remotely_from_script",
            "test_call_script_function_that_raises_remotely_from_script",
            "test_future_passed_between_python_and_jit",
            "test_kwargs_not_passed",
            "test_no_kwargs_are_populated_by_defaults",
            "test_record_function_on_caller_rpc_async",
            "test_rpc_async_jit_profiled",
            "test_rpc_torchscript_record_function",
            "test_some_kwargs_are_populated_by_defaults",
        ),
    },
    _RREF_IN_SCRIPT: {
        "DistAutogradTest": ("test_trainer_ps_torchscript_functions",),
        "JitFaultyAgentRpcTest": (
            "test_remote_timeout_to_here_in_jit",
            "test_rref_timeout_pickle_in_jit",
            "test_rref_to_here_timeout_in_jit",
        ),
        "JitRpcTest": (
            "test_local_rref_local_value",
            "test_remote_script_module",
            "test_return_local_script_class_rref_in_py_and_use_in_script",
            "test_return_local_script_module_rref_in_py_and_use_in_script",
            "test_rref_as_arg_and_return",
            "test_rref_is_owner",
            "test_rref_jit_pickle_not_supported",
            "test_rref_list_mutate",
            "test_rref_local_value",
            "test_rref_python_annotation",
            "test_user_rrefs_confirmed",
            "test_user_rrefs_confirmed_remote",
        ),
    },
    _RREF_IN_MODULE: {
        "JitRpcTest": (
            "test_load_script_module_with_pickled_rref",
            "test_my_script_module_with_rrefs",
        ),
    },
}
"""Reason -> suite -> tests."""


_NAMES_OPTIONS = "expects an error whose text names TENSORPIPE and its options"

_TEXT_TESTS: dict[str, tuple[str, ...]] = {
    "TensorPipeAgentCudaRpcTest": (
        "test_device_maps_missing_config",
        "test_device_maps_missing_config_loop",
        "test_device_maps_missing_config_not_timeout",
        "test_device_maps_missing_config_remote",
    ),
}


def _each(tests: dict[str, tuple[str, ...]], reason: str) -> dict[str, str]:
    return {f"{suite}.{test}": reason for suite, names in tests.items() for test in names}


NOT_APPLICABLE: dict[str, dict[str, str]] = {
    "ZMQ": {
        "FaultyAgentDistAutogradTest.test_verify_backend_options": _NAMES_TENSORPIPE,
        "FaultyAgentRpcTest.test_verify_backend_options": _NAMES_TENSORPIPE,
        "TensorPipeAgentRpcTest.test_infer_backend_from_options": _NAMES_TENSORPIPE,
        "TensorPipeAgentRpcTest.test_mismatched_type_for_options": _NAMES_TENSORPIPE,
        **_each(_TEXT_TESTS, _NAMES_OPTIONS),
        **{test: reason for reason, tests in _SCRIPT_TESTS.items() for test in _each(tests, reason)},
    },
}
"""Backend -> ``Suite.test`` -> reason."""
