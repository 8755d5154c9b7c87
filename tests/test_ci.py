""".ci/run installs a browser where it can, and says what it does not test where it cannot."""

import shutil
import subprocess
from pathlib import Path

import pytest

RUN = Path(__file__).parents[1] / ".ci" / "run"
NEEDED = ["bash", "dirname", "mktemp", "rm", "mkdir", "touch"]
INSTALL = ["apt-get update -qq", "apt-get install -qq -y chromium"]

pytestmark = pytest.mark.skipif(not all(map(shutil.which, NEEDED)), reason="needs a shell")


def run_ci(folder, user, programs, bodies):
    """The lines that were called and printed, where there are these programs that do nothing.

    bodies: {program: what it does instead}
    """
    log, place = folder / "log", folder / "bin"
    place.mkdir()
    for name in NEEDED:
        (place / name).symlink_to(shutil.which(name))
    bodies = bodies | {"id": f"echo {user}", "python3": 'mkdir "$3/bin"; touch "$3/bin/activate"'}
    for name in ("id", "python3", "python", "pip", "pytest", "ruff", *programs):
        lines = ["#!/bin/sh", f'echo "{name} $*" >> "{log}"', bodies.get(name, "")]
        (place / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
        (place / name).chmod(0o755)
    env = dict(PATH=str(place), TMPDIR=str(folder))
    command = [place / "bash", RUN]
    done = subprocess.run(command, env=env, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert set(folder.iterdir()) == {place, log}  # the environment is gone
    return log.read_text(encoding="utf-8").splitlines(), done.stdout.splitlines()


@pytest.mark.parametrize(
    ("user", "programs", "expected"),
    [
        (0, ["apt-get"], INSTALL),
        (1000, ["apt-get", "sudo"], [f"sudo -n {line}" for line in INSTALL]),
        (0, ["apt-get", "chromium"], []),
        (1000, ["chromium"], []),
    ],
)
def test_a_browser_is_installed_unless_it_is_there(user, programs, expected, tmp_path):
    called, printed = run_ci(tmp_path, user, programs, {})
    assert [line for line in called if "apt-get" in line] == expected
    assert not "".join(printed)
    assert [line.split()[0] for line in called[-4:]] == ["pip", "pytest", "ruff", "ruff"]


@pytest.mark.parametrize(
    ("user", "programs", "bodies"),
    [
        (0, [], {}),
        (1000, ["apt-get"], {}),
        (1000, ["apt-get", "sudo"], {"sudo": "exit 1"}),
        (0, ["apt-get"], {"apt-get": "exit 100"}),
    ],
)
def test_what_is_not_tested_is_said_first_and_last(user, programs, bodies, tmp_path):
    called, printed = run_ci(tmp_path, user, programs, bodies)
    assert printed[0] == printed[-1]
    assert printed[0].startswith("NOT TESTED: docs/side_by_side.html in a browser")
    assert "pytest -rs" in called
