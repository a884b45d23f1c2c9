"""Items of list answers that are not as one expects: what to give as Aws.enis[…].change or
Instance.change, so that a describe call shows the item so."""

from __future__ import annotations

import ipaddress
from typing import Any

from lab.knobs import Change

Item = dict[str, Any]


def lacking(*path: str) -> Change:
    """The item without one member: lacking("Attachment", "InstanceId")."""

    def change(item: Item) -> Item:
        first, *rest = path
        if not rest:
            return {key: value for key, value in item.items() if key != first}
        if first not in item:
            return item
        return {**item, first: lacking(*rest)(item[first])}

    return change


def having(**members: Any) -> Change:
    """The item with other values for some members."""
    return lambda item: {**item, **members}


def tagged(*tags: Item) -> Change:
    """The item with more tags, before its own ones; a tag may lack its Key or its Value."""
    return lambda item: {**item, "TagSet": [*tags, *item["TagSet"]]}


def upper_case(address: str) -> str:
    """An IPv6 address as people write it."""
    return address.upper()


def uncompressed(address: str) -> str:
    return ipaddress.ip_address(address).exploded


def spelling_ipv6(spell: Any) -> Change:
    """The item with its IPv6 addresses in another spelling than the kernel's."""

    def change(item: Item) -> Item:
        spelt = [{"Ipv6Address": spell(each["Ipv6Address"])} for each in item["Ipv6Addresses"]]
        return {**item, "Ipv6Addresses": spelt}

    return change


def with_stale_attachment(instance_id: str, owner: str) -> Change:
    """A free ENI whose last attachment is still shown, as detached.

    Sources: API_NetworkInterfaceAttachment, Status "detached"; iasql/iasql pull 1576.
    """
    stale = {
        "AttachmentId": "eni-attach-0123456789abcdef0",
        "InstanceId": instance_id,
        "InstanceOwnerId": owner,
        "DeviceIndex": 1,
        "NetworkCardIndex": 0,
        "DeleteOnTermination": False,
        "Status": "detached",
    }
    return lambda item: item if "Attachment" in item else {**item, "Attachment": stale}
