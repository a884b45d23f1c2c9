"""README's Terraform: whole, consistent in itself, and in the words of the AWS provider."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import hcl2
import pytest
from hcl2 import SerializationOptions
from lab import scoped_policy, snippet

# The attributes that the configuration sets, and those that it reads. Each was looked up in the
# schema of terraform-provider-aws 6.25.0, from which npm's package @cdktf/provider-aws 21.22.1 is
# generated. That package takes half a gigabyte, so no test reads it: look up what you add here.
SET = {
    "provider aws": ["region"],
    "data aws_ami": ["filter.name", "filter.values", "most_recent", "owners"],
    "data aws_subnet": ["id"],
    "resource aws_autoscaling_group": [
        "launch_template.id",
        "launch_template.version",
        "max_size",
        "min_size",
        "name",
        "vpc_zone_identifier",
    ],
    "resource aws_eip": ["domain", "network_interface"],
    "resource aws_iam_instance_profile": ["name", "role"],
    "resource aws_iam_role": ["assume_role_policy", "name"],
    "resource aws_iam_role_policy": ["policy", "role"],
    "resource aws_launch_template": [
        "iam_instance_profile.name",
        "image_id",
        "instance_type",
        "metadata_options.http_tokens",
        "metadata_options.instance_metadata_tags",
        "name",
        "network_interfaces.associate_public_ip_address",
        "network_interfaces.delete_on_termination",
        "network_interfaces.security_groups",
        "user_data",
    ],
    "resource aws_network_interface": [
        "private_ips",
        "security_groups",
        "source_dest_check",
        "subnet_id",
        "tags",
    ],
    "resource aws_route": ["destination_cidr_block", "network_interface_id", "route_table_id"],
    "resource aws_security_group": [
        "description",
        "egress.cidr_blocks",
        "egress.from_port",
        "egress.protocol",
        "egress.to_port",
        "ingress.cidr_blocks",
        "ingress.from_port",
        "ingress.protocol",
        "ingress.to_port",
        "name",
        "vpc_id",
    ],
}
READ = {
    "aws_eip.public_ip",
    "aws_iam_instance_profile.name",
    "aws_iam_role.id",
    "aws_iam_role.name",
    "aws_launch_template.id",
    "aws_network_interface.id",
    "aws_security_group.id",
    "data.aws_ami.id",
    "data.aws_subnet.vpc_id",
}
# Terraform's own, which each resource may have.
META = {"count", "depends_on", "for_each"}
REFERENCE = re.compile(
    r"\b(?P<what>var\.\w+|local\.\w+|(?:data\.)?aws_\w+\.\w+)(?:\[[^]]*\])?(?:\.(?P<attribute>\w+))?"
)
MAIN = snippet("# main.tf")
ANSWERS = snippet("# terraform.tfvars")


def load(text: str) -> dict[str, Any]:
    options = SerializationOptions(with_comments=False, strip_string_quotes=True)
    return hcl2.loads(text, serialization_options=options)


def blocks(kind: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The blocks of the kind with their labels, such as aws_eip.web."""
    for block in load(MAIN).get(kind, []):
        for first, body in block.items():
            if kind in ("data", "resource"):
                for second, inner in body.items():
                    yield f"{first}.{second}", inner
            else:
                yield first, body


def paths(body: dict[str, Any]) -> Iterator[str]:
    """The attributes that a block sets, and those of the blocks in it, such as filter.name."""
    for name, value in body.items():
        if name == "__is_block__":
            continue
        if isinstance(value, list) and any(isinstance(v, dict) for v in value):
            for inner in value:
                yield from (f"{name}.{path}" for path in paths(inner))
        else:
            yield name


