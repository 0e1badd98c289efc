"""What the documents name exists."""

import re

import pytest

from tests.conftest import REPOSITORY

ROOTS = ("", "locvlm/", "tests/", "k8s/", "docs/")


@pytest.mark.parametrize("document", ["README.md", "docs/paper.md", "docs/architecture.md", "k8s/README.md"])
def test_every_file_that_a_document_names_exists(document: str) -> None:
    text = (REPOSITORY / document).read_text()
    ours = {name for name in re.findall(r"[`(]([\w/-]+\.(?:py|yaml|md|png))[`)]", text) if name != "config.yaml"}
    missing = sorted(name for name in ours if not any((REPOSITORY / root / name).exists() for root in ROOTS))
    assert ours
    assert not missing
