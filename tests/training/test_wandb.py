"""What a run sends to W&B, told by a module that stands in for it."""
import json

import pytest

from tests.training.conftest import scalars

# The functions of wandb that Megatron calls (training/global_vars.py, training.py,
# wandb_utils.py); each call is noted in a file.
STAND_IN = """
import importlib.machinery, json, sys, types
def note(name, *what):
    with open({notes!r}, "a") as notes:
        print(json.dumps([name, *what]), file=notes)
wandb = types.ModuleType("wandb")
wandb.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
wandb.config = types.SimpleNamespace(update=lambda *_, **__: None)
wandb.init = lambda **options: note("init", {{name: options[name] for name in ("dir", "name", "project")}},
                                    options["config"]["ema_decay"])
wandb.log = lambda values, step=None: note("log", step, {{name: float(value) for name, value in values.items()}})
wandb.finish = lambda: note("finish")
wandb.Artifact = lambda name, type, **_: types.SimpleNamespace(add_reference=lambda place, **_: note(type, place),
                                                                     add_file=lambda *_: None)
wandb.run = types.SimpleNamespace(entity="us", project="hrm", log_artifact=lambda *_, **__: None)
sys.modules["wandb"] = wandb
"""


@pytest.fixture(scope="module")
def noted(launch, fullbatch_arguments, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wandb")
    run = launch(*fullbatch_arguments, "--train-iters", 2, "--lr-warmup-iters", 0, "--save", folder / "saved",
                 "--tensorboard-dir", folder / "log", "--wandb-project", "hrm", "--wandb-exp-name", "first",
                 prelude=STAND_IN.format(notes=str(folder / "notes")))
    assert run.code == 0, run.output[-3000:]
    calls = [json.loads(line) for line in (folder / "notes").read_text().splitlines()]
    return folder, calls


def test_the_run_is_named_and_its_settings_are_sent(noted):
    folder, calls = noted
    assert calls[0] == ["init", dict(dir=str(folder / "saved" / "wandb"), name="first", project="hrm"), 0.9]
    assert calls[-1] == ["finish"] and [call[0] for call in calls].count("init") == 1


@pytest.mark.parametrize("name", ["lm loss", "accuracy", "exact accuracy", "bp steps", "tokens per second",
                                  "learning-rate"])
def test_what_tensorboard_shows_wandb_gets(noted, name):
    folder, calls = noted
    sent = {step: values[name] for kind, step, values in (call for call in calls if call[0] == "log") if name in values}
    assert sent.keys() == {1, 2} and sent == pytest.approx(scalars(folder / "log", name), rel=1e-6)  # its fp32


def test_a_save_is_an_artifact(noted):
    folder, calls = noted
    assert [call for call in calls if call[0] == "model"] == [["model", f"file://{folder / 'saved' / 'iter_0000002'}"]]
