"""The rules of the house as tests: each rule reads one file and lists what breaks it, and has a sample that does."""
from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LINE_LIMIT = 400
ORDER = ("model_types", "config", "program", "transformer_config", "data", "parallel", "layers", "attention", "model",
         "optim", "planner", "checkpoint", "training", "convert", "generate", "serve", "quantize", "evaluate",
         "cluster", "monitoring", "benchmark")
RANKS = {name: rank for rank, name in enumerate(ORDER)} | {"pretrain": len(ORDER)}
FREE_FOR_ALL = "hrm_megatron.parallel.cpu"  # must come before the first import of Megatron, wherever that is
NO_TORCH = ("hrm_megatron/config.py", "hrm_megatron/model_types.py", "hrm_megatron/model/ticks.py",
            "hrm_megatron/optim/schedule.py", "hrm_megatron/data/plan.py", "hrm_megatron/checkpoint/archive.py",
            "hrm_megatron/checkpoint/iterations.py", "hrm_megatron/checkpoint/manifest.py",
            "hrm_megatron/cluster/attempts.py", "hrm_megatron/monitoring/")
NO_MEGATRON = (*NO_TORCH, "hrm_megatron/convert/table.py", "hrm_megatron/data/mixture.py", "hrm_megatron/planner/")
TOP_LEVEL = {"hrm_megatron", "tools", "examples", "tests", "launch_scripts", "docs", "setup.py", "README.md",
             "pyproject.toml", "Makefile", "LICENSE"}  # and what starts with a dot
DISTRIBUTIONS = {"megatron": "megatron-core", "yaml": "pyyaml"}  # where the import has another name
OWNER_ONLY = ("save_file", "save_model", "serialize_file", "mkdtemp", "mkstemp", "NamedTemporaryFile")
# In pieces, so that this file does not break its own rule.
PRIVATE_PLACES = re.compile("|".join((
    r"(?<![\w.])/wo" + r"rk(?![a-z])", "shared" + "/golden", r"py" + r"pi\.org", "files.python" + "hosted",
    r"download\.py" + r"torch\.org", r"registry\.np" + r"mjs",
    r"conda\.ana" + r"conda\.org", r"py" + r"pi\.nvidia\.com")))

Rule = Callable[[str, str], list[str]]  # (path from the root, source) -> what breaks the rule


def imports(path: str, source: str) -> Iterator[tuple[int, str]]:
    """Yield (line, absolute dotted name) of everything imported, also inside functions; names of a from-import too."""
    package = path.removesuffix(".py").split("/")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[:len(package) - node.level + 1] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def rank(dotted: str) -> int | None:
    """Height of a module in ORDER; tools, examples and pretrain on top; None where it has no place."""
    first, _, rest = dotted.partition(".")
    if first in ("tools", "examples"):
        return RANKS["pretrain"]
    second = rest.split(".")[0]
    return -1 if second.startswith("__") or not second else RANKS.get(second)


def imports_run_downhill(path: str, source: str) -> list[str]:
    own = rank(path.removesuffix(".py").replace("/", "."))
    if own is None:
        return [f"{path}: no place in the order of packages; put it into one of {', '.join(ORDER)}"]
    complaints = []
    for line, name in imports(path, source):
        if name.split(".")[0] not in ("hrm_megatron", "tools", "examples") or f"{name}.".startswith(f"{FREE_FOR_ALL}."):
            continue
        other = rank(name)
        if other is None or other > own:
            complaints.append(f"{path}:{line}: imports {name}, which is not below it")
    return complaints


def thinks_without_megatron(path: str, source: str) -> list[str]:
    if not path.startswith(NO_MEGATRON):
        return []
    forbidden = ("megatron", "torch") if path.startswith(NO_TORCH) else ("megatron", "torch.cuda")
    attributes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)]
    used = [*imports(path, source), *((node.lineno, ast.unparse(node)) for node in attributes)]
    return [f"{path}:{line}: uses {name}" for line, name in used
            if any(f"{name}.".startswith(f"{root}.") for root in forbidden)]


def only_training_asks_for_args(path: str, source: str) -> list[str]:
    if path.startswith("hrm_megatron/training/") or path == "hrm_megatron/pretrain.py":
        return []
    lines = [line for line, name in imports(path, source) if name.endswith(".get_args") and name != "typing.get_args"]
    lines += [node.lineno for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)
              and node.attr == "get_args" and ast.unparse(node) != "typing.get_args"]
    return [f"{path}:{line}: get_args() outside hrm_megatron/training; take the values as parameters" for line in lines]


