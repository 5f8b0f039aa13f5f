"""Whether a job is queued once more: the whole table of rules, and the file that remembers it."""
from __future__ import annotations

import time
from dataclasses import replace

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
    RUNNING,
    STOP,
    WENT_BACK,
    Attempt,
    History,
    decide,
    how_it_ended,
    is_done,
    saved_step,
)
from hrm_megatron.config import ConfigError
from hrm_megatron.parallel.cpu import activate

STEPS = 100


@pytest.mark.parametrize("code, outcome, done, signalled, end", [
    (0, FAILED, True, False, FINISHED),
    (0, FAILED, True, True, FINISHED),
    (0, FAILED, False, True, LIMIT),
    (0, FAILED, False, False, ENDED),  # --exit-interval and the like
    (1, FAILED, False, True, LIMIT),  # the limit came before the save was done
    (1, FAILED, False, False, FAILED),
    (137, FAILED, True, False, FAILED),  # saved its last step, and failed behind it: it must show that it can end
    (1, REFUSED, False, False, REFUSED),
    (1, REFUSED, False, True, REFUSED),
    (1, WENT_BACK, False, False, WENT_BACK),
    (1, WENT_BACK, False, True, WENT_BACK),
])
def test_an_end_has_a_name(code, outcome, done, signalled, end):
    assert how_it_ended(code, outcome, done, signalled) == end


def test_a_run_is_done_at_its_last_step(tmp_path):
    steps = 40, STEPS, STEPS + 1  # it was lowered
    assert [is_done(tmp_path, step, step, STEPS) for step in steps] == [False, True, True]
    (tmp_path / attempts.ARGUMENTS_FILE).write_text("match_flops_of ... None\nseed ... 1\ntrain_iters ... 180\n")
    assert is_done(tmp_path, STEPS, STEPS, STEPS)
    (tmp_path / attempts.ARGUMENTS_FILE).write_text("match_flops_of ... XL\nseed ... 1\ntrain_iters ... 180\n")
    assert [is_done(tmp_path, step, step, STEPS) for step in (STEPS, 179, 180)] == [False, False, True]


@pytest.mark.parametrize("evaluated, first_step, done", [
    (None, 40, False), (None, STEPS, True), (None, None, False),
    (f'{{"iteration": {STEPS}}}', 40, True), ('{"iteration": 40}', 60, False), ("", 40, False), ("[]", 40, False),
])
def test_a_run_is_done_when_it_has_been_evaluated_or_nothing_was_left(tmp_path, evaluated, first_step, done):
    if evaluated is not None:
        (tmp_path / attempts.EVALUATED_FILE).write_text(evaluated)
    assert is_done(tmp_path, first_step, STEPS, STEPS) == done


def test_a_run_that_was_stopped_early_is_done(tmp_path):
    (tmp_path / attempts.EARLY_STOPPING_FILE).write_text('{"evaluations": {"40": 0.5}, "stopped": null}')
    assert not is_done(tmp_path, 40, 40, STEPS)
    (tmp_path / attempts.EARLY_STOPPING_FILE).write_text('{"evaluations": {"40": 0.5}, "stopped": 40}')
    assert is_done(tmp_path, 40, 40, STEPS) and not is_done(tmp_path, 60, 60, STEPS)  # it went on since


def history(*ends, job="7", hours=0.0):
    """Attempts of one job, as (end, last saved step), that ended so many hours one after the other."""
    first_steps = [0, *(step for _, step in ends)]
    return [Attempt(job, number, ("n1", "n2"), first_steps[number], step, end, "why", number * hours * 3600)
            for number, (end, step) in enumerate(ends)]


