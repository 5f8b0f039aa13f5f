"""Which nodes are blamed for what, by reports that are made up: four nodes that are alike, and one fault."""
from __future__ import annotations

import dataclasses
import itertools

import pytest

from hrm_megatron.cluster.__main__ import judge as ask_judge
from hrm_megatron.cluster.__main__ import parser
from hrm_megatron.cluster.attempts import Attempt, History
from hrm_megatron.cluster.node_check import NOT_DONE, Limits, Report, find_bad_nodes, read_reports, trouble_of_all
from hrm_megatron.cluster.preflight import rounds_of_pairs

NODES = ("n1", "n2", "n3", "n4")
PARTNERS = {"n1": ("n2", "n4"), "n2": ("n1", "n3"), "n3": ("n4", "n2"), "n4": ("n3", "n1")}


def report(node, **changes):
    good = Report(node, 8, 8, [], matmul_tflops=700.0, storage_write_gbs=2.0, storage_read_gbs=5.0,
                  clock_ahead_seconds=0.001, node_all_reduce_gbs=400.0,
                  pair_all_reduce_gbs=dict.fromkeys(PARTNERS[node], 48.0))
    return dataclasses.replace(good, **changes)


def judge(changes, limits=Limits(), nodes=NODES):  # noqa: B008  # frozen
    return find_bad_nodes([report(node, **changes.get(node, {})) for node in nodes if changes.get(node) != "silent"],
                          nodes, limits)


def test_nodes_that_are_alike_are_good():
    assert not judge({})


@pytest.mark.parametrize("fault, reason", [
    ("silent", "no report of the check"),
    (dict(gpus=7), "7 of 8 GPUs"),
    (dict(faults=["GPU 3: uncorrected ECC errors (2)"]), "GPU 3: uncorrected ECC errors (2)"),
    (dict(matmul_tflops=560.0), "matmul 560 TFLOP/s, expected 595 (median 700)"),
    (dict(matmul_tflops=None, error="CUDA error: uncorrectable ECC error"), "CUDA error: uncorrectable ECC error"),
    (dict(node_all_reduce_gbs=200.0), "all-reduce within the node 200 GB/s, expected 280"),
    (dict(storage_error="storage run: Stale file handle"), "storage run: Stale file handle"),
    (dict(storage_read_gbs=0.3), "storage read 0.3 GB/s, expected 1"),
    (dict(clock_ahead_seconds=-90.0), "clock -90.0 s from the other nodes"),
])
def test_one_fault_names_one_node(fault, reason):
    bad = judge({"n3": fault})
    assert list(bad) == ["n3"] and reason in bad["n3"]


def test_a_slow_link_is_blamed_on_the_node_that_has_two():
    rates = {"n2": {"n1": 48.0, "n3": 5.0}, "n3": {"n4": 5.0, "n2": 5.0}, "n4": {"n3": 5.0, "n1": 48.0}}
    bad = judge({node: dict(pair_all_reduce_gbs=pairs) for node, pairs in rates.items()})
    assert list(bad) == ["n3"] and "all-reduce with n4 5 GB/s and n2 5 GB/s, expected 33.6" in bad["n3"]


def test_the_first_node_is_blamed_for_a_clock_from_which_all_others_differ():
    others = dict(clock_ahead_seconds=30.0)
    assert list(judge({node: others for node in NODES[1:]} | {"n1": dict(clock_ahead_seconds=0.0)})) == ["n1"]


def test_who_waited_for_a_dead_node_is_not_blamed():
    waited = dict(error="all-reduce: timed out", clock_ahead_seconds=None, pair_all_reduce_gbs={})
    assert list(judge({"n1": waited, "n2": waited, "n4": waited, "n3": "silent"})) == ["n3"]


def test_nobody_is_blamed_where_all_waited_for_each_other():
    waited = dict(error=f"{NOT_DONE} 60 s", pair_all_reduce_gbs={})
    assert not judge(dict.fromkeys(NODES, waited))
    assert not judge({"n1": waited}, nodes=NODES[:1])
    assert list(judge(dict.fromkeys(NODES, waited) | {"n3": dict(waited, gpus=7)})) == ["n3"]
    assert list(judge(dict.fromkeys(NODES, waited) | {"n3": dict(error="NCCL: no such device")})) == ["n3"]
    assert list(judge({"n1": waited, "n3": waited})) == ["n1", "n3"]  # the others have been done


