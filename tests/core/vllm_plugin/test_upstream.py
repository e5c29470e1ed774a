"""What is relied on inside vLLM 0.32 and is no interface of it. Each failure here says that upstream moved."""

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from qsharp_core.vllm_plugin import upstream


def source(thing: object) -> str:
    return inspect.getsource(thing)  # type: ignore[arg-type]


def test_v1_samples_in_one_method_that_returns_the_tokens() -> None:
    assert list(inspect.signature(GPUModelRunner._sample).parameters) == ["self", "logits", "spec_decode_metadata"]
    assert "sampler_output = self._sample(logits, spec_decode_metadata)" in source(GPUModelRunner.sample_tokens)
    from vllm.v1.outputs import SamplerOutput

    assert "sampled_token_ids" in SamplerOutput.__dataclass_fields__


def test_v1_keeps_what_the_logits_were_computed_from_until_it_samples() -> None:
    from vllm.v1.worker.gpu_model_runner import ExecuteModelState

    assert {"logits", "sample_hidden_states"} <= set(ExecuteModelState._fields)
    run = source(GPUModelRunner.execute_model)
    computed = "sample_hidden_states = hidden_states[logits_indices]\n"
    assert computed + 16 * " " + "logits = self.model.compute_logits(sample_hidden_states)" in run
    assert "self.execute_model_state = ExecuteModelState(\n            scheduler_output,\n            logits," in run
    sampling = source(GPUModelRunner.sample_tokens)
    assert 0 < sampling.index(") = self.execute_model_state") < sampling.index("self._sample(")
    assert "self.execute_model_state = ExecuteModelState(" not in sampling
    # Who else computes logits does not sample by `_sample`.
    for other in (GPUModelRunner._dummy_sampler_run, GPUModelRunner._get_prompt_logprobs_dict):
        assert "self.model.compute_logits(" in source(other)
        assert "self._sample(" not in source(other)


def test_v1_patches_placeholders_before_it_samples() -> None:
    # vLLM issue 52461; only where custom processors are loaded by name, not by entry point
    assert "update_async_output_token_ids()" in source(GPUModelRunner._sample)
    assert "logitsprocs_need_output_token_ids=bool(custom_logitsprocs)" in source(GPUModelRunner.__init__)


def test_v1_tells_processors_of_every_step_before_it_runs_the_model() -> None:
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.worker.gpu_input_batch import InputBatch

    run = source(GPUModelRunner.execute_model)
    assert 0 < run.index("self._update_states(") < run.index("self._model_forward(")
    assert "self.input_batch.refresh_metadata()" in source(GPUModelRunner._update_states)
    told = source(InputBatch.refresh_metadata)
    assert "for logit_proc in self.logitsprocs.all:\n            logit_proc.update_state(batch_update)" in told
    # All tokens are known then: on CPUs no step begins before the last one has ended.
    assert "scheduler_config.async_scheduling = False" in source(CpuPlatform.check_and_update_config)


def test_v1_marks_rows_whose_sample_is_discarded() -> None:
    assert "self.discard_request_mask.np[:num_reqs] = (" in source(GPUModelRunner._prepare_inputs)


def test_v1_still_rewinds_cpu_generators_which_they_cannot() -> None:
    assert "gen.set_offset(gen.get_offset() - 4)" in source(GPUModelRunner._bookkeeping_sync)
    with pytest.raises(RuntimeError, match="offset"):
        torch.Generator().get_offset()


def test_v2_samples_in_one_method_that_returns_the_tokens() -> None:
    # Read, not imported: importing wants Triton.
    worker = Path(inspect.getfile(GPUModelRunner)).parent
    text = (worker / "gpu" / "model_runner.py").read_text()
    assert "def sample(\n        self,\n        hidden_states: torch.Tensor,\n        input_batch: InputBatch," in text
    assert "sampler_output, num_sampled, num_rejected = self.sample(" in text
    assert (
        "sample_hidden_states = hidden_states[input_batch.logits_indices]\n"
        "            logits = self.model.compute_logits(sample_hidden_states)"
    ) in text
    assert "self.index_to_req_id.pop(req_idx, None)" in (worker / "gpu" / "states.py").read_text()


def test_every_tensor_parallel_rank_has_all_logits_and_samples() -> None:
    from vllm.distributed import parallel_state
    from vllm.platforms import current_platform
    from vllm.v1.executor.multiproc_executor import MultiprocExecutor

    assert current_platform.use_all_gather()
    platforms = Path(inspect.getfile(type(current_platform))).parent
    assert "def use_all_gather(cls) -> bool:" in (platforms / "interface.py").read_text()
    assert "use_all_gather" not in (platforms / "cuda.py").read_text()  # the interface's: True
    from vllm.config import ParallelConfig

    assert ParallelConfig().enable_batch_sharded_sampling is None  # where it is on, a rank has some rows alone
    assert "group=self.device_group" in source(parallel_state.GroupCoordinator.broadcast)
    assert "self.rpc_broadcast_mq.enqueue" in source(MultiprocExecutor.collective_rpc)


class Sampling:
    """A runner whose `sample_tokens` takes over the state of `execute_model`, as V1's does."""

    def __init__(self) -> None:
        self.execute_model_state: Any = None
        self.sampled_from: list[Any] = []

    def sample_tokens(self, fails: bool = False) -> None:
        self.execute_model_state = None
        self.sampled_from.append(upstream.hidden_v1(self))
        if fails:
            raise RuntimeError


def test_v1_hidden_states_are_there_while_it_samples_and_not_longer() -> None:
    upstream._keep_hidden_v1(Sampling)
    upstream._keep_hidden_v1(Sampling)  # harmless
    runner, state = Sampling(), type("State", (), {"sample_hidden_states": torch.ones(2, 3)})()
    runner.execute_model_state = state
    runner.sample_tokens()
    runner.sample_tokens()  # nothing was run before
    runner.execute_model_state = state
    with pytest.raises(RuntimeError):
        runner.sample_tokens(fails=True)
    assert [found is state.sample_hidden_states for found in runner.sampled_from] == [True, False, True]
    assert upstream.hidden_v1(runner) is None


class Mask:
    def __init__(self, rows: list[bool]) -> None:
        self.np = np.array(rows)


class Batch:
    def __init__(self) -> None:
        self.req_ids = ["a", "b", "c"]
        self.generators = {0: torch.Generator(), 2: torch.Generator()}

    @property
    def num_reqs(self) -> int:
        return len(self.req_ids)

    @property
    def req_id_to_index(self) -> dict[str, int]:
        return {r: i for i, r in enumerate(self.req_ids)}


class Runner:
    def __init__(self) -> None:
        self.input_batch = Batch()
        self.discard_request_mask = Mask([True, False, False])


def test_spared_generators_come_back_to_their_request() -> None:
    runner = Runner()
    spared: dict[str, Any] = {}
    mine, other = runner.input_batch.generators[0], runner.input_batch.generators[2]
    upstream.spare_cpu_generators_v1(runner, spared)
    assert runner.input_batch.generators == {2: other}
    runner.input_batch.req_ids = ["c", "a"]  # the batch moved
    runner.input_batch.generators = {0: other}
    runner.discard_request_mask = Mask([False, False])
    upstream.spare_cpu_generators_v1(runner, spared)
    assert runner.input_batch.generators == {0: other, 1: mine}
    assert spared == {}