def logs_and_never_prints(path: str, source: str) -> list[str]:
    return [f"{path}:{node.lineno}: prints without saying where; log it, and console.py will show it"
            for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)
            and ast.unparse(node.func).split(".")[-1] in ("print", "print_rank_0", "print_rank_last")
            and not any(keyword.arg == "file" for keyword in node.keywords)]


def is_short_and_named(path: str, source: str) -> list[str]:
    complaints = []
    if (lines := source.count("\n")) >= LINE_LIMIT:
        complaints.append(f"{path}: {lines} lines; keep it under {LINE_LIMIT}")
    if Path(path).name == "utils.py":
        complaints.append(f"{path}: name it after what it does")
    return complaints


def swallows_nothing(path: str, source: str) -> list[str]:
    return [f"{path}:{node.lineno}: swallows every error" for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.ExceptHandler) and all(isinstance(step, ast.Pass) for step in node.body)
            and (node.type is None or ast.unparse(node.type) in ("Exception", "BaseException"))]


def refuses_before_it_installs(path: str, source: str) -> list[str]:
    """A dry run installs nothing, and refuses what a run refuses."""
    return [f"{path}:{node.lineno}: {install.name} refuses, and a dry run would not; call it in pretrain.refuse"
            for install in ast.walk(ast.parse(source))
            if isinstance(install, ast.FunctionDef) and install.name.startswith("install_")
            for node in ast.walk(install) if isinstance(node, ast.Call)
            and ast.unparse(node.func) in ("ConfigError", "DamagedError", "refuse_beside")]


def opens_what_is_made_for_its_owner_alone(path: str, source: str) -> list[str]:
    """TemporaryDirectory is left out: nobody sees what vanishes with it."""
    calls = [(node.lineno, ast.unparse(node.func).split(".")[-1]) for node in ast.walk(ast.parse(source))
             if isinstance(node, ast.Call)]
    return [f"{path}:{line}: {name} leaves files that only their owner can read; call follow_umask"
            for line, name in calls if name in OWNER_ONLY and all(other != "follow_umask" for _, other in calls)]


def names_no_private_place(path: str, source: str) -> list[str]:
    return [f"{path}:{number}: speaks of {found.group()}" for number, line in enumerate(source.splitlines(), 1)
            if (found := PRIVATE_PLACES.search(line))]


def declares_its_imports(path: str, source: str) -> list[str]:
    roots = {(line, name.split(".")[0]) for line, name in imports(path, source)}
    return [f"{path}:{line}: imports {root}, which pyproject.toml does not name" for line, root in sorted(roots)
            if root not in sys.stdlib_module_names and root not in ("hrm_megatron", "tools")
            and normalize(DISTRIBUTIONS.get(root, root)) not in declared()]


def tools_start_without_extras(path: str, source: str) -> list[str]:
    """A tool whose extra is missing says so, where it needs it."""
    roots = {(node.lineno, name.split(".")[0]) for node in ast.parse(source).body
             if isinstance(node, ast.Import | ast.ImportFrom)
             for name in ([one.name for one in node.names] if isinstance(node, ast.Import) else [node.module or ""])}
    return [f"{path}:{line}: imports {root}, which only an extra installs; import it where it is needed, and say so "
            "where it is missing" for line, root in sorted(roots)
            if normalize(DISTRIBUTIONS.get(root, root)) in declared() - declared(extras=False)]


def takes_lists_given_twice(path: str, source: str) -> list[str]:
    """argparse drops the first list without a word. The training parser refuses the second by itself."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call) and node.args
             and ast.unparse(node.func).endswith(".add_argument") and "nargs='+'" in map(ast.unparse, node.keywords)]
    return [f"{path}:{call.lineno}: {ast.unparse(call.args[0])} given twice would lose its first values; take "
            "action='extend', or Listed if it has a default" for call in calls
            if re.match("'--|[A-Z]", ast.unparse(call.args[0])) and not path.startswith("hrm_megatron/training/")
            and all(keyword.arg != "action" for keyword in call.keywords)]


def names_iterations_in_one_place(path: str, source: str) -> list[str]:
    if path == "hrm_megatron/checkpoint/iterations.py":
        return []
    return [f"{path}:{node.lineno}: makes or reads the name of an iteration's folder; let checkpoint/iterations.py"
            for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant) and isinstance(node.value, str)
            and re.search(r"iter_(\(|\\d|$)", node.value)]


def keeps_the_top_level(paths: list[str]) -> list[str]:
    entries = {path.split("/")[0] for path in paths}
    return [f"{entry}: not at the top of the project" for entry in sorted(entries - TOP_LEVEL)
            if not entry.startswith(".")]


def normalize(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def declared(extras: bool = True) -> set[str]:
    """Every distribution that pyproject.toml asks for, those of extras included."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = chain(project["dependencies"], *(project["optional-dependencies"].values() if extras else ()))
    return {normalize(re.split(r"[^\w.-]", requirement)[0]) for requirement in wanted}


