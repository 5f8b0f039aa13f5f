"""CUDA_DEVICE_MAX_CONNECTIONS by layout, never against what the user exported."""
from types import SimpleNamespace

import pytest

from hrm_megatron.parallel.connections import CONNECTIONS, choose_connections

TP, CP = "--tensor-model-parallel-size", "--context-parallel-size"


@pytest.mark.parametrize("arguments, exported, chosen", [
    ([], None, None),
    (["--bf16", TP, "1", CP, "1"], None, None),
    ([TP, "2"], None, "1"),
    ([f"{TP}=2", "--seq-length", "8"], None, "1"),
    ([CP, "2"], None, "1"),
    ([TP, "1", CP, "4"], None, "1"),
    ([TP, "2"], "8", "8"),
    (["--use-torch-fsdp2"], None, None),
    (["--use-megatron-fsdp", TP, "2"], None, None),
    (["--use-torch-fsdp2"], "32", "32"),
    (["--use-torch-fsdp2"], "1", "1"),
    ([TP], None, None),
])
def test_the_layout_decides_where_the_user_did_not(arguments, exported, chosen):
    environment = {} if exported is None else {CONNECTIONS: exported}
    choose_connections(arguments, environment)
    assert environment.get(CONNECTIONS) == chosen


def test_an_exported_one_is_refused_under_fsdp(monkeypatch):
    from hrm_megatron.parallel.cpu import activate

    activate()
    from hrm_megatron.config import Architecture, ConfigError
    from hrm_megatron.training.fsdp import choose_fsdp

    monkeypatch.setenv(CONNECTIONS, "1")
    args = SimpleNamespace(use_torch_fsdp2=True, use_megatron_fsdp=False, pipeline_model_parallel_size=1, fp16=False,
                           tensor_model_parallel_size=1, world_size=1, fp8_param_gather=False,
                           check_weight_hash_across_dp_replicas_interval=None, save_wgrads_interval=None,
                           save_params_interval=None, ckpt_fully_parallel_load_exchange_algo="broadcast",
                           ckpt_fully_parallel_load_process_group="dp")
    with pytest.raises(ConfigError, match="CUDA_DEVICE_MAX_CONNECTIONS=1 is exported: .* unset it"):
        choose_fsdp(args, Architecture(1, 8, 1, 8, 8))
    monkeypatch.delenv(CONNECTIONS)
    choose_fsdp(args, Architecture(1, 8, 1, 8, 8))
    assert not args.use_distributed_optimizer
