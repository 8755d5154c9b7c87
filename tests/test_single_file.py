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
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import torch
from gymnasium import spaces
from torch.distributions import kl_divergence

from tools import single_file

pytestmark = pytest.mark.text

ROOT = Path(__file__).parents[1]
SCRIPTS = ["vanilla_pg", "is_pg", "trpo", "ppo"]
SOURCES = {script: (ROOT / f"{script}.py").read_text(encoding="utf-8") for script in SCRIPTS}
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
    packages = re.findall(
        r"^([\w-]+)==", (ROOT / "requirements.txt").read_text(encoding="utf-8"), re.M
    )
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
    return subprocess.run(command, cwd=folder, capture_output=True, encoding="utf-8")


def options_of(env_id, run_dir):
    options = SMALL | dict(env_id=env_id, run_dir=run_dir)
    return [x for k, v in options.items() for x in (f"--{k.replace('_', '-')}", str(v))]


def outcome(run_dir):
    """The metrics without the time columns; weights, statistics and optimizers, as bytes."""
    with open(run_dir / "metrics.csv", encoding="utf-8", newline="") as file:
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
    (folder / f"my_{script}.py").write_text(RESULTS[script], encoding="utf-8")
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
    (tmp_path / "script.py").write_text(f"import json, numpy\nimport {module}\n", encoding="utf-8")
    done = run_isolated(tmp_path, ["script.py"])
    assert f"No module named '{module.split('.')[0]}'" in done.stderr


def written(folder, text, name="variant.py"):
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def defined(statements):
    """Names of the functions, classes and constants among them."""
    names = {}
    for node in statements:
        targets = [*getattr(node, "targets", ()), getattr(node, "target", None)]
        names |= {x.id: None for x in targets if x}
        if hasattr(node, "name"):
            names[node.name] = None
    return [*names]


def sections(text):
    """{heading: the text below it} of a script; what is above all headings is below the first."""
    first, *others = re.split("^(# --- .*)\n", text, flags=re.M)
    return {"": first} | dict(zip(others[::2], others[1::2]))


def below_imports(text):
    body = ast.parse(text).body
    last = max(x.end_lineno for x in body if isinstance(x, (ast.Import, ast.ImportFrom)))
    return text.split("\n")[last:]


def without_quotes(text, names):
    """Annotations in quotes, where these names are in them, as they are without."""
    quoted = rf'(: |-> )"([^"\n]*\b(?:{"|".join(names)})\b[^"\n]*)"(?=[,):])'
    return re.sub(quoted, r"\1\2", text)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_file_is_the_script_with_the_definitions_of_common(script):
    text, source = RESULTS[script], SOURCES[script]
    assert not re.search(r"^ *(from|import) common", text, re.M)
    assert ast.get_docstring(ast.parse(text)) == ast.get_docstring(ast.parse(source))
    theirs, own = sections(text), sections(source)
    # The script, unchanged but for imports and for names in quotes until they are defined
    files = {
        f"# --- {path.stem}": path.read_text(encoding="utf-8") for path in ROOT.glob("common/*.py")
    }
    names = defined(ast.parse("".join(theirs.get(x, "") for x in files)).body)
    assert below_imports(theirs.pop("")) == below_imports(own.pop(""))
    for heading, lines in own.items():
        assert without_quotes(theirs[heading], names) == lines
    # The statements of common/, unchanged and in their order
    for heading in theirs.keys() - own.keys():
        common = files[heading]
        for part in theirs[heading].strip().split("\n\n\n"):
            _, found, common = common.partition(part)
            assert found