@pytest.mark.parametrize("ends, action, why", [
    ([(FINISHED, STEPS)], DONE, "done at step 100"),
    ([(LIMIT, 40)], REQUEUE, "time limit, goes on after step 40"),
    ([(LIMIT, 0)], REQUEUE, "goes on after step 0"),
    ([(LIMIT, 40), (LIMIT, 80)], REQUEUE, "goes on after step 80"),
    ([(LIMIT, 40), (LIMIT, 40)], STOP, "no progress: step 40 was the last one saved when attempt 0 ended"),
    ([(ENDED, 40), (ENDED, 40)], STOP, "no progress"),
    ([(ENDED, STEPS)], REQUEUE, "goes on after step 100"),  # its last evaluation has not come
    ([(LIMIT, STEPS), (FINISHED, STEPS)], DONE, "done at step 100"),
    ([(LIMIT, STEPS), (LIMIT, STEPS)], STOP, "no progress"),  # there was no time to make it up
    ([(ENDED, 0)], DONE, "ended well and saved no step after 0"),  # --print-config and the like
    ([(BAD_NODE, 0), (ENDED, 0)], DONE, "ended well"),
    ([(LIMIT, 0), (ENDED, 0)], STOP, "no progress"),
    ([(FAILED, 40)], REQUEUE, "failed, goes on after step 40"),
    ([(FAILED, 0), (FAILED, 0)], STOP, "no progress: step 0"),
    ([(FAILED, 10), (FAILED, 20)], REQUEUE, "goes on after step 20"),
    ([(FAILED, 10), (LOST, 20), (FAILED, 30)], REQUEUE, "goes on after step 30"),
    ([(FAILED, 10), (LIMIT, 20), (FAILED, 30), (LIMIT, 40), (LIMIT, 50)], REQUEUE, "goes on after step 50"),
    ([(BAD_NODE, 0)], REQUEUE, "bad node"),
    ([(BAD_NODE, 0), (BAD_NODE, 0)], REQUEUE, "bad node"),  # nobody has trained yet
    ([(BAD_NODE, 0)] * 3, STOP, "3 failures without a new save, 2 are allowed (MAX_FAILURES), the last one: bad node"),
    ([(BAD_NODE, 0), (FAILED, 40), (BAD_NODE, 40), (BAD_NODE, 40)], REQUEUE, "bad node"),
    ([(FAILED, 40), (BAD_NODE, 40), (WENT_BACK, 40), (BAD_NODE, 40), (BAD_NODE, 40)], STOP, "3 failures"),
    ([(LIMIT, 40), (BAD_NODE, 40)], REQUEUE, "bad node"),
    ([(LIMIT, 40), (BAD_NODE, 40), (LIMIT, 60)], REQUEUE, "goes on after step 60"),
    ([(FAILED, 40), (BAD_NODE, 40), (FAILED, 40)], STOP, "no progress"),
    ([(REFUSED, 0)], STOP, "refused: why"),
    ([(WENT_BACK, 40)] * 3, REQUEUE, "went back, goes on after step 40"),  # three times to one step, then it is refused
    ([(WENT_BACK, 40), (FAILED, 40)], STOP, "no progress"),
    ([(CANCELLED, 40)], STOP, "stopped by Slurm"),
])
def test_the_table_of_rules(ends, action, why):
    verdict = decide(history(*ends), most_failures=2)
    assert verdict.action == action and why in verdict.why and "\n" not in verdict.why


@pytest.mark.parametrize("hours, action", [(3.1, REQUEUE), (2.9, STOP)])
def test_a_job_that_saves_a_step_each_time_it_fails_is_bounded_by_the_day(hours, action):
    ends = [(FAILED, step) for step in range(10, 110, 10)]
    assert all(decide(history(*ends[:count], hours=hours), most_failures=2).action == REQUEUE for count in range(1, 9))
    verdict = decide(history(*ends, hours=hours), most_failures=2)
    assert verdict.action == action
    assert "9 failures within 24 hours, 8 are allowed (4 x MAX_FAILURES)" in verdict.why or action == REQUEUE


def test_one_that_went_back_by_itself_is_not_measured_by_what_was_saved_before():
    """By --ckpt-step 20, in the second start and in the first."""
    later = replace(history((FAILED, 60), (LIMIT, 40))[-1], went_back=True)
    assert decide([*history((FAILED, 60)), later], most_failures=2).action == REQUEUE
    first = replace(history((ENDED, 0))[0], first_step=60, last_step=60, went_back=True)
    assert decide([first], most_failures=2).action == REQUEUE
    failed = replace(first, end=FAILED, last_step=40)
    assert decide([*history((FAILED, 60), (FAILED, 60))[:1], failed], most_failures=0).action == STOP  # 2 in a day
    assert decide([failed], most_failures=1).action == REQUEUE
    none_behind = replace(failed, went_back=False, last_step=60)
    assert decide([none_behind], most_failures=0).action == STOP


