"""Every place of Megatron and torch that we replace is still there, and what we put there does what it says."""
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.rounding import of_sums

ROOT = Path(__file__).parents[2]
BUILD_ARGUMENTS = ("(config, model_chunks, config_overrides=None, use_gloo_process_groups=True, pg_collection=None, "
                   "dump_param_to_param_group_map=None)")
# (module, attribute, what is there in the stock wheels: a signature, or the value of a constant)
STOCK = [
    # hrm_megatron/parallel/cpu.py
    ("megatron.core.datasets.utils", "compile_helpers", "()"),
    ("megatron.core.optimizer.distrib_optimizer", "DistributedOptimizer.load_parameter_state_from_dp_reshardable",
     "(self, state_dict)"),
    ("megatron.core.tensor_parallel.random", "_get_cuda_rng_state", "(device='cuda', clone=False, graph_safe=False)"),
    ("megatron.core.tensor_parallel.random", "_set_cuda_rng_state", "(new_state, device=-1, graph_safe=False)"),
    ("megatron.core.tensor_parallel.random", "CudaRNGStatesTracker.fork", "(self, name='model-parallel-rng')"),
    ("megatron.core.tensor_parallel.random", "_MODEL_PARALLEL_RNG_TRACKER_NAME", "'model-parallel-rng'"),
    ("megatron.training.training", "initialize_megatron",
     "(allow_no_cuda=False, skip_mpu_initialization=False, get_embedding_ranks=None, "
     "get_position_embedding_ranks=None, store=None, skip_model_parallel_init=False, seed_pp_group=None, "
     "seed_dp_group=None, seed_tp_group=None, seed_ep_group=None, seed_etp_group=None, skip_random_seed=False)"),
    ("megatron.training.training", "set_jit_fusion_options", "(tp_size=None)"),
    ("megatron.training.training", "build_train_valid_test_data_iterators",
     "(build_train_valid_test_datasets_provider)"),
    ("megatron.core.dist_checkpointing.strategies.filesystem_async", "get_write_results_queue", "(mp_mode='spawn')"),
    ("megatron.core.dist_checkpointing.strategies.async_utils", "AsyncCallsQueue.warmup_persistent_caller",
     "(cls, rank, mp_mode='spawn', cpu_priority=10, io_priority=None)"),
    ("megatron.core.dist_checkpointing.strategies.async_utils", "AsyncCallsQueue._get_async_caller", "(self)"),
    ("megatron.core.dist_checkpointing.strategies.async_utils", "TemporalAsyncCaller", "()"),
    ("megatron.core.distributed.fsdp.src.megatron_fsdp.param_and_grad_buffer", "_coalescing_manager",
     "(group=None, device=None, async_ops=False)"),
    ("torch.distributed", "init_process_group",
     "(backend=None, init_method=None, timeout=None, world_size=-1, rank=-1, store=None, group_name='', "
     "pg_options=None, device_id=None, _ranks=None)"),
    ("torch.distributed", "new_group",
     "(ranks=None, timeout=None, backend=None, pg_options=None, use_local_synchronization=False, group_desc=None, "
     "device_id=None)"),
    ("torch.distributed", "DeviceMesh.from_group", "(group, device_type, mesh=None, *, mesh_dim_names=None)"),
    ("torch.utils._device", "_device_constructors", "()"),
    ("megatron.core.tensor_parallel.layers", "_grad_accum_fusion_available", "bool"),  # of Apex, or its stand-in
    # hrm_megatron/optim/builder.py
    ("megatron.core.optimizer", "Adam", ...),  # of torch, Apex or Transformer Engine
    ("megatron.core.optimizer", "USING_PYTORCH_OPTIMIZER", "bool"),
    ("megatron.core.optimizer", "DistributedOptimizer",
     "(optimizer, config, grad_scaler, init_state_fn, model_chunks, per_model_buffers, data_parallel_group, "
     "data_parallel_group_gloo, data_parallel_group_idx, distributed_optimizer_instance_id)"),
    ("megatron.core.optimizer", "get_megatron_optimizer", BUILD_ARGUMENTS),
    ("megatron.core.optimizer.distrib_optimizer", "HAVE_APEX_OR_TE", "bool"),
    ("megatron.core.optimizer.distrib_optimizer", "DistributedOptimizer.optimizer_state_keys", "property"),
    ("megatron.core.optimizer.distrib_optimizer", "DistributedOptimizer.load_state_dict", "(self, state_dict)"),
    ("megatron.core.optimizer.distrib_optimizer", "DistributedOptimizer._copy_main_params_to_model_params", "(self)"),
    ("megatron.core.optimizer.distrib_optimizer", "DistributedOptimizer.sharded_param_state_fully_reshardable",
     "(self, model_sharded_state_dict, is_loading=False, metadata=None)"),
    ("megatron.core.optimizer.distrib_optimizer", "DistributedOptimizer.load_parameter_state_from_fully_reshardable",
     "(self, state_dict)"),
    ("megatron.core.optimizer.distrib_optimizer", "DistributedOptimizer._get_main_param_and_optimizer_states",
     "(self, model_param)"),
    ("megatron.core.optimizer.distrib_optimizer", "DistributedOptimizer._set_main_param_and_optimizer_states",
     "(self, model_param, tensors)"),
    ("megatron.core.optimizer.distrib_optimizer", "DistributedOptimizer._get_model_param_range_map", "(self, param)"),
    ("megatron.core.optimizer.optimizer", "param_group_identifier_keys",
     "('end_wd', 'max_lr', 'min_lr', 'optimizer', 'start_wd', 'wd_mult', 'lr_mult', 'is_expert_parallel', "
     "'is_decoupled_lr')"),
    ("megatron.core.optimizer_param_scheduler", "OptimizerParamScheduler",
     "(optimizer, init_lr, max_lr, min_lr, lr_warmup_steps, lr_decay_steps, lr_decay_style, start_wd, end_wd, "
     "wd_incr_steps, wd_incr_style, use_checkpoint_opt_param_scheduler=True, override_opt_param_scheduler=False, "
     "wsd_decay_steps=None, lr_wsd_decay_style=None)"),
    ("megatron.core.optimizer_param_scheduler", "OptimizerParamScheduler.get_lr", "(self, param_group)"),
    ("megatron.core.optimizer_param_scheduler", "OptimizerParamScheduler.load_state_dict", "(self, state_dict)"),
    ("megatron.core.optimizer.clip_grads", "l2_norm_impl", "(chunk_size, noop_flag, tensor_lists, per_tensor, *args)"),
    # hrm_megatron/training
    ("megatron.training.training", "train_step",
     "(forward_step_func, data_iterator, model, optimizer, opt_param_scheduler, config, forward_backward_func, "
     "iteration=None, pg_collection=None, p2p_communicator=None)"),
    ("megatron.core.optimizer.optimizer", "MixedPrecisionOptimizer.step", "(self)"),
    ("megatron.training.dist_signal_handler", "DistributedSignalHandler.signals_received", "(self)"),
    ("megatron.core.dist_checkpointing.strategies.async_utils", "PersistentAsyncCaller.async_loop", ...),
    ("megatron.training.training", "finalize_model_grads", ...),
    ("megatron.core.distributed.param_and_grad_buffer", "_ParamAndGradBucketGroup.check_grads",
     "(self, check_for_nan_or_inf, check_for_large)"),
    ("megatron.core.distributed", "DistributedDataParallel.enable_forward_pre_hook", "(self)"),
    ("megatron.core.distributed", "DistributedDataParallel._make_forward_pre_hook", "(self)"),
    ("megatron.core.rerun_state_machine", "RerunStateMachine.validate_result",
     "(self, result, rejection_func, message, comparison_func=None, tolerance=0.0, fatal=True)"),
    ("megatron.training.training", "get_megatron_optimizer", BUILD_ARGUMENTS),
    ("megatron.training.training", "get_optimizer_param_scheduler", "(optimizer)"),
    ("megatron.training.training", "get_forward_backward_func",
     "(pp_size=None, vp_size=None, schedule_pg_collection=None)"),
    ("megatron.training.training", "evaluate",
     "(forward_step_func, data_iterator, model, process_non_loss_data_func, config, verbose=False, "
     "non_loss_data_func=None, eval_iters=None, pg_collection=None, p2p_communicator=None)"),
    ("megatron.training.training", "evaluate_and_print_results",
     "(prefix, forward_step_func, data_iterator, model, iteration, process_non_loss_data_func, config, verbose=False, "
     "write_to_tensorboard=True, non_loss_data_func=None, pg_collection=None, p2p_communicator=None)"),
    ("megatron.training.training", "save_checkpoint",
     "(iteration, model, optimizer, opt_param_scheduler, num_floating_point_operations_so_far, "
     "checkpointing_context=None, pipeline_rank=None, expert_rank=None, tensor_rank=None, pipeline_parallel=None, "
     "expert_parallel=None, non_persistent_ckpt=False, train_data_iterator=None, "
     "preprocess_common_state_dict_fn=None, release=False, tp_group=None, pp_group=None, dp_cp_group=None, "
     "dp_group=None, expt_dp_group=None, rng_state_key_prefix='')"),
    ("megatron.training.checkpointing", "schedule_async_save", "(async_request)"),
    ("megatron.training.checkpointing", "get_checkpoint_tracker_filename", "(checkpoints_path)"),
    ("megatron.training.training", "maybe_finalize_async_save", "(blocking=False, terminate=False)"),
    ("megatron.training.training", "checkpoint_and_decide_exit",
     "(model, optimizer, opt_param_scheduler, iteration, num_floating_point_operations_so_far, checkpointing_context, "
     "train_data_iterator)"),
    ("megatron.training.training", "save_checkpoint_and_time",
     "(iteration, model, optimizer, opt_param_scheduler, num_floating_point_operations_so_far, "
     "checkpointing_context, non_persistent_ckpt=False, train_data_iterator=None)"),
    # hrm_megatron/optim/sharded.py, hrm_megatron/training/fsdp.py
    ("megatron.core.optimizer", "FP32Optimizer", "(optimizer, config, init_state_fn)"),
    ("megatron.core.optimizer", "Float16OptimizerWithFloat16Params", "(optimizer, config, grad_scaler, init_state_fn)"),
    ("megatron.core.optimizer.optimizer", "FP32Optimizer.sharded_state_dict",
     "(self, model_sharded_state_dict, is_loading=False, metadata=None)"),
    ("megatron.core.optimizer.optimizer", "FP32Optimizer.load_state_dict", "(self, state_dict)"),
    ("megatron.core.optimizer.distrib_optimizer", "DistributedOptimizer._init_optimizer_states_with_dummy_values",
     "(self)"),
    ("megatron.core.optimizer.optimizer", "count_zeros_fp32",
     "(parameters, grad_stats_parallel_group, use_decoupled_grad=False, tp_group=None, expert_tp_group=None)"),
    ("megatron.core.distributed.data_parallel_base", "_BaseDataParallel.scale_gradients", "(self, scaling_factor)"),
    ("megatron.core.distributed.fsdp.mcore_fsdp_adapter", "_get_dp_tp_mesh", "(dp_cp_group, tp_group, ep_size=1)"),
    ("megatron.training.checkpointing", "_build_sharded_state_dict_metadata", "(args, dp_cp_group=None)"),
    ("megatron.training.training", "load_checkpoint", ...),
    ("megatron.training.training", "torch_FSDP", ...),
    ("torch.distributed.fsdp._fully_shard._fsdp_param_group", "FSDPParamGroup.post_backward", "(self, *unused)"),
    ("torch.distributed.fsdp._fully_shard._fsdp_state", "FSDPState._pre_forward", "(self, module, args, kwargs)"),
    # hrm_megatron/training/params_norm.py
    ("megatron.training.training", "calc_params_l2_norm", "(model, force_create_fp32_copy=False)"),
    ("megatron.training.training", "force_param_sync", "(model_chunks, optimizer=None)"),
    # hrm_megatron/training/reporting.py and console.py
    ("megatron.training.training", "training_log",
     "(loss_dict, total_loss_dict, learning_rate, iteration, loss_scale, report_memory_flag, skipped_iter, grad_norm, "
     "params_norm, num_zeros_in_grad, max_attention_logit, pg_collection=None, is_first_iteration=False, "
     "seqlen_squared_sum_in_batch=None, total_real_tokens_in_batch=None)"),
    ("megatron.training.training", "evaluate",
     "(forward_step_func, data_iterator, model, process_non_loss_data_func, config, verbose=False, "
     "non_loss_data_func=None, eval_iters=None, pg_collection=None, p2p_communicator=None)"),
    ("megatron.training.training", "evaluate_and_print_results",
     "(prefix, forward_step_func, data_iterator, model, iteration, process_non_loss_data_func, config, verbose=False, "
     "write_to_tensorboard=True, non_loss_data_func=None, pg_collection=None, p2p_communicator=None)"),
    ("megatron.training.training", "num_floating_point_operations",
     "(args, batch_size, seqlen_squared_sum_in_batch=None, total_real_tokens_in_batch=None)"),
    ("megatron.training.training", "report_theoretical_memory", "(args, num_microbatches=None, verbose=False)"),
    ("megatron.training.log_handler", "CustomHandler", "()"),  # which writes to stdout
    # hrm_megatron/training/scalars.py
    ("tensorboard.summary.writer.event_file_writer", "EventFileWriter.add_event", "(self, event)"),
    ("tensorboard.summary.writer.event_file_writer", "EventFileWriter.flush", "(self)"),
    ("tensorboard.summary.writer.event_file_writer", "EventFileWriter.close", "(self)"),
    # hrm_megatron/attention/cpu_flash.py calls these by name
    ("torch", "ops.aten._scaled_dot_product_flash_attention_for_cpu",
     "aten::_scaled_dot_product_flash_attention_for_cpu(Tensor query, Tensor key, Tensor value, float dropout_p=0., "
     "bool is_causal=False, *, Tensor? attn_mask=None, float? scale=None) -> (Tensor output, Tensor logsumexp)"),
    ("torch", "ops.aten._scaled_dot_product_flash_attention_for_cpu_backward",
     "aten::_scaled_dot_product_flash_attention_for_cpu_backward(Tensor grad_out, Tensor query, Tensor key, "
     "Tensor value, Tensor out, Tensor logsumexp, float dropout_p, bool is_causal, *, Tensor? attn_mask=None, "
     "float? scale=None) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)"),
]
NO_SUCH_PLACES = [("megatron.core.optimizer", "Adamant"), ("megatron.core.optimiser", "Adam"),
                  ("megatron.core.optimizer.distrib_optimizer", "DistributedOptimizer.load_nothing")]


