"""The start and end of a command's process."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_terminal_that_lacks_characters_ends_no_command(encoding: str) -> None:
    code = (
        "import sys; from attribution.cli import main\n"
        "main.run_command = lambda *_: print('0.9 ± 0.1 日') or print('日', file=sys.stderr) or 0\n"
        "main.main('finetune')"
    )
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert done.returncode == 0
    assert done.stdout.decode(encoding) == f"0.9 {'±' if encoding == 'cp1252' else '?'} 0.1 ?\n"
    assert done.stderr.decode(encoding) == "?\n"
