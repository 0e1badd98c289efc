"""The image's build file, read: nothing here can build it."""

import re

from tests.rendered import K8S, REPOSITORY, pods, ray_job


def instructions() -> list[str]:
    """The build file without comments, continued lines joined."""
    text = re.sub(r"^#.*\n", "", (K8S / "image" / "Dockerfile").read_text(), flags=re.MULTILINE)
    return [line for line in re.sub(r"\\\n\s*", "", text).splitlines() if line.strip()]


def copies() -> list[str]:
    """What it takes from the repository."""
    lines = [line for line in instructions() if line.startswith("COPY ") and "--from" not in line]
    return [source for line in lines for source in line.split()[1:-1]]


def test_it_is_built_in_stages_and_ends_as_an_ordinary_user() -> None:
    lines = instructions()
    stages = [line for line in lines if line.startswith("FROM ")]
    assert len(stages) >= 2
    last = lines[lines.index(stages[-1]) :]
    users = [line.split()[1] for line in last if line.startswith("USER ")]
    pod = next(pods(ray_job("gke")))["securityContext"]
    assert users == [f"{pod['runAsUser']}:{pod['runAsGroup']}"]


def test_every_stage_begins_with_the_base_that_is_pinned_by_digest_or_with_one_of_its_own() -> None:
    lines = instructions()
    base = next(line.removeprefix("ARG ") for line in lines if line.startswith("ARG "))
    assert re.fullmatch(r"BASE_IMAGE=python:3\.11-[a-z-]+@sha256:[0-9a-f]{64}", base)
    assert len(set(base.partition("sha256:")[2])) > 8, "a digest of zeros"
    own = {line.split(" AS ")[1] for line in lines if " AS " in line}
    for line in lines:
        if line.startswith("FROM "):
            assert line.split()[1] in {"${BASE_IMAGE}", *own}


def test_it_installs_with_the_constraints_compiles_and_carries_the_template() -> None:
    lines = instructions()
    installs = [line for line in lines if "pip install" in line]
    assert installs
    assert all("constraints.txt" in line for line in installs)
    assert any("pip install . -c constraints.txt" in line for line in installs)
    assert any("compileall" in line for line in lines)
    assert "COPY k8s/ray-job.yaml /opt/venv/share/locvlm/ray-job.yaml" in lines


def test_what_the_mlflow_server_needs_more_is_pinned_and_does_not_contradict_the_constraints() -> None:
    pins = dict(line.split("==") for line in (REPOSITORY / "constraints.txt").read_text().lower().split())
    text = (K8S / "image" / "server.txt").read_text()
    extra = dict(line.lower().split("==") for line in text.splitlines() if not line.startswith("#"))
    assert set(extra) == {"flask-wtf", "wtforms", "psycopg2-binary"}
    assert all(pins.get(name, version) == version for name, version in extra.items())
    assert any("-r server.txt" in line for line in instructions())


def test_every_file_that_it_copies_is_in_the_repository_and_let_through() -> None:
    ignored = (K8S / "image" / "Dockerfile.dockerignore").read_text().split("\n")
    assert ignored.index("*") < min(ignored.index(f"!{source}") for source in copies())
    for source in copies():
        assert (REPOSITORY / source).exists(), source


def test_no_secret_and_no_index_address_is_in_it() -> None:
    for line in instructions():
        assert not re.search(r"(PASSWORD|TOKEN|SECRET|_KEY)\s*=", line, re.IGNORECASE), line
        assert "index-url" not in line
        assert not line.startswith("ADD ")
    assert set(copies()).isdisjoint({".", "./", ".git", ".env"})


def test_the_commit_that_it_was_built_of_is_known_inside() -> None:
    lines = instructions()
    assert lines.index('ARG GIT_COMMIT=""') < lines.index("ENV LOCVLM_GIT_COMMIT=$GIT_COMMIT")
    assert "--build-arg GIT_COMMIT=$(git rev-parse HEAD)" in (K8S / "image" / "Dockerfile").read_text()