@pytest.mark.parametrize("script", SCRIPTS)
def test_everything_in_a_file_is_used(script):
    text = RESULTS[script]
    body = ast.parse(without_quotes(text, defined(ast.parse(text).body))).body

    def used(x):
        return isinstance(x, ast.Name) and isinstance(x.ctx, ast.Load)

    loads = [{x.id for x in ast.walk(node) if used(x)} for node in body]
    for i, node in enumerate(body):
        if isinstance(node, ast.FunctionDef) and node.decorator_list:
            continue  # its decorator uses it
        assert set(defined([node])) <= set().union(*loads[:i], *loads[i + 1 :])


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    ("space", "outputs"),
    [(spaces.Discrete(2), [[100.0, -100.0]]), (spaces.MultiBinary(1), [[200.0]])],
)
def test_a_file_has_the_kl_of_common(script, space, outputs):
    """PyTorch finds it by its decorator, though no line reads its name; its own KL is infinite."""
    names = {"__name__": "one_file"}
    exec(compile(RESULTS[script], "one_file", "exec"), names)
    head = names["make_head"](space)
    old, new = head(torch.tensor(outputs)), head(-torch.tensor(outputs))
    assert kl_divergence(old, new).item() == pytest.approx(200)


REGISTRY = """KINDS = {}


def register(kind):
    return lambda function: KINDS.setdefault(kind, function)


class Mine:
    pass


class Other:
    pass


@register(Mine)
def of_mine(x):
    return Other, x


@register(Unused)
def of_unused(x):
    return x


@functools.cache
def never(x):
    return x
"""


def test_what_registers_itself_comes_with_what_it_is_for(tmp_path):
    """And with all that it reads. Unused is not there, nor is a decorator of another library."""
    unused = "class Unused:\n    pass\n\n\n"
    start, end = REGISTRY.split("class Other")
    written(tmp_path / "common", f"import functools\n\n{start}{unused}class Other{end}", "kinds.py")
    text = "from common.kinds import KINDS, Mine\n\nprint(KINDS[Mine](1))\n"
    found = single_file.single_file(written(tmp_path, text))
    kept = ["KINDS", "register", "Mine", "Other", "of_mine"]
    assert defined(ast.parse(found).body) == kept
    exec(compile(found, "found", "exec"), {})


def test_on_the_command_line(tmp_path):
    """The text alone goes to the output, in UTF-8 whatever the terminal has; on trouble nothing."""
    command = [sys.executable, "-m", "tools.single_file"]
    done = subprocess.run(
        [*command, "ppo.py"], cwd=ROOT, env={"PYTHONIOENCODING": "ascii"}, capture_output=True
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.decode() == RESULTS["ppo"]
    assert single_file.single_file(written(tmp_path, RESULTS["ppo"])) == RESULTS["ppo"]
    done = subprocess.run([*command, "nothing.py"], cwd=ROOT, capture_output=True, encoding="utf-8")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: cannot read nothing.py: ")


# The files of a common/ that is small
NETWORKS = '''"""Networks of nothing."""

import math

import numpy as np
import torch
from gymnasium import spaces
from torch import nn
from torch.distributions import Bernoulli, Categorical, Independent, Normal

from common.workers import gather


class Normalizer(nn.Module):
    def update(self, obs):
        return gather(np.mean(obs))


class CategoricalHead(nn.Module):
    def forward(self, outputs):
        return Independent(Categorical(logits=outputs), 0)


class BernoulliHead(nn.Module):
    def forward(self, outputs):
        return Bernoulli(logits=outputs)


class GaussianHead(nn.Module):
    def forward(self, outputs):
        return Normal(outputs, 1.0)


HEADS = {spaces.Discrete: CategoricalHead, spaces.MultiBinary: BernoulliHead}
HEADS |= {spaces.Box: GaussianHead}


class MLP(nn.Module):
    def forward(self, obs):
        return torch.tanh(obs)


class CNN(nn.Module):
    def forward(self, obs):
        return torch.relu(obs)


class Policy(nn.Module):
    def __init__(self, space):
        super().__init__()
        self.net = CNN() if math.prod(space.shape) > 100 else MLP()
        self.head = HEADS[type(space)]()

    def forward(self, obs):
        return self.head(self.net(obs))


class Value(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.net = CNN() if size > 100 else MLP()
'''

RETURNS = '''"""Returns of nothing."""

import numpy as np

from common.networks import Normalizer


# All are as long as rewards
def gae(rewards, gamma):
    return np.cumsum(gamma * rewards)  # γ r


class RewardScaler:
    def __init__(self):
        self.moments = Normalizer()
'''

WORKERS = '''"""One worker."""


def gather(x):
    return [x]
'''


@pytest.fixture
def folder(tmp_path):
    """Where a script finds that common/ beside it."""
    for name, text in (("networks", NETWORKS), ("returns", RETURNS), ("workers", WORKERS)):
        written(tmp_path / "common", text, f"{name}.py")
    return tmp_path


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
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "numpy==2.4.6",
# ]
# ///
"""Advantages of nothing."""

import sys

import numpy as np

# Two steps
STEPS = 2


# --- returns


# All are as long as rewards
def gae(rewards, gamma):
    return np.cumsum(gamma * rewards)  # γ r


def main(gamma):
    values = [0.0] * (STEPS + 1)  # a comment
    return gae(values, gamma)


main(*sys.argv)
# The end
'''


def test_a_script_that_uses_gae_alone(folder):
    assert single_file.single_file(written(folder, GAE)) == GAE_ALONE


IMPORTS = '''"""Imports of every kind."""

from __future__ import annotations

# For its environments
import my_envs  # noqa: F401, it registers some
import torch.distributed
from torch.distributions import Beta, Dirichlet, kl_divergence
from torch.distributions import Gamma as Gam
from torch.nn import GELU, Conv1d

# What a vector is
from torch.nn.utils import parameters_to_vector

from common.networks import GaussianHead, Policy
from common.returns import gae

USED = torch.distributed, Beta, Dirichlet, kl_divergence, Gam, GELU, Conv1d, parameters_to_vector


class Mine(Policy):
    def forward(self, obs, gae=None):
        return super().forward(obs)


def main():
    return Mine()
'''

MERGED = '''# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "gymnasium==1.4.0",
#     "torch==2.13.0",
# ]
# ///
"""Imports of every kind."""

from __future__ import annotations

import math

# For its environments
import my_envs  # noqa: F401, it registers some
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
)
from torch.distributions import Gamma as Gam
from torch.nn import GELU, Conv1d

