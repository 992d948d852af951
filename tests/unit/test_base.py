"""`zmqagent.agent.base`: what is a timeout, and what is none."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from zmqagent.agent.base import check_timeout
from zmqagent.exceptions import InvalidOptionError, InvalidTypeError


@pytest.mark.parametrize("timeout", [0, 1, 2.5, 1e300, -1, -1.0, np.float32(0.5), Fraction(1, 2), 10**20])
def test_seconds_and_torch_s_two_special_values_are_timeouts(timeout: Any) -> None:
    checked = check_timeout(timeout)
    assert type(checked) is float
    assert checked == float(timeout)


@pytest.mark.parametrize("timeout", [None, "1", b"1", [1], (), {}, 1j, object()], ids=repr)
def test_what_is_no_number_is_a_type_error_that_says_what_it_is(timeout: Any) -> None:
    with pytest.raises(InvalidTypeError, match=f"a timeout is a number of seconds, not a {type(timeout).__name__}; 0 stands for"):
        check_timeout(timeout)


@pytest.mark.parametrize("timeout", [-2, -0.5, math.inf, -math.inf, math.nan, 10**400, -(10**400)], ids=lambda t: str(t)[:9])
def test_a_number_that_is_no_time_is_refused(timeout: Any) -> None:
    with pytest.raises(
        InvalidOptionError, match=r"a finite number of seconds, 0 for no limit, or -1 for the agent's default, and not"
    ):
        check_timeout(timeout)


def test_the_default_itself_cannot_be_the_default() -> None:
    with pytest.raises(InvalidOptionError, match="a finite number of seconds, or 0 for no limit, and not -1"):
        check_timeout(-1, may_be_unset=False)
