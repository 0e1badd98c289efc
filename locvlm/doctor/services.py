"""The services that a run talks to: storage, the DVC remote, MLflow, KFP. Each is really called, not for long."""

import configparser
import os
import re
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from locvlm.doctor.check import Check
from locvlm.errors import TrackingError

PATIENCE = 5  # seconds that one call may take
CONTENT = b"locvlm doctor was here and could not delete this; you may"


def check_storage(place: str) -> Check:
    """Write a small object below a folder or s3:// address, read it back, delete it."""
    name = f"storage {place}"
    key = f"locvlm-doctor-{uuid.uuid4().hex}"
    if place.startswith("s3://"):
        return _answered(name, place, lambda: _s3_round_trip(place, key))
    path = Path(place) / key
    try:
        path.write_bytes(CONTENT)
        try:
            same = path.read_bytes() == CONTENT
        finally:
            path.unlink()
    except OSError as fault:
        return Check(name, "failed", str(fault), "make the folder, or let this user write there")
    return _round_trip(name, same)


def _round_trip(name: str, same: bool) -> Check:
    if not same:
        return Check(name, "failed", "what was read back is not what was written", "look at the storage itself")
    return Check(name, "ok", "an object was written, read and deleted")


def _s3_round_trip(place: str, key: str) -> Check:
    client, bucket, prefix = _s3(place)
    full = f"{prefix}{key}"
    client.put_object(Bucket=bucket, Key=full, Body=CONTENT)
    try:
        same = client.get_object(Bucket=bucket, Key=full)["Body"].read() == CONTENT
    finally:
        client.delete_object(Bucket=bucket, Key=full)
    return _round_trip(f"storage {place}", same)


def _s3(place: str) -> tuple[Any, str, str]:
    """A client, the bucket and the prefix (with its slash) of an s3:// address."""
    import boto3  # type: ignore[import-untyped]
    from botocore.config import Config  # type: ignore[import-untyped]

    bucket, _, prefix = place.removeprefix("s3://").partition("/")
    patience = Config(connect_timeout=PATIENCE, read_timeout=PATIENCE, retries={"total_max_attempts": 1})
    region = os.environ.get("AWS_DEFAULT_REGION") or os.environ.get("AWS_REGION") or "us-east-1"
    client = boto3.Session().client("s3", config=patience, region_name=region)
    return client, bucket, f"{prefix.rstrip('/')}/" if prefix.rstrip("/") else ""


def _answered(name: str, place: str, call: Any) -> Check:
    """The check that `call` returns, or the fault of the S3 service in words."""
    from botocore.exceptions import BotoCoreError, ClientError  # type: ignore[import-untyped]

    try:
        check: Check = call()
    except ClientError as fault:
        code = str(fault.response.get("Error", {}).get("Code", ""))
        hints = {
            "NoSuchBucket": f"make the bucket of {place}, or correct the address",
            "AccessDenied": "this key may not do that: extend its policy to put, get and delete",
            "InvalidAccessKeyId": "AWS_ACCESS_KEY_ID is not known there",
            "SignatureDoesNotMatch": "AWS_SECRET_ACCESS_KEY does not belong to the key",
        }
        return Check(name, "failed", str(fault)[:300], hints.get(code, "look at the key's policy"))
    except BotoCoreError as fault:
        mend = "set AWS_ENDPOINT_URL to the store's address, and see that it is up"
        if "credentials" in str(fault).lower():
            mend = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or run where the pods have a role"
        return Check(name, "failed", str(fault)[:300], mend)
    return check


def check_data(dvc_file: str, remote: str = "") -> Check:
    """Whether a DVC remote can be read, and has the version that `dvc_file` pins.

    `remote`: a folder or s3:// address; "" takes the default remote of the workspace that the file lies in.
    """
    path = Path(dvc_file)
    name = f"data {dvc_file}"
    try:
        md5 = str(yaml.safe_load(path.read_text(encoding="utf-8"))["outs"][0]["md5"])
        place = remote or _default_remote(path)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError, IndexError, configparser.Error) as fault:
        return Check(name, "failed", f"it is not to be read: {fault!r}"[:300], "give a file that `dvc add` has written")
    if not place:
        return Check(name, "failed", "its workspace has no default remote", "`dvc remote add -d NAME URL`")
    key = f"files/md5/{md5[:2]}/{md5[2:]}"
    missing = Check(name, "failed", f"{place} has no {md5}", "`dvc push` it from where the data is")
    if place.startswith("s3://"):
        return _answered(name, place, lambda: _in_s3(name, place, key, md5, missing))
    if not Path(place).is_dir():
        return Check(
            name, "failed", f"the remote {place} is no folder", "mount it, or `dvc remote modify NAME url URL`"
        )
    return Check(name, "ok", f"{place} has version {md5}") if (Path(place) / key).is_file() else missing


