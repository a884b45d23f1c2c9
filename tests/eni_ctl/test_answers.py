"""How answers of EC2 and of `ip` are read: error codes, filters, and answers of any kind."""

from __future__ import annotations

import ipaddress
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lab.any_input import ADDRESSES, DEVICE, anything, one_line_or, spoilt
from lab.ec2 import wildcard

import eni_ctl
from eni_ctl import (
    Failure,
    NeedsPerson,
    NotYet,
    Overloaded,
    aws_failure,
    concerns_one_eni,
    escape_filter,
    same_address,
)

pytestmark = pytest.mark.pure


@pytest.mark.parametrize(
    ("code", "status", "message", "kind", "exit_code"),
    [
        ("UnauthorizedOperation", 403, "You are not authorized", NeedsPerson, 4),
        ("InvalidNetworkInterface.InUse", 400, "Interface: [eni-1] in use.", NotYet, 1),
        ("InvalidParameterValue", 400, "interface eni-1 is currently in use", NotYet, 1),
        (
            "InvalidParameterValue",
            400,
            "Instance 'i-1' already has an interface attached at device index '1'.",
            NotYet,
            1,
        ),
        ("InvalidParameterValue", 400, "something else", NeedsPerson, 4),
        ("InvalidAttachmentID.NotFound", 400, "", NotYet, 1),
        ("IncorrectInstanceState", 400, "", NotYet, 1),
        ("OptInRequired", 403, "", NotYet, 1),
        ("SignatureDoesNotMatch", 403, "Signature not yet current", NotYet, 1),
        ("RequestExpired", 400, "", NotYet, 1),
        ("RequestLimitExceeded", 503, "", Overloaded, 1),
        ("Throttling", 400, "Rate exceeded", Overloaded, 1),
        ("503", 503, "Service Unavailable", Overloaded, 1),
        ("403", 403, "Forbidden", Overloaded, 1),
        ("AttachmentLimitExceeded", 400, "", NeedsPerson, 4),
        ("SomethingNew", 400, "", NeedsPerson, 4),
    ],
)
def test_each_error_code_has_its_meaning(
    code: str, status: int, message: str, kind: type[Failure], exit_code: int
) -> None:
    found = aws_failure("AttachNetworkInterface", code, status, message)
    assert type(found) is kind
    assert found.exit_code == exit_code
    assert "\n" not in str(found)


@pytest.mark.parametrize(
    ("code", "another_may_do"),
    [
        ("InvalidParameterValue", True),
        ("InvalidNetworkInterface.InUse", True),
        ("IncorrectState", True),
        ("UnauthorizedOperation", True),
        ("OperationNotPermitted", True),
        ("AuthFailure", True),  # "… permission to access the specified resource"
        ("SomethingNew", True),
        ("AttachmentLimitExceeded", False),
        ("IncorrectInstanceState", False),
        ("InvalidInstanceID.NotFound", False),
        ("RequestLimitExceeded", False),
        ("InternalError", False),
        ("SignatureDoesNotMatch", False),
        ("ExpiredToken", False),
    ],
)
def test_what_ec2_refuses_for_one_eni_does_not_concern_the_others(
    code: str, another_may_do: bool
) -> None:
    status = 500 if code == "InternalError" else 400
    found = aws_failure("AttachNetworkInterface", code, status, "")
    assert concerns_one_eni(found) == another_may_do


@pytest.mark.parametrize(
    ("one", "same"),
    [
        ("2001:db8:0:1::22", True),
        ("2001:0DB8:0000:0001:0000:0000:0000:0022", True),
        ("2001:db8:0:1::23", False),
        ("10.0.1.22", False),
        ("", False),
        (None, False),
        (22, False),
    ],
)
def test_addresses_are_compared_as_addresses(one: object, same: bool) -> None:
    assert same_address(one, "2001:db8:0:1::22") == same


def test_credentials_that_came_after_boto3_had_asked_are_fetched_at_once_but_once() -> None:
    """A new session at every poll would cost a long wait much memory and time."""

    class HasCredentials:
        def get_once(self, path: str, pattern: str, optional: bool = False) -> str:
            return '{"Code": "Success"}' if path.endswith("role") else "role"

    deadline = eni_ctl.Deadline(300)
    aws = eni_ctl.Aws("us-west-1", deadline, False, cast("eni_ctl.Imds", HasCredentials()))
    sessions = []
    for _ in range(3):
        aws.session = aws.session or object()
        sessions.append(aws.session)
        assert isinstance(aws.why_no_credentials(), eni_ctl.Overloaded)
    assert sessions[0] is not sessions[1]
    assert sessions[1] is sessions[2]


def test_filters_take_escaped_values_literally() -> None:
    assert escape_filter("a*b?c\\d") == "a\\*b\\?c\\\\d"


ENI = eni_ctl.Eni("eni-1", "02:00:00:00:00:01", "us-west-1a", "10.0.1.22")


@settings(max_examples=1000)
@given(document=spoilt([{**DEVICE, "addr_info": ADDRESSES}]) | anything)
def test_whatever_ip_says_eni_ctl_finds_the_address_or_waits(document: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eni_ctl, "find_device", lambda mac: "eth1")
        patch.setattr(eni_ctl, "run_ip", lambda *_: document)
        network = one_line_or(eni_ctl.NotYet, lambda: eni_ctl.read_network(ENI))
    if network:
        subnet = ipaddress.ip_interface(f"{ENI.ip}/{network.prefix}").network
        assert network.gateway == str(subnet.network_address + 1)


NAMED = {"Key": "Name", "Value": "web"}
DESCRIBED = {
    "NetworkInterfaceId": "eni-1",
    "MacAddress": "02:00:00:00:00:01",
    "AvailabilityZone": "us-west-1a",
    "PrivateIpAddress": "10.0.1.22",
    "Status": "in-use",
    "TagSet": [NAMED, {"Key": "FQDN", "Value": "web.example.com"}],
    "Attachment": {
        "AttachmentId": "eni-attach-1",
        "InstanceId": "i-00000001",
        "DeviceIndex": 1,
        "Status": "attached",
    },
}


GOOD = {**DESCRIBED, "NetworkInterfaceId": "eni-good"}


@settings(max_examples=1000)
@given(items=st.lists(spoilt(DESCRIBED) | anything, max_size=3), place=st.integers(0, 3))
def test_no_odd_item_of_an_answer_keeps_a_good_one_from_being_read(
    items: list[Any], place: int
) -> None:
    items.insert(place, GOOD)

    def describe(self: Any, action: str, key: str, page_size: int, **_: Any) -> list[Any]:
        return items

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eni_ctl.Aws, "describe", describe)
        aws = object.__new__(eni_ctl.Aws)
        enis = aws.enis_named("web")
    (good,) = [eni for eni in enis if eni.id == "eni-good"]
    assert (good.ip, good.holder, good.fqdn) == ("10.0.1.22", "i-00000001", "web.example.com")


@given(value=st.text("a*?\\[]", max_size=6), other=st.text("a*?\\[]", max_size=6))
def test_an_escaped_filter_matches_its_value_and_nothing_else(value: str, other: str) -> None:
    pattern = wildcard(eni_ctl.escape_filter(value))
    assert pattern.fullmatch(value)
    assert bool(pattern.fullmatch(other)) == (value == other)
