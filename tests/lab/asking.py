"""Requests to the lab's AWS, made as an instance makes them: for the lab's own tests."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from http.client import HTTPConnection
from typing import Any

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError

from lab.aws import Aws
from lab.vpc import OUTER_LIMIT

ENDPOINT, IMDS = "203.0.113.10", "169.254.169.254"
IMDS6, ENI6 = "fd00:ec2::254", "2001:db8:0:1::5"
HOST, PEER = "10.0.1.10", "10.0.1.11"
ONCE: Any = {"total_max_attempts": 1}
make_client: Callable[..., Any] = boto3.client  # its types want a literal name


def ask(
    path: str, headers: dict[str, str] | None = None, method: str = "GET", source: str = HOST
) -> tuple[int, str]:
    """One request to IMDS from the address `source`: status and text."""
    server = IMDS6 if ":" in source else IMDS
    connection = HTTPConnection(server, 80, timeout=60, source_address=(source, 0))
    try:
        connection.request(method, f"/latest/{path}", headers=headers or {})
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


def token(source: str = HOST, seconds: int = 60) -> dict[str, str]:
    """The header with a new token in it."""
    ttl = {"X-aws-ec2-metadata-token-ttl-seconds": str(seconds)}
    status, text = ask("api/token", ttl, "PUT", source)
    assert status == 200
    return {"X-aws-ec2-metadata-token": text}


def metadata(path: str, source: str = HOST) -> str | None:
    """What IMDS says; None where it knows nothing of the kind."""
    status, text = ask(f"meta-data/{path}", token(source), source=source)
    assert status in (200, 404)
    return text if status == 200 else None


def client(aws: Aws, service: str = "ec2", source: str = HOST, **options: Any) -> Any:
    """A boto3 client with the credentials that IMDS gives to the instance at `source`."""
    text = metadata("iam/security-credentials/eni-host", source)
    assert text is not None
    keys = json.loads(text)
    return make_client(
        service,
        region_name=aws.region,
        aws_access_key_id=keys["AccessKeyId"],
        aws_secret_access_key=keys["SecretAccessKey"],
        aws_session_token=keys["Token"],
        verify=str(aws.ca),
        config=Config(retries=ONCE, **options),
    )


def refusal(call: Callable[..., Any], **params: Any) -> tuple[int, str, str]:
    """HTTP status, code and message of a call that AWS refuses."""
    with pytest.raises(ClientError) as caught:
        call(**params)
    answer = caught.value.response
    status = answer["ResponseMetadata"]["HTTPStatusCode"]
    return status, answer["Error"]["Code"], answer["Error"]["Message"]


def wait(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + OUTER_LIMIT
    while not condition():
        assert time.monotonic() < deadline, f"waited {OUTER_LIMIT:.0f} s for {what}"
        time.sleep(0.01)


def described(ec2: Any, eni_id: str) -> dict[str, Any]:
    found = ec2.describe_network_interfaces(NetworkInterfaceIds=[eni_id])["NetworkInterfaces"]
    return dict(found[0])


def attachment_status(ec2: Any, eni_id: str) -> str | None:
    status = described(ec2, eni_id).get("Attachment", {}).get("Status")
    return None if status is None else str(status)