def tracked() -> list[str]:
    """The files of the project, as git lists them, that are still there."""
    # The clone may belong to another user than the one who runs the tests.
    git = subprocess.run(["git", "-c", "safe.directory=*", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if git.returncode:
        pytest.skip(f"needs a git checkout: {git.stderr.strip()}")
    return [path for path in git.stdout.split("\0") if (ROOT / path).is_file()]


OURS = ("hrm_megatron/", "tools/", "examples/")
RULES: tuple[tuple[Rule, tuple[str, ...], str], ...] = (  # rule, where it holds, suffix
    (imports_run_downhill, OURS, ".py"),
    (thinks_without_megatron, OURS, ".py"),
    (only_training_asks_for_args, OURS, ".py"),
    (logs_and_never_prints, ("hrm_megatron/training/", "hrm_megatron/pretrain.py"), ".py"),
    (is_short_and_named, ("",), ".py"),
    (is_short_and_named, ("",), ".sh"),
    (swallows_nothing, ("",), ".py"),
    (refuses_before_it_installs, ("hrm_megatron/",), ".py"),
    (opens_what_is_made_for_its_owner_alone, OURS, ".py"),
    (names_no_private_place, ("",), ""),
    (declares_its_imports, ("hrm_megatron/", "tools/"), ".py"),
    (tools_start_without_extras, ("tools/",), ".py"),
    (takes_lists_given_twice, OURS, ".py"),
    (names_iterations_in_one_place, OURS, ".py"),
)


@pytest.mark.parametrize("rule, folders, suffix", RULES, ids=lambda value: getattr(value, "__name__", ""))
def test_the_project_keeps(rule: Rule, folders: tuple[str, ...], suffix: str) -> None:
    complaints = []
    for path in tracked():
        if path.startswith(folders) and path.endswith(suffix):
            try:
                source = (ROOT / path).read_text()
            except UnicodeDecodeError:
                continue  # not a text
            complaints += rule(path, source)
    assert not complaints, "\n".join(complaints)


def test_nothing_lies_about_at_the_top() -> None:
    assert not keeps_the_top_level(tracked())
    assert keeps_the_top_level(["hrm_megatron/config.py", "notes.txt", ".gitignore"]) \
        == ["notes.txt: not at the top of the project"]


def test_the_order_of_packages_is_told_as_it_is() -> None:
    told = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").partition("which a test enforces: ")[2]
    assert tuple(re.findall(r"`(\w+)`", told.partition(".")[0])) == ORDER
    told = (ROOT / "README.md").read_text(encoding="utf-8").partition("\nhrm_megatron/ ")[2]
    assert tuple(re.findall(r"\w+", told.partition(";")[0])) == ORDER


MODEL = "hrm_megatron/model/hrm.py"


@pytest.mark.parametrize("rule, path, source", [
    (imports_run_downhill, MODEL, "from hrm_megatron.optim.ema import Ema"),
    (imports_run_downhill, MODEL, "def f():\n    import hrm_megatron.training.step"),
    (imports_run_downhill, MODEL, "from hrm_megatron import planner"),
    (imports_run_downhill, MODEL, "from ..convert.table import RENAMES"),
    (imports_run_downhill, MODEL, "from hrm_megatron.pretrain import main"),
    (imports_run_downhill, MODEL, "from tools import plan"),
    (imports_run_downhill, "hrm_megatron/data/batch.py", "from hrm_megatron.parallel import cpu, context"),
    (imports_run_downhill, "hrm_megatron/helpers.py", ""),
    (thinks_without_megatron, "hrm_megatron/config.py", "import torch"),
    (thinks_without_megatron, "hrm_megatron/data/plan.py", "from megatron.core import mpu"),
    (thinks_without_megatron, "hrm_megatron/convert/table.py", "import torch\ntorch.cuda.synchronize()"),
    (thinks_without_megatron, "hrm_megatron/planner/memory.py", "from torch import cuda"),
    (only_training_asks_for_args, MODEL, "from megatron.training import get_args"),
    (only_training_asks_for_args, "tools/plan.py", "import megatron.training as m\nm.get_args()"),
    (logs_and_never_prints, "hrm_megatron/training/data.py", "print('3 rows')"),
    (logs_and_never_prints, "hrm_megatron/training/data.py", "import megatron.training.utils as u\nu.print_rank_0(3)"),
    (is_short_and_named, MODEL, "\n" * LINE_LIMIT),
    (is_short_and_named, "hrm_megatron/data/utils.py", ""),
    (swallows_nothing, MODEL, "try:\n    f()\nexcept:\n    pass"),
    (swallows_nothing, MODEL, "try:\n    f()\nexcept Exception as error:\n    pass"),
    (refuses_before_it_installs, MODEL, "def install_it(args):\n    if args.it:\n        raise ConfigError('--it')"),
    (opens_what_is_made_for_its_owner_alone, MODEL, "from safetensors import torch as st\nst.save_file({}, 'a')"),
    (opens_what_is_made_for_its_owner_alone, "tools/plan.py", "from tempfile import mkdtemp\nfolder = mkdtemp()"),
    (names_no_private_place, "README.md", "cd /wo" + "rk/main"),
    (names_no_private_place, "Makefile", "pip install -i https://py" + "pi.org/simple x"),
    (names_no_private_place, MODEL, "# see shared" + "/golden"),
    (declares_its_imports, MODEL, "import pandas.io"),
    (tools_start_without_extras, "tools/plan.py", "import json\nimport matplotlib.pyplot as plt"),
    (declares_its_imports, "tools/plan.py", "def f():\n    from einops import rearrange"),
    (takes_lists_given_twice, "tools/plan.py", "parser.add_argument('--rows', type=int, nargs='+')"),
    (names_iterations_in_one_place, MODEL, "folder = f'iter_{step:07d}'"),
    (names_iterations_in_one_place, MODEL, "import re\nre.fullmatch(r'iter_(\\d{7,})|release', 'x')"),
])
def test_a_rule_catches(rule: Rule, path: str, source: str) -> None:
    assert rule(path, source)


@pytest.mark.parametrize("rule, path, source", [
    (imports_run_downhill, MODEL, "from hrm_megatron.model import ticks\nfrom . import specs\nimport megatron.core"),
    (imports_run_downhill, "hrm_megatron/data/batch.py", "from hrm_megatron.parallel import cpu"),
    (imports_run_downhill, "hrm_megatron/data/batch.py", "from hrm_megatron.parallel.cpu import activate"),
    (imports_run_downhill, "hrm_megatron/pretrain.py", "from hrm_megatron import __version__, planner"),
    (imports_run_downhill, "tools/plan.py", "from hrm_megatron.planner import memory"),
    (thinks_without_megatron, "hrm_megatron/convert/table.py", "import torch"),
    (thinks_without_megatron, MODEL, "import megatron"),
    (only_training_asks_for_args, "hrm_megatron/training/step.py", "from megatron.training import get_args"),
    (only_training_asks_for_args, "tools/plan.py", "from typing import get_args"),
    (logs_and_never_prints, "hrm_megatron/training/console.py", "import sys\nprint(3, file=sys.stderr)"),
    (swallows_nothing, MODEL, "try:\n    f()\nexcept KeyError:\n    pass"),
    (refuses_before_it_installs, MODEL, "def check_it(args):\n    if args.it:\n        raise ConfigError('--it')"),
    (opens_what_is_made_for_its_owner_alone, MODEL, "save_file(tensors, path)\nfollow_umask(path)"),
    (names_no_private_place, "README.md", "8 GPUs/workers, docs/work, --workers"),
    (declares_its_imports, MODEL, "import os\nimport yaml\nfrom megatron.core import mpu\nfrom . import specs"),
    (tools_start_without_extras, "tools/plan.py", "import torch\ndef f():\n    from matplotlib import cm"),
    (takes_lists_given_twice, "tools/plan.py", "p.add_argument('--rows', nargs='+', action='extend')\n"
                                               "p.add_argument('runs', nargs='+')"),
    (names_iterations_in_one_place, MODEL, "folder.glob('iter_*')\nprint('iter_0000012')"),
])
def test_a_rule_lets_pass(rule: Rule, path: str, source: str) -> None:
    assert not rule(path, source)


def test_thinking_modules_import_alone() -> None:
    """Import them in a fresh process, those without torch first: neither Megatron nor torch comes along."""
    files = sorted((path for path in tracked() if path.startswith(NO_MEGATRON) and path.endswith(".py")),
                   key=lambda path: not path.startswith(NO_TORCH))
    steps = [f"import {path.removesuffix('.py').removesuffix('/__init__').replace('/', '.')}\n"
             f"for name in {('megatron', 'torch') if path.startswith(NO_TORCH) else ('megatron',)}:\n"
             f"    assert name not in sys.modules, {path!r} + ' brings in ' + name\n" for path in files]
    program = "import sys\n" + "".join(steps)
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
