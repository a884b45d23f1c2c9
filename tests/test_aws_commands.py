"""README's `aws` commands, by which one makes the network interface and its group by hand."""

from __future__ import annotations

import json
import re
from datetime import datetime, timezone
from typing import Any

from lab import Lab, scoped_policy, snippet
from lab.aws import Instance
from lab.vpc import OUTER_LIMIT

COMMANDS = snippet("# The network interface and its group")
DEBIAN = "136693071363"  # wiki.debian.org/Cloud/AmazonEC2Image
USER_DATA = "#cloud-config\n# The instance finds this in IMDS.\n"


def add_images(lab: Lab) -> str:
    """Images of Debian and of others; the id of the newest one of Debian 12."""
    earlier, later, last = (datetime(2026, month, 1, tzinfo=timezone.utc) for month in (1, 2, 3))
    lab.aws.add_image("debian-12-amd64-20260101-1", DEBIAN, earlier)
    newest = lab.aws.add_image("debian-12-amd64-20260201-2", DEBIAN, later)
    lab.aws.add_image("debian-12-backports-amd64-20260301-3", DEBIAN, last)
    lab.aws.add_image("debian-12-amd64-20260301-3", "111122223333", last)
    return newest


def follow_readme(lab: Lab, subnet: str) -> None:
    """Run the commands on a host that has no part in it but a key of the account."""
    desk = lab.launch(lab.add_subnet("10.0.9.0/24"), role=False)
    desk.write("/root/policy.json", json.dumps(scoped_policy()))
    desk.write("/root/user-data.yaml", USER_DATA)
    commands, times = re.subn(r"\bsubnet=\S+", f"subnet={subnet}", COMMANDS)
    assert times == 1
    administrator = lab.aws.add_administrator()
    script = f"cd /root\n{commands}"
    limit = 2.5 * OUTER_LIMIT  # it starts ten programs
    done = desk.run("sh", "-euc", script, environment=administrator, timeout=limit)
    assert (done.returncode, done.stderr) == (0, "")


def check_group(lab: Lab, image: str) -> None:
    """The group is one host for ever, with the ENI's security group and the role of README."""
    group = lab.aws.autoscaling.autoscaling_groups["web"]
    assert (group.min_size, group.max_size) == (1, 1)
    launch_template: Any = group.ec2_launch_template
    template = launch_template.latest_version().data
    assert template["ImageId"] == image
    (eni,) = [eni.model for eni in lab.aws.enis.values() if eni.tags.get("Name") == "web"]
    assert [own.id for own in eni.group_set] == template["SecurityGroupIds"]
    (role,) = lab.aws.iam.get_instance_profile(template["IamInstanceProfile"]["Name"]).roles
    (trust,) = json.loads(role.assume_role_policy_document)["Statement"]
    assert trust["Principal"] == {"Service": "ec2.amazonaws.com"}
    assert [json.loads(policy) for policy in role.policies.values()] == [scoped_policy()]


def check_instance(instance: Instance) -> None:
    """The launch template gives the instance what README says that it needs."""
    assert instance.role
    assert instance.tokens == "required"
    assert instance.tags_in_imds
    assert instance.user_data == USER_DATA


def test_the_instance_of_a_group_made_by_hand_attaches_its_eni(lab: Lab, subnet: str) -> None:
    image = add_images(lab)
    follow_readme(lab, subnet)
    check_group(lab, image)
    (instance,) = [made for made in lab.aws.instances.values() if made.group == "web"]
    check_instance(instance)
    lab.aws.set_policy(scoped_policy())
    machine = lab.power_on(instance)
    done = machine.eni_ctl("-a")
    assert done.returncode == 0, done.stderr
    state = machine.state()
    assert (state["ASG_NAME"], state["FQDN"]) == ("web", "web.example.com")
    assert state["IP"] == "10.0.1.22"