def expressions(value: Any) -> Iterator[str]:
    """What Terraform evaluates, all the way down."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for inner in value:
            yield from expressions(inner)
    elif isinstance(value, str) and "${" in value:
        yield value


def references() -> list[re.Match[str]]:
    return [
        found for expression in expressions(load(MAIN)) for found in REFERENCE.finditer(expression)
    ]


def json_of(expression: str) -> Any:
    """What jsonencode() is given, in the default group's name."""
    encoded = re.fullmatch(r"\$\{jsonencode\((.*)\)\}", expression, re.DOTALL)
    assert encoded, expression
    (name,) = (body["default"] for label, body in blocks("variable") if label == "name")
    text = json.dumps(load(f"it = {encoded[1]}\n")["it"])
    return json.loads(text.replace("${var.name}", name))


@pytest.mark.pure
def test_all_that_the_configuration_refers_to_is_declared_in_it() -> None:
    declared = {f"var.{label}" for label, _ in blocks("variable")}
    declared |= {f"data.{label}" for label, _ in blocks("data")}
    declared |= {label for label, _ in blocks("resource")}
    assert {found["what"] for found in references()} <= declared


@pytest.mark.pure
def test_each_variable_is_described_and_typed_and_used() -> None:
    used = {found["what"] for found in references()}
    variables = dict(blocks("variable"))
    assert variables
    for label, body in variables.items():
        assert f"var.{label}" in used
        assert {"description", "type"} <= body.keys()


@pytest.mark.pure
def test_the_answers_are_those_that_terraform_would_ask_for() -> None:
    wanted = {label for label, body in blocks("variable") if "default" not in body}
    assert set(load(ANSWERS)) == wanted


@pytest.mark.pure
def test_the_provider_knows_all_attributes_that_are_set() -> None:
    found: dict[str, set[str]] = {}
    for kind in ("provider", "data", "resource"):
        for label, body in blocks(kind):
            block = f"{kind} {label.partition('.')[0]}"
            found.setdefault(block, set()).update(set(paths(body)) - META)
    assert {block: sorted(attributes) for block, attributes in found.items()} == SET


@pytest.mark.pure
def test_the_provider_knows_all_attributes_that_are_read() -> None:
    read = {
        f"{found['what'].rpartition('.')[0]}.{found['attribute']}"
        for found in references()
        if "aws_" in found["what"] and found["attribute"]
    }
    assert read == READ


@pytest.mark.pure
def test_what_is_repeated_is_repeated_over_what_terraform_knows_before_it_applies() -> None:
    """A count or for_each of what only AWS will tell is an error."""
    for _, body in blocks("resource"):
        for meta in ("count", "for_each"):
            assert "aws_" not in str(body.get(meta, ""))


@pytest.mark.pure
def test_the_role_has_the_scoped_policy_in_the_groups_name() -> None:
    (role_policy,) = (
        body for label, body in blocks("resource") if label.startswith("aws_iam_role_policy.")
    )
    assert json_of(role_policy["policy"]) == scoped_policy()


@pytest.mark.pure
def test_nobody_but_ec2_may_assume_the_role() -> None:
    (role,) = (body for label, body in blocks("resource") if label.startswith("aws_iam_role."))
    (statement,) = json_of(role["assume_role_policy"])["Statement"]
    assert statement["Principal"] == {"Service": "ec2.amazonaws.com"}
    assert statement["Action"] == "sts:AssumeRole"


@pytest.mark.pure
def test_the_eni_has_the_groups_name_and_the_groups_subnet() -> None:
    resources = dict(blocks("resource"))
    eni, group = resources["aws_network_interface.web"], resources["aws_autoscaling_group.web"]
    assert eni["tags"]["Name"] == group["name"] == "${var.name}"
    assert [eni["subnet_id"]] == group["vpc_zone_identifier"]
    assert group["min_size"] == group["max_size"] == 1


@pytest.mark.usefixtures("inside")
def test_terraform_would_not_format_it_otherwise() -> None:
    """Without terraform, that it is HCL has to do."""
    for text in (MAIN, ANSWERS):
        assert load(text)
        terraform = shutil.which("terraform")
        if terraform:
            command = [terraform, "fmt", "-check", "-diff", "-"]
            done = subprocess.run(command, input=text, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
