"""Answers of EC2 and Auto Scaling that lack something, or that look otherwise than one expects.

One odd item never spoils what the answer says of the others.
"""

from __future__ import annotations

import ipaddress
import json
from typing import Any

import pytest
from lab import Lab, Machine, await_that, odd
from lab.knobs import Change
from lab.vpc import OUTER_LIMIT
from lab.watching import (
    all_at_once,
    attached_by,
    await_waiting,
    calls,
    holder,
    last_line,
    wait_for_line,
)

# An ENI of the group's name that cannot be used, whatever else is so.
UNUSABLE: dict[str, Change] = {
    "no MAC address": odd.lacking("MacAddress"),
    "no status": odd.lacking("Status"),
    "no zone": odd.lacking("AvailabilityZone"),
    "no id": odd.lacking("NetworkInterfaceId"),
    "no tags": odd.lacking("TagSet"),
    "no addresses": lambda item: odd.lacking("PrivateIpAddress")(
        odd.having(PrivateIpAddresses=[], Ipv6Addresses=[])(item)
    ),
}


class Pool:
    """A group with a good ENI of its name and with another, which is odd; and a host in it."""

    def __init__(self, lab: Lab, subnet: str, name: str, change: Change | None = None) -> None:
        self.lab, self.subnet, self.name = lab, subnet, name
        self.good = lab.aws.create_eni(subnet, name=name)
        self.odd = lab.aws.create_eni(subnet, name=name)
        if change:
            lab.aws.lab_eni(self.odd).change = change
        self.machine = lab.launch(subnet, group=name)

    def hold(self, eni: str) -> Machine:
        """Another host of the group, which holds the ENI."""
        peer = self.lab.launch(self.subnet, group=self.name)
        self.lab.aws.attach(self.lab.aws.lab_eni(eni), peer.instance, 1)
        return peer

    def attach_status_detach(self) -> None:
        """The three verbs, which all see the same answer."""
        address = self.lab.aws.eni(self.good).private_ip_address
        done = self.machine.eni_ctl("-a")
        assert done.stdout == f"attached {self.good} ({address}) as eth1\n", done
        assert done.returncode == 0
        done = self.machine.eni_ctl("-s")
        assert done.returncode == 0, done
        assert self.good in done.stdout
        done = self.machine.eni_ctl("-d")
        assert done.stdout == f"detached {self.good} ({address})\n", done
        assert done.returncode == 0


def test_an_efa_only_interface_of_the_name_does_not_spoil_the_others(lab: Lab, subnet: str) -> None:
    """It has no address at all: cartography issue 1870, amazon-vpc-cni-k8s pull 3047, alternat
    pull 191."""
    pool = Pool(lab, subnet, "web")
    efa = lab.aws.create_eni(subnet, name="web", interface_type="efa-only")
    lab.aws.lab_eni(pool.odd).status = "pending"
    pool.attach_status_detach()
    assert efa not in attached_by(lab, pool.machine)


def test_an_incomplete_interface_of_the_name_does_not_spoil_the_others(
    lab: Lab, subnet: str
) -> None:
    pools = [Pool(lab, subnet, f"lacks {what}", change) for what, change in UNUSABLE.items()]
    all_at_once(pools, Pool.attach_status_detach)


def test_an_incomplete_attachment_does_not_spoil_the_others(lab: Lab, subnet: str) -> None:
    pools = {}
    for member in ("AttachmentId", "InstanceId", "Status", "DeviceIndex"):
        change = odd.lacking("Attachment", member)
        pool = Pool(lab, subnet, f"lacks {member}", change)
        pools[pool] = pool.hold(pool.odd)
    all_at_once(pools, Pool.attach_status_detach)
    for pool, peer in pools.items():
        assert holder(lab, pool.odd) == peer.instance.id


def test_an_efa_only_interface_alone_needs_a_person_and_is_named(lab: Lab, subnet: str) -> None:
    machine = lab.launch(subnet, group="web")
    efa = lab.aws.create_eni(subnet, name="web", interface_type="efa-only")
    done = machine.eni_ctl("-a")
    assert done.returncode == 4
    assert efa in last_line(done)
    assert "address" in last_line(done)
    assert calls(lab, "AttachNetworkInterface") == 0


@pytest.mark.parametrize(
    "tag", [{"Key": "empty"}, {"Value": "nameless"}, {"Key": "", "Value": ""}, {}]
)
def test_an_odd_tag_beside_its_name_does_not_matter(
    lab: Lab, machine: Machine, eni: str, tag: dict[str, Any]
) -> None:
    lab.aws.lab_eni(eni).change = odd.tagged(tag)
    done = machine.eni_ctl("-a")
    assert done.returncode == 0, done.stderr