@pytest.mark.parametrize("lost", [
    "RuntimeError: [pair.cc:547] Connection closed by peer [10.0.0.1]:51405",
    "socketProgress: Connection closed by remote peer n1<40243>",
    "socketStartConnect: Connect to 10.0.0.1<34567> failed : Connection refused",
    "torch.distributed.DistNetworkError: failed to recv, got 0 bytes",
])
def test_who_was_cut_off_by_the_end_of_another_node_is_not_blamed(lost):
    waited, cut_off = dict(error=f"{NOT_DONE} 60 s"), dict(error=lost)
    assert not judge(dict.fromkeys(NODES, cut_off) | {"n1": waited})
    assert not judge(dict.fromkeys(NODES, cut_off)) and not judge({"n2": cut_off})
    for own in ("NCCL: no such device", "CUDA error: the launch timed out and was terminated"):
        assert list(judge(dict.fromkeys(NODES, cut_off) | {"n3": dict(error=own)})) == ["n3"]


def test_what_all_nodes_share_is_no_nodes_fault():
    stale = dict(storage_error="storage run: Stale file handle", storage_write_gbs=None, storage_read_gbs=None)
    assert not judge(dict.fromkeys(NODES, stale))
    assert trouble_of_all([report(node, **stale) for node in NODES], NODES, Limits()) == stale["storage_error"]
    full = report("n3", run_fault="no space for 256 MiB per node in run")
    assert trouble_of_all([report("n1"), full], NODES, Limits()) == full.run_fault
    assert trouble_of_all([report("n1"), report("n3", **stale)], NODES, Limits()) is None
    assert trouble_of_all([report("n3", **stale)], NODES, Limits()) is None  # of the others nobody knows
    assert list(judge({"n1": "silent", "n2": stale}, nodes=NODES[:2])) == ["n1", "n2"]
    assert list(judge(dict.fromkeys(NODES, stale) | {"n3": "silent"})) == ["n3"]


def verdict(folder, changes, *flags, nodes=NODES):
    """What the batch script is told of reports, and the nodes that are avoided from then on."""
    history = History(folder)
    history.begin(Attempt("7", 0, nodes, 0, 0))
    for node in nodes:
        if changes.get(node) != "silent":
            report(node, **changes.get(node, {})).write(folder / "reports")
    arguments = parser().parse_args(["judge", "--folder", str(folder), "--checkpoints", str(folder), "--job", "7",
                                     "--reports", str(folder / "reports"), *flags])
    said = ask_judge(arguments, history)
    return said.action, said.why, [*history.excluded]


@pytest.mark.parametrize("lack, flags, reason", [
    (dict(gpus=0), (), "0 of 8 GPUs"),
    (dict(gpus=4), (), "4 of 8 GPUs"),
    ({}, ("--matmul-tflops", "800"), "matmul 700 TFLOP/s, expected 800"),
    ({}, ("--pair-all-reduce-gbs", "60"), "all-reduce with n2 48 GB/s and n4 48 GB/s, expected 60"),
    (dict(matmul_tflops=None, error="what is measured alone was not done after 60 s"), (), "what is measured alone"),
    (dict(error="NCCL: no socket interface found"), (), "NCCL: no socket interface found"),
])
def test_what_every_node_lacks_excludes_none(tmp_path, lack, flags, reason):
    action, why, excluded = verdict(tmp_path, dict.fromkeys(NODES, lack), *flags)
    assert action == "stop" and not excluded, why
    assert f"no node of the job is good, so none is avoided: n1: {reason}" in why and "; and 1 more. Mend" in why


ECC = dict(faults=["GPU 3: uncorrected ECC errors (2)"])


