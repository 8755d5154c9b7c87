"""tools.single_file: a file that runs as the script does, with what it uses of common/ alone.

The files run with nothing but the four packages: in an empty folder, by a Python that sees neither
this folder nor PYTHONPATH and finds no installed module but those of the packages in
requirements.txt and of what these require themselves.
"""

import ast
import csv
import importlib
import json
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

from tools import single_file

ROOT = Path(__file__).parents[1]
SCRIPTS = ["vanilla_pg", "is_pg", "trpo", "ppo"]
SOURCES = {script: (ROOT / f"{script}.py").read_text() for script in SCRIPTS}
RESULTS = {script: single_file.single_file(ROOT / f"{script}.py") for script in SCRIPTS}
SMALL = dict(num_envs=4, num_steps=64, minibatch_size=64, total_steps=600)
ENVS = ["CartPole-v1", "Pendulum-v1"]

ISOLATED = """
import json, runpy, sys
from importlib.machinery import PathFinder
refused, folders, commands = json.loads(sys.argv[1])

class Only(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in refused else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Only
sys.path[:0] = folders  # as the folder of a script that is run by its name
for sys.argv in commands:
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as stop:
        if stop.code:
            raise
"""


def modules_of_other_packages():
    """What could be imported here, and not where requirements.txt alone is installed."""
    packages = re.findall(r"^([\w-]+)==", (ROOT / "requirements.txt").read_text(), re.M)
    assert len(packages) == 4
    for package in packages:  # it grows
        try:
            required = [x for x in metadata.requires(package) or () if "extra ==" not in x]
        except metadata.PackageNotFoundError:
            continue  # of another platform
        packages += {re.match(r"[\w.-]+", x)[0] for x in required} - {*packages}
    wanted = {re.sub(r"[_.-]+", "-", x).lower() for x in packages}
    installed = metadata.packages_distributions().items()
    by = {name: {re.sub(r"[_.-]+", "-", x).lower() for x in names} for name, names in installed}
    return [name for name in by if not by[name] & wanted]


