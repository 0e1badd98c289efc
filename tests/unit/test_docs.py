"""What the documents name exists, and the commands they print are ones that `locvlm` takes."""

import re
import shlex
import subprocess

import pytest

from locvlm.cli import build_parser
from tests.conftest import REPOSITORY

ROOTS = ("", "locvlm/", "tests/", "k8s/", "docs/")
DOCUMENTS = ("README.md", "k8s/README.md", *(f"docs/{p.name}" for p in sorted((REPOSITORY / "docs").glob("*.md"))))
WRITTEN_BY_RUNS = {"config.yaml", "locvlm.yaml"}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_file_that_a_document_names_exists(document: str) -> None:
    text = (REPOSITORY / document).read_text()
    ours = set(re.findall(r"[`(]([\w/-]+\.(?:py|yaml|md|png))[`)]", text)) - WRITTEN_BY_RUNS
    missing = sorted(name for name in ours if not any((REPOSITORY / root / name).exists() for root in ROOTS))
    assert ours
    assert not missing


def commands(document: str) -> list[list[str]]:
    """The `locvlm` lines of the code blocks, without those that leave something out with `...`."""
    blocks = re.findall(r"```bash\n(.*?)```", (REPOSITORY / document).read_text(), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines if line.startswith("locvlm ")]
    return [line[1:] for line in words if "..." not in line]


WITH_COMMANDS = ["README.md", *(f"docs/{name}.md" for name in ("data", "training", "evaluation", "serving", "runbook"))]


@pytest.mark.parametrize("document", WITH_COMMANDS)
def test_every_command_of_a_document_is_one_that_the_program_takes(document: str) -> None:
    found = commands(document)
    assert found
    for command in found:
        assert build_parser().parse_args(command).run, command  # an unknown verb or option exits


def test_submitting_tells_what_a_run_costs_before_it_sends_it() -> None:
    make = ["make", "--dry-run", "submit", "PRESET=locvlm-b", "PRICE=2.5", "GPUS=16", "ENDPOINT=http://kfp"]
    lines = subprocess.run(make, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.splitlines()
    plan, sent = [line.partition("/bin/")[2].split() for line in lines if "/bin/" in line][-2:]
    args = build_parser().parse_args(plan[1:])
    assert (plan[1], args.preset, args.price, args.gpus) == ("plan", "locvlm-b", 2.5, 16)
    assert sent[:3] == ["python", "-m", "workflows.submit"]