@pytest.mark.parametrize("changes, flags, excluded", [
    (dict(n1=ECC, n2="silent"), (), ["n1", "n2"]),
    (dict(n1=ECC, n2=ECC), (), ["n1", "n2"]),
    (dict(n1=ECC, n2="silent", n3="silent"), (), ["n1", "n2", "n3"]),
    (dict(n1=dict(gpus=7), n2=ECC), (), ["n1", "n2"]),
    (dict(n1=dict(matmul_tflops=650.0), n2=dict(storage_read_gbs=0.9)),
     ("--matmul-tflops", "680", "--storage-gbs", "1"), ["n1", "n2"]),
    (dict(n1=dict(matmul_tflops=None, error="CUDA error: uncorrectable ECC error"),
          n2=dict(matmul_tflops=None, error="CUDA error: device not ready")), (), ["n1", "n2"]),
])
def test_nodes_that_are_bad_for_reasons_of_their_own_are_avoided_even_if_all_are(tmp_path, changes, flags, excluded):
    assert verdict(tmp_path, changes, *flags, nodes=tuple(changes))[::2] == ("requeue", excluded)


def test_two_nodes_that_fail_alike_but_for_addresses_are_not_avoided(tmp_path):
    changes = {node: dict(error=f"ncclSystemError: no route from 10.0.0.{number}<{number}7>")
               for number, node in enumerate(NODES[:2])}
    assert verdict(tmp_path, changes, nodes=NODES[:2])[::2] == ("stop", [])


@pytest.mark.parametrize("ahead", [(0.0, 3.0), (0.0, 0.0, 3.0, 3.0), (0.0, 3.0, 6.0)])
def test_a_clock_is_blamed_by_a_majority_only(ahead):
    clocks = {node: dict(clock_ahead_seconds=seconds) for node, seconds in zip(NODES, ahead, strict=False)}
    assert not judge(clocks, nodes=tuple(clocks))


def test_one_of_many_and_a_node_alone_are_avoided(tmp_path):
    assert verdict(tmp_path / "many", {"n3": dict(gpus=7)})[::2] == ("requeue", ["n3"])
    assert verdict(tmp_path / "alone", {"n1": dict(gpus=7)}, nodes=NODES[:1])[::2] == ("requeue", ["n1"])


def test_nvidia_smi_that_fails_on_all_nodes_is_said_and_blames_none(tmp_path, capsys):
    fails = dict(nvidia_smi_error="nvidia-smi: Field x is not a valid field to query.")
    for number, nodes in enumerate((NODES, NODES[:1])):
        assert verdict(tmp_path / str(number), dict.fromkeys(nodes, fails), nodes=nodes)[::2] == ("go", [])
        said = f"slurm: {fails['nvidia_smi_error']}, on each node that reported ({len(nodes)}): ECC errors"
        assert said in capsys.readouterr().err
    dead = dict(n1=fails, n2="silent", n3="silent")
    assert verdict(tmp_path / "dead", dead, nodes=tuple(dead))[::2] == ("requeue", ["n2", "n3"])
    assert "on each node that reported (1): ECC errors" in capsys.readouterr().err
    assert judge({"n2": fails}) == {"n2": fails["nvidia_smi_error"]}


def test_a_limit_holds_where_all_nodes_are_equally_slow():
    assert not judge({})
    assert set(judge({}, Limits(matmul_tflops=800.0))) == set(NODES)


def test_every_node_has_two_partners_one_after_the_other():
    for nodes in range(3, 9):
        rounds = rounds_of_pairs(nodes)
        assert len(rounds) <= 3
        assert all(len({*itertools.chain(*pairs)}) == 2 * len(pairs) for pairs in rounds)
        pairs = {frozenset(pair) for pair in itertools.chain(*rounds)}
        assert all(sum(node in pair for pair in pairs) == 2 for node in range(nodes))
    assert rounds_of_pairs(1) == [] and rounds_of_pairs(2) == [[(0, 1)]]


def test_reports_come_back_as_they_were_written(tmp_path):
    for node in NODES:
        report(node).write(tmp_path)
    (tmp_path / ".n5.partial-1.json").write_text("")  # their writers were killed
    (tmp_path / "n6.json").write_text('{"node": "n6", "gpus"')
    assert read_reports(tmp_path) == [report(node) for node in NODES]
