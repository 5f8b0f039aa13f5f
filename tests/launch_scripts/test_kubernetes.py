"""The JobSet for Kubernetes, as data."""
from pathlib import Path

import yaml

from hrm_megatron.planner.goodput import GPU_MTTF_HOURS

ROOT = Path(__file__).parents[2]


def job_set():
    """The spec of the JobSet, that of its pods, and their container."""
    spec = yaml.safe_load((ROOT / "launch_scripts" / "train_kubernetes.yaml").read_text())["spec"]
    pods = spec["replicatedJobs"][0]["template"]["spec"]
    [container] = pods["template"]["spec"]["containers"]
    return spec, pods, container


def test_a_long_run_outlives_its_failures_and_many_evictions():
    spec, pods, container = job_set()
    gpus = pods["parallelism"] * container["resources"]["limits"]["nvidia.com/gpu"]
    assert spec["failurePolicy"]["maxRestarts"] >= 20 * (failures := 90 * 24 * gpus / GPU_MTTF_HOURS) and failures > 4


def test_the_binding_to_numa_nodes_is_left_to_the_nodes():
    [script] = job_set()[2]["args"]
    assert "hrm_megatron.cluster.node " in script and "numa" not in script