# What a vector is
from torch.nn.utils import parameters_to_vector

USED = torch.distributed, Beta, Dirichlet, kl_divergence, Gam, GELU, Conv1d, parameters_to_vector


# --- networks


class CategoricalHead(nn.Module):
'''


def test_imports_are_merged_and_parts_come_before_what_needs_them(folder):
    result = single_file.single_file(written(folder, IMPORTS))
    assert result.startswith(MERGED)
    assert result.endswith("self.net(obs))\n\n\nclass Mine" + IMPORTS.split("class Mine")[1])


HEADS = ["CategoricalHead", "BernoulliHead", "GaussianHead", "HEADS"]
USES = [
    ("from common.networks import gather\n\nprint(gather(1))\n", ["gather"]),
    (
        "from common.networks import Normalizer\n\nx = Normalizer()\n",
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
def test_exactly_what_is_used(text, names, folder):
    result = single_file.single_file(written(folder, text))
    assert defined(ast.parse(result).body) == names


def test_a_script_elsewhere_takes_the_common_of_the_repository(tmp_path):
    result = single_file.single_file(written(tmp_path, VALUE))
    (value,) = (x for x in ast.parse(result).body if getattr(x, "name", "") == "Value")
    assert ast.unparse(value) in ast.unparse(
        ast.parse((ROOT / "common/networks.py").read_text(encoding="utf-8"))
    )


TYPED = '''"""The anatomy of the four scripts."""

from collections.abc import Callable

from common.networks import MLP, CNN
from common.workers import gather

SIZES = [1, 2]


class Batch:
    def shrink(self, net: MLP) -> list[MLP]:
        return [net]


# --- algorithm


def update(policy: Callable[[MLP], int] | None, batch: Batch, *nets: MLP, net=None) -> int:
    return len(nets)


# --- shared by every script


def main(
    é: "Batch",
    net: Callable[
        [CNN],
        int,
    ],
) -> MLP | None:
    return gather(update(net, é))


# --- the run


class Run:
    def start(self, net: MLP) -> CNN:
        return net


