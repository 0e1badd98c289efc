"""Files of JSON: written as UTF-8 whatever the locale, and one clear error for one that cannot be read."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from locvlm.errors import DataError
from locvlm.records import read_json, read_jsonl, write_jsonl

BROKEN = [b"{", b"[" * 100_000, b"caf\xe9", b'{"id": ' + b"9" * 5000 + b"}"]


@pytest.mark.parametrize("content", BROKEN)
def test_a_broken_json_file_gives_one_error_that_names_it(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match="not valid JSON") as fault:
        read_json(path)
    assert str(path) in str(fault.value)


@pytest.mark.parametrize("content", BROKEN)
def test_a_broken_line_gives_one_error_that_names_file_and_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"{}\n\n" + content)
    with pytest.raises(DataError, match="line 3 is not valid JSON") as fault:
        read_jsonl(path)
    assert str(path) in str(fault.value)


def test_text_is_written_as_utf8_under_a_locale_without_it(tmp_path: Path) -> None:
    here, there = tmp_path / "here.jsonl", tmp_path / "there.jsonl"
    write_jsonl(here, [{"text": "caf\u00e9 \u2192"}])
    code = "import sys; from pathlib import Path; from locvlm.records import write_jsonl; "
    code += "write_jsonl(Path(sys.argv[1]), [{'text': 'caf\\u00e9 \\u2192'}])"
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run([sys.executable, "-c", code, str(there)], env=os.environ | locale, check=True)
    assert there.read_bytes() == here.read_bytes()
