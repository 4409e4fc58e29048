"""What may import what, and what may not be imported at all."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEAVY = {"torch", "transformers", "numpy", "scipy", "ray"}


def loaded_by(code):
    """The top-level modules that are in memory after some code."""
    script = f"import sys\n{code}\nprint('MODULES', *{{m.split('.')[0] for m in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.split("MODULES ")[-1].split())


@pytest.mark.parametrize(
    "code",
    [
        "import locum",
        "import locum; locum.catalogue()",
        "from locum.cli import main; main(['--help'])",
        "from locum.cli import main; main(['papers', '--json'])",
        "from locum.cli import main; main(['cite', 'spectr'])",
        "from locum.method import names; assert 'tokenrecycling' in names('decode')",
    ],
)
def test_what_needs_no_model_loads_none(code):
    assert not loaded_by(code) & HEAVY


def test_a_family_is_imported_when_it_is_used():
    assert "torch" in loaded_by("import locum; locum.decode")
    import locum

    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        locum.nothing  # noqa: B018


def test_help_answers_in_under_half_a_second():
    timed = "from time import perf_counter as now; t = now(); {}; print(now() - t)"
    run = timed.format("from locum.cli import main; main(['--help'])")
    seconds = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", run], capture_output=True, text=True, check=True)
        seconds.append(float(done.stdout.splitlines()[-1]))
    assert min(seconds) < 0.5


def test_the_floors_hold():
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "from importlinter.cli import lint_imports_command; lint_imports_command()",
            "--no-cache",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