print(main)
'''

TYPED_ALONE = '''# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0",
# ]
# ///
"""The anatomy of the four scripts."""

from collections.abc import Callable

import torch
from torch import nn

SIZES = [1, 2]


class Batch:
    def shrink(self, net: "MLP") -> "list[MLP]":
        return [net]


# --- algorithm


def update(policy: "Callable[[MLP], int] | None", batch: Batch, *nets: "MLP", net=None) -> int:
    return len(nets)


# --- shared by every script


def main(
    é: "Batch",
    net: "Callable[[CNN], int]",
) -> "MLP | None":
    return gather(update(net, é))


# --- workers


def gather(x):
    return [x]


# --- networks


class MLP(nn.Module):
    def forward(self, obs):
        return torch.tanh(obs)


class CNN(nn.Module):
    def forward(self, obs):
        return torch.relu(obs)


# --- the run


class Run:
    def start(self, net: MLP) -> CNN:
        return net


print(main)
'''


def test_the_algorithm_comes_first_and_names_from_below_it_are_quoted(folder):
    result = single_file.single_file(written(folder, TYPED))
    assert result == TYPED_ALONE
    exec(compile(result, "result", "exec"), {"__name__": "result"})


def test_no_quotes_where_python_postpones_annotations(folder):
    postponed = "from __future__ import annotations\n\nfrom collections.abc"
    result = single_file.single_file(
        written(folder, TYPED.replace("from collections.abc", postponed))
    )
    assert "def shrink(self, net: MLP) -> list[MLP]:" in result
    assert result.index("# --- the run") > result.index("# --- networks") > result.index("def main")


EARLY = """from common.networks import MLP, Value
from common.workers import gather

SIZES = [1]


def first():
    return [MLP, Value]


# --- algorithm


def second():
    return gather(first())


{}


# --- the run


def third():
    return second()
"""


@pytest.mark.parametrize(
    ("statement", "is_early"),
    [
        ("class Mine(MLP):\n    pass", True),
        ("class Mine:\n    net: MLP", True),
        ("class Mine:\n    def forward(self, net=MLP):\n        pass", True),
        ("def update(net=MLP()):\n    pass", True),
        ("def update(*, net=MLP()):\n    pass", True),
        ("@second()\ndef update():\n    pass", True),
        ("FOUND = second()", True),
        ("if SIZES:\n    second()", True),
        ("class Mine:\n    def forward(self):\n        return MLP()", False),
        ("def update(net: MLP, *, more: MLP) -> MLP:\n    return MLP()", False),
        ("FOUND = second", True),  # not called, yet it might be
        ("FOUND = SIZES", False),
        ("class Mine:\n    third = 1", False),
        ("def update():\n    def inner(net=MLP()):\n        pass", False),
    ],
)
def test_definitions_come_before_a_statement_that_needs_them_at_once(statement, is_early, folder):
    result = single_file.single_file(written(folder, EARLY.format(statement)))
    places = [
        result.index(x) for x in ("def second", "# --- workers", statement[:9], "# --- the run")
    ]
    expected = [0, 1, 2, 3] if is_early else [0, 2, 1, 3]
    assert sorted(range(4), key=places.__getitem__) == expected
    compiled = compile(result, "result", "exec")
    if "@second" not in statement:  # a list decorates nothing
        exec(compiled, {"__name__": "result"})


VALUE = "from common.networks import Value\n\nprint(Value)\n"


# How tools find the block, from the text of PEP 723
BLOCK = re.compile(r"(?m)^# /// (?P<type>[a-zA-Z0-9-]+)$\s(?P<content>(^#(| .*)$\s)+)^# ///$")


def metadata_of(text):
    (block,) = BLOCK.finditer(text)
    assert block["type"] == "script"
    lines = block["content"].splitlines()
    return tomllib.loads("\n".join(line.removeprefix("#").removeprefix(" ") for line in lines))


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_file_says_what_it_needs(script):
    requirements = (ROOT / "requirements.txt").read_text(encoding="utf-8").split()
    expected = {"requires-python": ">=3.11", "dependencies": sorted(requirements)}
    assert metadata_of(RESULTS[script]) == expected
    assert RESULTS[script].startswith("# /// script\n")


VARIANT = """import json, my_envs
import os.path as path
import stable_baselines3.common.vec_env

from PIL import Image

if path:
    import Box2D


def main():
    from mujoco.viewer import launch

    return launch
"""


def test_what_a_variant_needs_beyond_the_four_packages(tmp_path, monkeypatch, capsys):
    """Pinned where pyproject.toml has a package of that name, otherwise left to the user."""
    written(tmp_path, VARIANT)
    monkeypatch.chdir(tmp_path)
    single_file.main(single_file.Args("variant.py"))
    out, err = capsys.readouterr()
    assert metadata_of(out)["dependencies"] == [
        "box2d==2.3.10",
        "mujoco==3.15.0",
        "stable-baselines3==2.9.2",
    ]
    why = "unless it is a file of your own, add it to the dependencies in the first lines"
    assert err.splitlines() == [
        f"note: pyproject.toml has no version of {name}, {why}" for name in ("PIL", "my_envs")
    ]


def test_a_script_that_says_what_it_needs_keeps_that(folder, capsys):
    own = '# /// script\n# dependencies = ["numpy", "my-envs"]\n# ///\n'
    result = single_file.single_file(written(folder, own + "import my_envs\n" + VALUE))
    assert metadata_of(result) == {"dependencies": ["numpy", "my-envs"]}
    assert result.startswith(own)
    assert capsys.readouterr().err == ""


NOTHING = '# /// script\n# requires-python = ">=3.11"\n# dependencies = []\n# ///\n'


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
    expected = NOTHING + "\nimport functools\n\n# --- numbers\n\n\n# Only once\n"
    expected += "@functools.cache\ndef thrice(x):\n    return 3 * x\n\n\n"
    expected += "ONE = 1\nTWO = thrice(ONE) - ONE  # two\n\n\n# --- more\n\n\n"
    expected += "def four(twice=TWO):\n    return 2 * twice\n\n\nprint(four())\n"
    assert single_file.single_file(written(tmp_path, text)) == expected


def test_an_import_below_other_statements(folder):
    text = "import sys\n\nsys.path.append('.')\n\nfrom common.networks import MLP\n\nprint(MLP)\n"
    result = single_file.single_file(written(folder, text))
    head = "# ///\n\nimport sys\n\nimport torch\nfrom torch import nn\n\nsys.path.append('.')\n\n\n"
    _, metadata, below = result.partition(head)
    assert metadata
    assert below.startswith("# --- networks\n\n\nclass MLP(")
    assert "common" not in result
    assert result.endswith("torch.tanh(obs)\n\n\nprint(MLP)\n")


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
        (VALUE + "super = 1\n", "super is defined in Python and in "),
    ],
)
def test_bad_input(text, words, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
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


def test_names_that_do_not_clash(folder):
    """Those of parts that are not used, local ones, and the same thing imported twice."""
    text = "import torch\nimport torch.nn.functional\nfrom torch import nn\n\n"
    text += (
        VALUE
        + "gather = RewardScaler = 1\n\n\ndef f(CNN):\n    MLP = CNN, torch, nn\n    return MLP\n"
    )
    result = single_file.single_file(written(folder, text))
    exec(compile(result, "result", "exec"), {})


def test_the_four_files_are_clean_and_so_are_files_of_fewer_parts(folder):
    results = {f"my_{script}": RESULTS[script] for script in SCRIPTS}
    for number, text in enumerate([GAE, IMPORTS, TYPED, *(text for text, _ in USES)]):
        results[f"small{number}"] = single_file.single_file(written(folder, text))
    for name, result in results.items():
        written(folder / "results", result, f"{name}.py")
    ruff = [sys.executable, "-m", "ruff"]
    for command in (["check"], ["format", "--check"]):
        options = ["--no-cache", "--config", str(ROOT / "pyproject.toml"), str(folder / "results")]
        done = subprocess.run([*ruff, *command, *options], capture_output=True, encoding="utf-8")
        assert done.returncode == 0, done.stdout