def _in_s3(name: str, place: str, key: str, md5: str, missing: Check) -> Check:
    client, bucket, prefix = _s3(place)
    listed = client.list_objects_v2(Bucket=bucket, Prefix=f"{prefix}{key}", MaxKeys=1)
    return Check(name, "ok", f"{place} has version {md5}") if listed.get("KeyCount") else missing


def _default_remote(dvc_file: Path) -> str:
    """The address of the default remote; a relative one counts from the folder .dvc, as DVC keeps it."""
    for folder in dvc_file.absolute().parents:
        settings = folder / ".dvc" / "config"
        if settings.is_file():
            found = configparser.ConfigParser()
            found.read([settings, settings.with_name("config.local")], encoding="utf-8")
            default = found.get("core", "remote", fallback="")
            url = found.get(f"'remote \"{default}\"'", "url", fallback="")
            return str(folder / ".dvc" / url) if url and "://" not in url else url
    return ""


def check_mlflow(uri: str, host: str = "") -> Iterator[Check]:
    """Whether MLflow answers and takes our user, really called.

    `host`: the name by which jobs reach the server (mlflow.locvlm.svc:5000); a server that refuses it answers every
    job with 403 while its probes stay green.
    """
    from locvlm import tracking

    if not uri:
        yield Check("MLflow", "warning", "MLFLOW_TRACKING_URI is not set: nothing is tracked", "set it")
        return
    began = time.monotonic()
    impatient = {"MLFLOW_HTTP_REQUEST_TIMEOUT": str(PATIENCE), "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    with tracking.environment(impatient):
        try:
            found = tracking.probe(uri)
        except TrackingError as fault:
            said, _, mend = str(fault).rpartition("; ")
            yield Check("MLflow", "failed", said, mend)
            return
    yield Check("MLflow", "ok", f"{found}, answered in {time.monotonic() - began:.1f} s")
    if host and uri.startswith("http"):
        yield _allowed_host(uri, host)


def _allowed_host(uri: str, host: str) -> Check:
    """Ask under another name than our own. 401 is fine: the name was let through."""
    path = "/api/2.0/mlflow/experiments/get-by-name?experiment_name=Default"
    request = urllib.request.Request(f"{re.sub('//[^/@]*@', '//', uri.rstrip('/'))}{path}", headers={"Host": host})
    try:
        status = _status(request)
    except OSError as fault:
        return Check("MLflow's names", "warning", str(fault), "ask again")
    if status == 403:
        mend = f"start the server with --allowed-hosts that lists {host}"
        return Check("MLflow's names", "failed", f"jobs reach it as {host}, and it answers that name 403", mend)
    return Check("MLflow's names", "ok", f"it answers to {host}")


def check_kfp(endpoint: str) -> Check:
    """Whether KFP's API answers at this address."""
    if not endpoint:
        return Check("KFP", "not applicable", "no address: give --kfp or set KF_PIPELINES_ENDPOINT")
    try:
        status = _status(urllib.request.Request(f"{endpoint.rstrip('/')}/apis/v2beta1/healthz"))
    except (OSError, ValueError) as fault:
        return Check("KFP", "failed", f"{endpoint}: {fault}", "is this KFP's address, and is the port-forward up?")
    if status in (401, 403):
        return Check("KFP", "warning", f"{endpoint} asks who you are ({status})", "submit with --token")
    if status != 200:
        return Check(
            "KFP", "failed", f"{endpoint} answers {status}", "KFP 2 was looked for; give its address, without a path"
        )
    return Check("KFP", "ok", f"{endpoint} answers")


def _status(request: urllib.request.Request) -> int:
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as refusal:
        return refusal.code