def test_a_start_that_went_back_is_known_by_the_record(tmp_path):
    record = tmp_path / attempts.RETURN_FILE
    record.write_text('{"step": 20, "time": "yesterday", "finished": true}')
    History(tmp_path, tmp_path).begin(Attempt("7", 0, ("n1",), 60, 60))
    assert not History(tmp_path, tmp_path).end("7", 0, LIMIT, 80)[-1].went_back
    assert History(tmp_path, tmp_path).attempts[-1].returned == "yesterday"
    record.write_text('{"step": 20, "time": "today", "finished": true}')
    assert History(tmp_path, tmp_path).end("7", 0, LIMIT, 40)[-1].went_back
    assert History(tmp_path).attempts[-1].went_back


def test_a_job_that_is_submitted_again_begins_anew():
    earlier = history((FAILED, 40), (FAILED, 40))
    assert decide([*earlier, *history((FAILED, 40), job="8")], most_failures=2).action == REQUEUE


def test_the_folder_remembers_starts_and_nodes(tmp_path):
    first, begun = History(tmp_path / "slurm"), time.time()
    assert not first.begin(Attempt("7", 0, ("n1", "n2"), 0, 0))
    first.exclude({"n2": "7 of 8 GPUs"})
    again = History(tmp_path / "slurm")
    assert again.excluded == {"n2": "7 of 8 GPUs"} and again.attempts == first.attempts
    [lost] = again.begin(Attempt("7", 1, ("n1", "n3"), 25, 25))  # nobody wrote down how the first one ended
    assert (lost.end, lost.last_step) == (LOST, 25)
    again.end("7", 1, LIMIT, 50)
    ended = History(tmp_path / "slurm").attempts
    assert [(one.end, one.last_step) for one in ended] == [(LOST, 25), (LIMIT, 50)]
    assert begun <= ended[0].ended <= ended[1].ended <= time.time()


def test_a_job_ends_its_own_start(tmp_path):
    """Slurm did not say that job 7 still trains, so job 8 took it for lost."""
    both = History(tmp_path)
    both.begin(Attempt("7", 0, ("n1",), 0, 0))
    assert not both.begin(Attempt("8", 0, ("n2",), 10, 10))
    assert decide(both.end("7", 0, LIMIT, 40), most_failures=2).why == "time limit, goes on after step 40"
    assert [(one.job, one.end) for one in History(tmp_path).attempts] == [("7", LIMIT), ("8", RUNNING)]
    with pytest.raises(ConfigError, match="start 1 of job 8 is not in it"):
        both.end("8", 1, LIMIT, 40)


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / attempts.ATTEMPTS_FILE).write_text("[{")
    with pytest.raises(ConfigError, match="attempts.json: damaged"):
        History(tmp_path)


def test_progress_is_what_megatron_says_is_saved(tmp_path):
    activate()  # folders imports Megatron
    from hrm_megatron.checkpoint.folders import TRACKER_FILE
    from hrm_megatron.training.console import ARGUMENTS_FILE
    from hrm_megatron.training.early_stopping import RECORD_FILE
    from hrm_megatron.training.evaluation import EVALUATED

    assert (attempts.TRACKER_FILE, attempts.ARGUMENTS_FILE, attempts.EARLY_STOPPING_FILE, attempts.EVALUATED_FILE) == (
        TRACKER_FILE, ARGUMENTS_FILE, RECORD_FILE, EVALUATED)
    assert saved_step(tmp_path) == 0
    (tmp_path / TRACKER_FILE).write_text("120")
    assert saved_step(tmp_path) == 120
    (tmp_path / TRACKER_FILE).write_text("release")
    with pytest.raises(ConfigError, match="holds no step"):
        saved_step(tmp_path)