@pytest.fixture(scope="module")
def stock():
    """The answers of tests/parallel/probe.py, with `places` by (module, attribute)."""
    places = [(module, attribute) for module, attribute, _ in STOCK] + NO_SUCH_PLACES
    done = subprocess.run([sys.executable, "-m", "tests.parallel.probe"], cwd=ROOT, input=json.dumps(places),
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answers = SimpleNamespace(**json.loads(done.stdout.splitlines()[-1]))
    answers.places = dict(zip(places, answers.found, strict=True))
    return answers


@pytest.mark.parametrize(("module", "attribute", "expected"), STOCK, ids=[f"{m}:{a}" for m, a, _ in STOCK])
def test_the_stock_wheel_still_has(stock, module, attribute, expected):
    found = stock.places[module, attribute]
    assert found.startswith("(") if expected is ... else found == expected


def test_a_missing_place_would_be_noticed(stock):
    assert [stock.places[place] for place in NO_SUCH_PLACES] == ["gone"] * 3


def test_the_table_has_every_place_that_is_replaced():
    listed = {attribute.split(".")[-1] for _, attribute, _ in STOCK}
    found = {}
    owners = ("module|cls|megatron_training|checkpointing|mcore_fsdp_adapter|optimizer|clip_grads|distrib_optimizer|"
              "filesystem_async|async_utils|_ParamAndGradBucketGroup|DistributedDataParallel|DistributedSignalHandler")
    for part in ("parallel/cpu.py", "evaluate/live_tasks.py", "optim/*.py", "training/*.py"):
        for path in (ROOT / "hrm_megatron").glob(part):
            found[path] = set(re.findall(rf"^ +(?:{owners})[\w.]*\.(\w+) = ", path.read_text(), re.M))
    builder = (ROOT / "hrm_megatron" / "optim" / "builder.py").read_text()
    replaced = re.search(r"replaced = dict\((.*?)\)\n", builder, re.DOTALL)
    found["builder"] = set(re.findall(r"(\w+)=", replaced[1]))
    names = set().union(*found.values()) - {"to", "cuda"}  # of torch.Tensor: see the test below
    names -= {"_results_queue"}  # set where stock code would set it
    assert len(names) >= 40
    assert names <= listed


def test_nothing_is_replaced_that_torch_does_not_have(stock):
    assert stock.invented == []
    assert {"torch.empty", "torch.Tensor.to", "torch.nn.Module.cuda", "torch.cuda.current_device", "torch.cuda.Stream",
            "torch.distributed.new_group", "torch.distributed.DeviceMesh.from_group"} <= set(stock.replaced)
    assert len(stock.replaced) > 60
    assert "torch.cuda.is_available" not in stock.replaced


def test_the_repaired_fault_is_still_in_the_wheel(stock):
    assert stock.fault, "Megatron's loader takes no gradients any more: _repair_no_grad can go"


def test_the_repair_holds(single_rank):
    from tests.parallel.probe import loader_records_gradients

    assert not loader_records_gradients()


def test_activation_after_megatron_is_refused(stock):
    assert stock.late == "hrm_megatron.parallel.cpu.activate() must run before megatron is imported"


def test_compiling_helpers_needs_no_makefile(single_rank):
    from megatron.core.datasets import utils

    assert utils.compile_helpers() is None
    assert not (Path(utils.__file__).parent / "Makefile").exists()  # stock code runs `make` there and exits


@pytest.fixture
def without_cuda(single_rank):
    """A process after activate(), where there is no CUDA device."""
    if torch.cuda.is_available():
        pytest.skip("with a CUDA device nothing of torch is replaced")


def test_torch_tells_the_truth_about_cuda(without_cuda):
    assert not torch.cuda.is_available()
    assert (torch.cuda.current_device(), torch.cuda.device_count()) == (0, 1)


CUDA = ["cuda", "cuda:0", torch.device("cuda"), torch.device("cuda", 0), 0]


@pytest.mark.parametrize("device", CUDA, ids=str)
def test_tensors_for_cuda_are_made_on_the_cpu(without_cuda, device):
    like = torch.ones(2, 3)
    made = [torch.empty(2, 3, device=device), torch.zeros(2, 3, device=device), torch.ones(2, 3, device=device),
            torch.full((2, 3), 5.0, device=device), torch.tensor([[1.0] * 3] * 2, device=device),
            torch.rand(2, 3, device=device), torch.randn(2, 3, device=device, dtype=torch.bfloat16),
            torch.randint(9, (2, 3), device=device), torch.empty_like(like, device=device),
            torch.zeros_like(like, device=device), torch.arange(6, device=device).view(2, 3),
            torch.zeros(2, 3, device=device, pin_memory=True), like.new_empty(2, 3, device=device),
            like.to(device), like.to(device=device), like.to(device, torch.float64), like.cuda(device), like.cuda()]
    for tensor in made:
        assert tensor.device.type == "cpu" and tensor.shape == (2, 3)
    assert made[3].sum() == 30 and made[6].dtype == torch.bfloat16 and made[-3].dtype == torch.float64
    assert like.to(torch.bfloat16).dtype == torch.bfloat16
    linear = torch.nn.Linear(3, 2).to(device).cuda()
    assert linear.weight.device.type == "cpu"
    assert like.pin_memory() is like


def test_other_devices_stay_what_they_are(without_cuda):
    assert torch.empty(2, device="meta").is_meta and torch.ones(2).to("meta").is_meta
    with torch.device("meta"):
        assert torch.empty(2, 3).is_meta and torch.zeros(2).is_meta and torch.nn.Linear(3, 2).weight.is_meta
        assert torch.randn(2).is_meta and torch.arange(3).is_meta
    assert not torch.empty(2).is_meta


def test_optimizers_see_the_type_names_they_know(without_cuda):
    names = [torch.ones(2, dtype=dtype).type() for dtype in (torch.float32, torch.bfloat16)]
    assert names == ["torch.cuda.FloatTensor", "torch.cuda.BFloat16Tensor"]
    assert torch.ones(2).type(torch.float64).dtype == torch.float64


def test_streams_and_events_have_already_happened(without_cuda):
    event = torch.cuda.Event(enable_timing=True)
    with torch.cuda.stream(torch.cuda.Stream(priority=-1)), torch.cuda.nvtx.range("x"):
        event.record()
    torch.cuda.current_stream().wait_event(event)
    torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
    assert event.query() and event.elapsed_time(torch.cuda.Event()) == 0.0
    assert torch.cuda.Stream().record_event(event) is event and torch.cuda.Stream().record_event().query()


def test_nccl_groups_are_gloo(without_cuda):
    group = torch.distributed.new_group([0], backend="nccl", pg_options=None)
    assert torch.distributed.get_backend(group) == "gloo"
    torch.distributed.destroy_process_group(group)


def test_the_cuda_generator_is_the_cpu_generator(without_cuda):
    before = torch.get_rng_state()
    try:
        torch.cuda.manual_seed(7)
        assert torch.initial_seed() == torch.cuda.initial_seed() == 7
        state = torch.cuda.get_rng_state()
        first = torch.rand(3)
        torch.cuda.set_rng_state(state)
        assert torch.equal(torch.rand(3), first)
        assert torch.equal(first, torch.rand(3, generator=torch.Generator().manual_seed(7)))
    finally:
        torch.set_rng_state(before)


def test_a_forked_generator_goes_on_and_leaves_the_other_alone(without_cuda):
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    tracker = CudaRNGStatesTracker()
    tracker.add("mine", 7)
    want = torch.rand(6, generator=torch.Generator().manual_seed(7))
    before = torch.get_rng_state()
    with tracker.fork("mine"):
        first = torch.rand(2)
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(ZeroDivisionError), tracker.fork("mine"):
        second = torch.rand(4)
        _ = 1 / 0
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(torch.cat((first, second)), want)
    with pytest.raises(KeyError, match="rng state yours is not added"), tracker.fork("yours"):
        pass


def test_weight_gradients_are_added_in_the_precision_of_their_buffer(without_cuda):
    from megatron.core.tensor_parallel import layers

    generator = torch.Generator().manual_seed(2)
    x, grad = (torch.randn(5, n, generator=generator).bfloat16() for n in (3, 4))
    buffer = torch.full((4, 3), 1e3)
    layers.fused_weight_gradient_mlp_cuda.wgrad_gemm_accum_fp32(x, grad, buffer)
    wanted = 1e3 + grad.double().t() @ x.double()
    # fp32 near 1000; bf16 has steps of 4 there.
    assert ((buffer - wanted).abs() <= of_sums(6, 1e3 + grad.abs().t().float() @ x.abs().float())).all()


def test_building_data_iterators_draws_no_random_numbers(without_cuda):
    from hrm_megatron.parallel import cpu

    drawn = []
    module = SimpleNamespace(
        initialize_megatron=lambda allow_no_cuda=False, seed=None: (allow_no_cuda, seed), set_jit_fusion_options=None,
        build_train_valid_test_data_iterators=lambda provider: drawn.append(torch.rand(3)) or provider)
    cpu._patch_training(module)
    before = torch.get_rng_state()
    assert module.build_train_valid_test_data_iterators("provider") == "provider" and len(drawn) == 1
    assert torch.equal(torch.get_rng_state(), before)
    assert module.initialize_megatron(seed=3) == (True, 3)
    assert module.set_jit_fusion_options(tp_size=2) is None


def test_a_module_is_patched_once_right_after_it_ran(tmp_path, monkeypatch):
    from hrm_megatron.parallel import cpu

    (tmp_path / "patched_example.py").write_text("value = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    calls = []
    finder = cpu._PatchingFinder({"patched_example": [lambda module: calls.append(module.value)]})
    monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path])
    import patched_example  # noqa: F401

    assert calls == [3]
    assert finder.find_spec("patched_example") is None and finder.find_spec("json") is None
    del sys.modules["patched_example"]


def test_activating_twice_changes_nothing(without_cuda):
    from hrm_megatron.parallel import cpu

    before = torch.empty, torch.Tensor.to, list(sys.meta_path)
    cpu.activate()
    assert before == (torch.empty, torch.Tensor.to, list(sys.meta_path))
