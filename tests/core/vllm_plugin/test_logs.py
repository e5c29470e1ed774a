"""Lines that are left out of vLLM's log: those and no others, as vLLM 0.32 writes them."""

import inspect
import logging

import pytest
from vllm.model_executor.models import utils

from qsharp_core.vllm_plugin import logs


def test_casts_are_left_out_and_all_else_is_kept(caplog: pytest.LogCaptureFixture) -> None:
    assert utils.logger.name == logs.LOADER
    assert f'"{logs.CAST}"' in inspect.getsource(utils)
    logger = logging.getLogger(logs.LOADER)
    before = list(logger.filters)
    logger.addHandler(caplog.handler)  # vLLM's loggers may hand nothing on
    try:
        logs.without_casts()
        logs.without_casts()
        assert len(logger.filters) == len(before) + 1 or before
        logger.warning(logs.CAST + "a parameter with dtype %s", "a.weight", "float32", "bfloat16")
        logger.warning("Attempted to load weight (%s) into parameter (%s)", 1, 2)
    finally:
        logger.filters[:] = before
        logger.removeHandler(caplog.handler)
    assert {record.getMessage() for record in caplog.records} == {"Attempted to load weight (1) into parameter (2)"}