def run_isolated(folder, *commands, importable=()):
    """Run scripts in a folder as `python SCRIPT OPTIONS` does, one after the other."""
    arguments = json.dumps([modules_of_other_packages(), importable, commands])
    command = [sys.executable, "-I", "-c", ISOLATED, arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def options_of(env_id, run_dir):
    options = SMALL | dict(env_id=env_id, run_dir=run_dir)
    return [x for k, v in options.items() for x in (f"--{k.replace('_', '-')}", str(v))]


def outcome(run_dir):
    """The metrics without the time columns; weights, statistics and optimizers, as bytes."""
    with open(run_dir / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        del row["seconds"], row["steps_per_second"]

    def note(x):
        if isinstance(x, dict):
            x = [*x.items()]
        if isinstance(x, (list, tuple)):
            return [note(y) for y in x]
        return x.numpy().tobytes() if isinstance(x, torch.Tensor) else x

    checkpoint = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    for name in ("script", "args", "progress"):  # other names, and a time
        del checkpoint[name]
    return rows, note(checkpoint)


def original(script, env_id, run_dir):
    module = importlib.import_module(script)
    assert module.main(module.Args(**SMALL, env_id=env_id, run_dir=str(run_dir))) == 0
    return outcome(run_dir)


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_one_file_alone_runs_as_the_script_does(script, tmp_path):
    folder = tmp_path / "empty"
    folder.mkdir()
    (folder / f"my_{script}.py").write_text(RESULTS[script])
    commands = [[f"my_{script}.py", *options_of(env_id, env_id)] for env_id in ENVS]
    done = run_isolated(folder, *commands)
    assert done.returncode == 0, done.stderr
    for env_id in ENVS:
        rows, state = outcome(folder / env_id)
        assert len(rows) >= 3
        assert (rows, state) == original(script, env_id, tmp_path / env_id)


@pytest.mark.slow
def test_a_script_beside_common_runs_as_here(tmp_path):
    folder = tmp_path / "empty"
    folder.mkdir()
    shutil.copytree(ROOT / "common", folder / "common", ignore=lambda *_: ["__pycache__"])
    for script in SCRIPTS:
        shutil.copy(ROOT / f"{script}.py", folder)
    commands = [[f"{script}.py", *options_of("CartPole-v1", script)] for script in SCRIPTS]
    done = run_isolated(folder, *commands, importable=[str(folder)])
    assert done.returncode == 0, done.stderr
    for script in SCRIPTS:
        assert outcome(folder / script) == original(script, "CartPole-v1", tmp_path / script)


@pytest.mark.parametrize("module", ["common.networks", "ppo", "scipy", "matplotlib", "pytest"])
def test_what_isolated_runs_cannot_import(module, tmp_path):
    (tmp_path / "script.py").write_text(f"import json, numpy\nimport {module}\n")
    done = run_isolated(tmp_path, ["script.py"])
    assert f"No module named '{module.split('.')[0]}'" in done.stderr


def written(folder, text, name="variant.py"):
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


def defined(statements):
    """Names of the functions, classes and constants among them."""
    names = {}
    for node in statements:
        targets = [*getattr(node, "targets", ()), getattr(node, "target", None)]
        names |= dict.fromkeys(x.id for x in targets if x)
        names |= {node.name: None} if hasattr(node, "name") else {}
    return [*names]


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_is_in_the_four_files(script):
    text, source = RESULTS[script], SOURCES[script]
    assert not re.search(r"^ *(from|import) common", text, re.M)
    # The script, unchanged but for the imports
    docstring, rest = source.split("import itertools", 1)[0], source.split("\nCount = ")[1]
    first, last = rest.split("# --- algorithm")
    assert text.startswith(docstring)
    _, parts = text.split(f"\nCount = {first}# --- networks and returns\n\n\n")
    parts, end = parts.split("# --- algorithm")
    assert end == last
    # The statements of common/, unchanged and in their order
    common = "".join((ROOT / f"common/{name}.py").read_text() for name in ("networks", "returns"))
    for part in parts.strip().split("\n\n\n"):
        _, found, common = common.partition(part)
        assert found
    # Nothing that is not used
    body = ast.parse(text).body

    def used(x):
        return isinstance(x, ast.Name) and isinstance(x.ctx, ast.Load)

    loads = [{x.id for x in ast.walk(node) if used(x)} for node in body]
    for i, node in enumerate(body):
        assert set(defined([node])) <= set().union(*loads[:i], *loads[i + 1 :])


def test_on_the_command_line(tmp_path):
    """The text alone goes to the output, in UTF-8 whatever the terminal has; on trouble nothing."""
    command = [sys.executable, "-m", "tools.single_file"]
    done = subprocess.run(
        [*command, "ppo.py"], cwd=ROOT, env={"PYTHONIOENCODING": "ascii"}, capture_output=True
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.decode() == RESULTS["ppo"]
    assert single_file.single_file(written(tmp_path, RESULTS["ppo"])) == RESULTS["ppo"]
    done = subprocess.run([*command, "nothing.py"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: cannot read nothing.py: ")


GAE = '''#!/usr/bin/env python
"""Advantages of nothing."""

import sys

from common.returns import gae

# Two steps
STEPS = 2


def main(gamma):
    values = [0.0] * (STEPS + 1)  # a comment
    return gae(values, gamma)


main(*sys.argv)
# The end
'''

GAE_ALONE = '''#!/usr/bin/env python
"""Advantages of nothing."""

import sys

import numpy as np

# Two steps
STEPS = 2


# --- returns


def gae(rewards, values, terminated, done, gamma, gae_lambda):
    """Generalized advantage estimation: A_t = Σ_l (γλ)^l δ_{t+l} (Schulman et al. 2016, eq. 16).

    rewards, terminated, done: (T, N); values: (T+1, N), V(s_0) … V(s_T). All NumPy.
    δ_t = r_t + γ V(s_{t+1}) − V(s_t), where a terminated step has no V(s_{t+1}) and a truncated
    one keeps it; the sum ends after either (done = terminated or truncated). Returns (T, N).
    """
    delta = rewards + gamma * values[1:] * ~terminated - values[:-1]
    decay = gamma * gae_lambda * ~done
    advantages, advantage = np.empty_like(delta), 0.0
    for t in reversed(range(len(delta))):
        advantages[t] = advantage = delta[t] + decay[t] * advantage
    return advantages


def main(gamma):
    values = [0.0] * (STEPS + 1)  # a comment
    return gae(values, gamma)


main(*sys.argv)
# The end
'''


def test_a_script_that_uses_gae_alone(tmp_path):
    assert single_file.single_file(written(tmp_path, GAE)) == GAE_ALONE


IMPORTS = '''"""Imports of every kind."""

from __future__ import annotations

import my_envs  # noqa: F401, it registers some
import torch.distributed
from torch.distributions import Beta, Dirichlet, kl_divergence, register_kl
from torch.distributions import Gamma as Gam
from torch.nn import GELU, Conv1d

# What a vector is
from torch.nn.utils import parameters_to_vector

from common.networks import GaussianHead, Policy
from common.returns import gae

USED = torch, Beta, Dirichlet, kl_divergence, register_kl, Gam, GELU, Conv1d, parameters_to_vector


class Mine(Policy):
    def forward(self, obs, gae=None):
        return super().forward(obs)


def main():
    return Mine()
'''

MERGED = '''"""Imports of every kind."""

from __future__ import annotations

import math

import my_envs  # noqa: F401, it registers some
import numpy as np
import torch
import torch.distributed
from gymnasium import spaces
from torch import nn
from torch.distributions import (
    Bernoulli,
    Beta,
    Categorical,
    Dirichlet,
    Independent,
    Normal,
    kl_divergence,
    register_kl,
)
from torch.distributions import Gamma as Gam
from torch.nn import GELU, Conv1d

# What a vector is
from torch.nn.utils import parameters_to_vector

USED = torch, Beta, Dirichlet, kl_divergence, register_kl, Gam, GELU, Conv1d, parameters_to_vector


# --- networks


class CategoricalHead(nn.Module):
'''


def test_imports_are_merged_and_parts_come_before_what_needs_them(tmp_path):
    result = single_file.single_file(written(tmp_path, IMPORTS))
    assert result.startswith(MERGED)
    assert result.endswith("self.outputs(obs))\n\n\nclass Mine" + IMPORTS.split("class Mine")[1])


HEADS = ["CategoricalHead", "BernoulliHead", "GaussianHead", "HEADS"]
USES = [
    ("from common.networks import gather\n\nprint(gather(1))\n", ["gather"]),
    (
        "from common.networks import Normalizer\n\nx = Normalizer(1)\n",
        ["gather", "Normalizer", "x"],
    ),
    ("from common.networks import HEADS\n\nprint(HEADS)\n", HEADS),
    ("from common.networks import Policy\n\nprint(Policy)\n", [*HEADS, "MLP", "CNN", "Policy"]),
    # A local name is none of common/
    (
        "from common.networks import CNN, MLP\n\n\ndef f(x: CNN):\n    MLP = x\n    return MLP\n",
        ["CNN", "f"],
    ),
]


@pytest.mark.parametrize(("text", "names"), USES)
def test_exactly_what_is_used(text, names, tmp_path):
    result = single_file.single_file(written(tmp_path, text))
    assert defined(ast.parse(result).body) == names


def test_a_common_of_ones_own(tmp_path):
    """That beside the script; comments right above a definition and decorators go with it."""
    own = "import functools\nimport math\n\n\ndef twice(x):\n    return 2 * x\n\n\n"
    own += "# --- costly\n\n\n# Only once\n@functools.cache\ndef thrice(x):\n    return 3 * x\n\n\n"
    own += "ONE = 1\nTWO = thrice(ONE) - ONE  # two\nPI = math.pi\n\n\n"
    own += "def never():\n    return PI\n"
    written(tmp_path / "common", own, "numbers.py")
    more = "from common.numbers import TWO, twice\n\n\ndef four(twice=TWO):\n    return 2 * twice\n"
    written(tmp_path / "common", more, "more.py")
    text = "from common.more import four\n\nprint(four())\n"
    expected = "import functools\n\n# --- numbers and more\n\n\n# Only once\n@functools.cache\n"
    expected += (
        "def thrice(x):\n    return 3 * x\n\n\nONE = 1\nTWO = thrice(ONE) - ONE  # two\n\n\n"
    )
    expected += "def four(twice=TWO):\n    return 2 * twice\n\n\nprint(four())\n"
    assert single_file.single_file(written(tmp_path, text)) == expected


def test_an_import_below_other_statements(tmp_path):
    text = "import sys\n\nsys.path.append('.')\n\nfrom common.networks import MLP\n\nprint(MLP)\n"
    result = single_file.single_file(written(tmp_path, text))
    head = "import sys\n\nimport torch\nfrom torch import nn\n\nsys.path.append('.')\n\n\n"
    assert result.startswith(head + "# --- networks\n\n\nclass MLP(")
    assert "common" not in result
    assert result.endswith("last.bias)\n\n\nprint(MLP)\n")


VALUE = "from common.networks import Value\n\nprint(Value)\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "cannot read"),
        ("def f(:\n", "invalid syntax (variant.py, line 1)"),
        ("x = '\0'\n", "null bytes"),
        (b"\n\n\nx = '\xff'\n", "can't decode"),
        ("import common.networks\n", "line 1: `import common.networks` cannot be replaced"),
        ("import os\nimport torch, common\n", "line 2: `import torch, common` cannot"),
        ("from common import networks\n", "only `from common.FILE import NAME` at the top level"),
        ("from common.networks import *\n", "`from common.networks import *` cannot be replaced"),
        ("from math import *\n" + VALUE, "`from math import *` cannot be replaced"),
        ("from common.networks import Value as V\n", "import Value as V` cannot be replaced"),
        ("from .common.networks import Value\n", "import Value` cannot be replaced"),
        ("def f():\n    from common.returns import gae\n", "line 2: `from common.returns import"),
        ("from common.networks import Value, Polcy\n", "line 1: there is no Polcy in"),
        ("from common.nowhere import x\n", "nowhere.py"),
        ("import os; from common.networks import Value\n", "two statements on one line"),
        (VALUE + "\n\nclass Value:\n    pass\n", "Value is defined in "),
        (VALUE + "MLP = 1\n", "MLP is defined in "),
        (VALUE + "def f():\n    global CNN\n    CNN = 1\n", "CNN is defined in "),
        (
            "import mine as nn\n" + VALUE,
            "nn is defined by `from torch import nn` and by `import mine as nn`",
        ),
        (VALUE + "sorted = 1\n", "sorted is defined in Python and in "),
    ],
)
def test_bad_input(text, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if text is not None:
        Path("variant.py").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(SystemExit) as stop:
        single_file.main(single_file.Args("variant.py"))
    out, err = capsys.readouterr()
    assert (stop.value.code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert words in err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("import torch\n\ntorch.set_num_threads(1)\nx = 1\n", "line 3: only definitions"),
        ("from common.more import x\n", "there is no x in"),  # a circle
    ],
)
def test_a_common_that_cannot_be_moved(text, words, tmp_path, capsys):
    written(tmp_path / "common", text, "more.py")
    path = written(tmp_path, "from common.more import x\n\nprint(x)\n")
    with pytest.raises(SystemExit):
        single_file.main(single_file.Args(str(path)))
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err


def test_names_that_do_not_clash(tmp_path):
    """Those of parts that are not used, local ones, and the same thing imported twice."""
    text = "import torch\nimport torch.nn.functional\nfrom torch import nn\n\n"
    text += (
        VALUE
        + "gather = RewardScaler = 1\n\n\ndef f(CNN):\n    MLP = CNN, torch, nn\n    return MLP\n"
    )
    result = single_file.single_file(written(tmp_path, text))
    exec(compile(result, "result", "exec"), {})


def test_the_four_files_are_clean_and_so_are_files_of_fewer_parts(tmp_path):
    for script in SCRIPTS:
        written(tmp_path, RESULTS[script], f"my_{script}.py")
    for number, (text, _) in enumerate(USES):
        path = written(tmp_path, text)
        written(tmp_path, single_file.single_file(path), f"uses{number}.py")
    written(tmp_path, single_file.single_file(written(tmp_path, IMPORTS)), "imports.py")
    (tmp_path / "variant.py").unlink()
    ruff = [sys.executable, "-m", "ruff"]
    for command in (["check"], ["format", "--check"]):
        options = ["--no-cache", "--config", str(ROOT / "pyproject.toml"), str(tmp_path)]
        done = subprocess.run([*ruff, *command, *options], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
