"""Whether a job is queued once more: the whole table of rules, and the file that remembers it."""
from __future__ import annotations

import pytest

from hrm_megatron.cluster import attempts
from hrm_megatron.cluster.attempts import (
    BAD_NODE,
    CANCELLED,
    DONE,
    ENDED,
    FAILED,
    FINISHED,
    LIMIT,
    LOST,
    REFUSED,
    REQUEUE,
    STOP,
    Attempt,
    History,
    decide,
    how_it_ended,
    saved_step,
)
from hrm_megatron.config import ConfigError
from hrm_megatron.parallel.cpu import activate

STEPS = 100


@pytest.mark.parametrize("code, step, signalled, refusal, end", [
    (0, STEPS, False, None, FINISHED),
    (0, STEPS, True, None, FINISHED),
    (0, STEPS + 1, False, None, FINISHED),  # --train-iters was lowered
    (0, 40, True, None, LIMIT),
    (0, 40, False, None, ENDED),  # --exit-interval and the like
    (1, 40, True, None, LIMIT),  # the limit came before the save was done
    (1, 40, False, None, FAILED),
    (137, STEPS, False, None, FAILED),  # saved its last step, and failed behind it: it must show that it can end
    (1, 0, False, "--lr: ...", REFUSED),
    (1, 0, True, "--lr: ...", REFUSED),
])
def test_an_end_has_a_name(code, step, signalled, refusal, end):
    assert how_it_ended(code, step, STEPS, signalled, refusal) == end


def history(*ends, job="7"):
    """Attempts of one job, as (end, last saved step)."""
    return [Attempt(job, number, ("n1", "n2"), 0, step, end, "why") for number, (end, step) in enumerate(ends)]


@pytest.mark.parametrize("ends, action, why", [
    ([(FINISHED, STEPS)], DONE, "done at step 100"),
    ([(LIMIT, 40)], REQUEUE, "time limit, goes on after step 40"),
    ([(LIMIT, 0)], REQUEUE, "goes on after step 0"),
    ([(LIMIT, 40), (LIMIT, 80)], REQUEUE, "goes on after step 80"),
    ([(LIMIT, 40), (LIMIT, 40)], STOP, "no progress: step 40 was the last one saved when attempt 0 ended"),
    ([(ENDED, 40), (ENDED, 40)], STOP, "no progress"),
    ([(FAILED, 40)], REQUEUE, "failed, goes on after step 40"),
    ([(FAILED, 0), (FAILED, 0)], STOP, "no progress: step 0"),
    ([(FAILED, 10), (FAILED, 20)], REQUEUE, "goes on after step 20"),
    ([(FAILED, 10), (FAILED, 20), (FAILED, 30)], STOP, "3 failures, 2 are allowed (MAX_FAILURES)"),
    ([(FAILED, 10), (LIMIT, 20), (FAILED, 30), (LIMIT, 40), (LIMIT, 50)], REQUEUE, "goes on after step 50"),
    ([(LOST, 10), (FAILED, 20), (LOST, 30)], STOP, "3 failures"),
    ([(BAD_NODE, 0)], REQUEUE, "bad node"),
    ([(BAD_NODE, 0), (BAD_NODE, 0)], REQUEUE, "bad node"),  # nobody has trained yet
    ([(BAD_NODE, 0)] * 3, STOP, "3 failures"),
    ([(LIMIT, 40), (BAD_NODE, 40)], REQUEUE, "bad node"),
    ([(LIMIT, 40), (BAD_NODE, 40), (LIMIT, 60)], REQUEUE, "goes on after step 60"),
    ([(FAILED, 40), (BAD_NODE, 40), (FAILED, 40)], STOP, "no progress"),
    ([(REFUSED, 0)], STOP, "refused: why"),
    ([(CANCELLED, 40)], STOP, "stopped by Slurm"),
])
def test_the_table_of_rules(ends, action, why):
    verdict = decide(history(*ends), most_failures=2)
    assert verdict.action == action and why in verdict.why and "\n" not in verdict.why


def test_a_job_that_is_submitted_again_begins_anew():
    earlier = history((FAILED, 40), (FAILED, 40))
    assert decide([*earlier, *history((FAILED, 40), job="8")], most_failures=2).action == REQUEUE


def test_the_folder_remembers_starts_and_nodes(tmp_path):
    first = History(tmp_path / "slurm")
    assert first.begin(Attempt("7", 0, ("n1", "n2"), 0, 0)) is None
    first.exclude({"n2": "7 of 8 GPUs"})
    again = History(tmp_path / "slurm")
    assert again.excluded == {"n2": "7 of 8 GPUs"} and again.attempts == first.attempts
    lost = again.begin(Attempt("7", 1, ("n1", "n3"), 25, 25))  # nobody wrote down how the first one ended
    assert lost is not None and (lost.end, lost.last_step) == (LOST, 25)
    again.end(LIMIT, 50)
    assert [(one.end, one.last_step) for one in History(tmp_path / "slurm").attempts] == [(LOST, 25), (LIMIT, 50)]


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / attempts.ATTEMPTS_FILE).write_text("[{")
    with pytest.raises(ConfigError, match="attempts.json: damaged"):
        History(tmp_path)


def test_progress_is_what_megatron_says_is_saved(tmp_path):
    activate()  # folders imports Megatron
    from hrm_megatron.checkpoint.folders import TRACKER_FILE

    assert attempts.TRACKER_FILE == TRACKER_FILE
    assert saved_step(tmp_path) == 0
    (tmp_path / TRACKER_FILE).write_text("120")
    assert saved_step(tmp_path) == 120
    (tmp_path / TRACKER_FILE).write_text("release")
    with pytest.raises(ConfigError, match="holds no step"):
        saved_step(tmp_path)