def test_an_incomplete_member_of_the_group_does_not_spoil_the_others(lab: Lab, subnet: str) -> None:
    """One holder is dying. Of the other holder Auto Scaling does not tell enough: it is left
    alone."""

    def take_over(pool: Pool) -> None:
        done = pool.machine.eni_ctl("-a")
        assert done.returncode == 0, done.stderr
        assert holder(lab, pool.good) == pool.machine.instance.id

    pools = {}
    for member in ("LifecycleState", "AutoScalingGroupName", "InstanceId"):
        pool = Pool(lab, subnet, f"lacks {member}")
        pool.hold(pool.good).instance.life_cycle = "Terminating:Wait"
        pools[pool] = pool.hold(pool.odd)
        pools[pool].instance.change = odd.lacking(member)
    all_at_once(pools, take_over)
    for pool, peer in pools.items():
        assert holder(lab, pool.odd) == peer.instance.id


def test_a_holder_of_which_auto_scaling_tells_no_state_keeps_its_interface(
    lab: Lab, subnet: str, machine: Machine, eni: str
) -> None:
    other = lab.launch(subnet, group="web")
    lab.aws.attach(lab.aws.lab_eni(eni), other.instance, 1)
    other.instance.change = odd.lacking("LifecycleState")
    await_waiting(machine, "-a", for_what=other.instance.id)
    assert holder(lab, eni) == other.instance.id
    assert calls(lab, "DetachNetworkInterface") == 0


@pytest.mark.parametrize("spell", [odd.upper_case, odd.uncompressed])
def test_an_ipv6_address_is_compared_as_an_address_not_as_text(lab: Lab, spell: Any) -> None:
    subnet = lab.add_subnet("10.0.1.0/24", cidr6="2001:db8:0:a::/64")
    eni = lab.aws.create_eni(subnet, name="web", ipv4=False, ipv6=["2001:db8:0:a::22"])
    lab.aws.lab_eni(eni).change = odd.spelling_ipv6(spell)
    machine = lab.launch(subnet, group="web", ip="10.0.1.10", ipv6=["2001:db8:0:a::10"])
    done = machine.eni_ctl("-a")
    assert done.returncode == 0, done.stderr
    assert ipaddress.ip_address(machine.state()["IP"]) == ipaddress.ip_address("2001:db8:0:a::22")
    machine.ip("-6", "rule", "add", "from", "2001:db8:0:a::22", "lookup", "101")
    report = json.loads(machine.eni_ctl("-s", "--json").stdout)
    assert report["device"] == "eth1"
    assert report["rule"] is True


def test_a_mac_address_in_upper_case_finds_its_device(lab: Lab, machine: Machine, eni: str) -> None:
    mac = lab.aws.eni(eni).mac_address.upper()
    lab.aws.lab_eni(eni).change = odd.having(MacAddress=mac)
    done = machine.eni_ctl("-a")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("verb", ["-a", "-s", "-d"])
def test_an_account_with_very_many_interfaces_is_asked_in_pages(
    lab: Lab, subnet: str, machine: Machine, eni: str, verb: str
) -> None:
    """EC2 refuses there what asks for no pages: amazon-vpc-resource-controller-k8s issue 188,
    cilium pull 37983."""
    if verb != "-a":
        lab.aws.attach(lab.aws.lab_eni(eni), machine.instance, 1)
        await_that(machine.appeared.is_set)
    lab.aws.large_account = True
    done = machine.eni_ctl(verb)
    assert done.returncode == 0, done.stderr
    assert eni in done.stdout


def test_an_interface_on_the_third_page_is_found(lab: Lab, subnet: str) -> None:
    far = lab.add_subnet("10.0.2.0/24", "c")
    for _ in range(11):
        lab.aws.create_eni(far, name="web")
    lab.aws.page_size = 5
    pool = Pool(lab, subnet, "web")
    lab.aws.lab_eni(pool.odd).status = "pending"
    pool.attach_status_detach()


def test_a_holder_among_very_many_is_found(lab: Lab, subnet: str) -> None:
    """Auto Scaling may answer in small pages."""
    enis = [lab.aws.create_eni(subnet, name="web") for _ in range(6)]
    peers = [lab.launch(subnet, group="web") for _ in enis]
    for eni, peer in zip(enis, peers, strict=True):
        lab.aws.attach(lab.aws.lab_eni(eni), peer.instance, 1)
    lab.aws.page_size = 2
    waiting = lab.launch(subnet, group="web").start_eni_ctl("-a")
    wait_for_line(waiting, "InService")
    peers[4].instance.life_cycle = "Terminating"
    out, err = waiting.communicate(timeout=OUTER_LIMIT)
    assert out.startswith(f"attached {enis[4]} "), err
