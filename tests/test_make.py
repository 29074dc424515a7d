"""The Makefile hands on what it is given, as the text it is."""

import os
import shutil
import subprocess

import pytest
from conftest import ROOT

SAYING = r"""#!/bin/sh
for part in "$@"; do printf '<%s>' "$part"; done
"""


@pytest.fixture
def make(tmp_path):
    """Runs make in a copy of the Makefile whose Python says what it was given."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(SAYING)
    python.chmod(0o755)
    for name in ("requirements.txt", "constraints.txt", ".venv/installed"):
        (tmp_path / name).touch()

    def make(*arguments, **environment):
        command = ["make", "--no-print-directory", "-C", tmp_path, *arguments]
        said = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=True).stdout
        assert not list(tmp_path.glob("owned*"))
        return said

    return make


@pytest.mark.parametrize("path", [
    "/a b", "/it's", '/"quoted"', "/$HOME", "/$(touch owned)", "/`touch owned`", "/; touch owned",
    "/$(shell touch owned)", "/two\nlines", "/$$", "/a#b", "/é", "-rf", "",
])  # fmt: skip
def test_a_path_arrives_as_it_was_given(make, path):
    assert f"<--data><{path}>" in make("run", f"DATA={path}")
    assert f"<--out><{path}>" in make("run", f"OUT={path}")
    assert make("report", f"RUNS={path}").endswith(f"<--runs><{path}>")


def test_variables_of_the_environment_are_not_taken(make):
    assert make("run", DATA="/x", OUT="/y", QUICK="0", RUN_DATA="/z") == "<notebooks/run_all.py><--quick>"


@pytest.mark.parametrize("quick, given", [("1", True), ("yes", True), ("no", False), ("0", False), ("", False)])
def test_quick_means_what_it_says(make, quick, given):
    assert ("<--quick>" in make("run", f"QUICK={quick}")) == given
    assert "<--quick>" not in make("run", "DATA=/x") and "<--quick>" in make("run", "DATA=/x", "QUICK=1")
