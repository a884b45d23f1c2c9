"""What surrounds a run: variables of root's shell, files beside the script, a stderr that nobody
reads, and words on the command line."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess

import pytest
from lab import Lab, Machine, await_that
from lab.vpc import OUTER_LIMIT
from lab.watching import calls, holder, last_line

EVIL = "open('/run/was-imported', 'w').close()\n"


# --- the region: an ENI can be in no other than the instance's


@pytest.mark.parametrize("variable", ["AWS_REGION", "AWS_DEFAULT_REGION"])
def test_another_region_in_the_environment_is_ignored_with_one_line(
    lab: Lab, machine: Machine, eni: str, variable: str
) -> None:
    machine.environment[variable] = "eu-central-1"
    done = machine.eni_ctl("-a")
    assert (done.returncode, done.stdout) == (0, f"attached {eni} (10.0.1.22) as eth1\n"), done
    assert len([line for line in done.stderr.splitlines() if variable in line]) == 1
    assert machine.eni_ctl("-s").returncode == 0
    done = machine.eni_ctl("-d", "-n", "web")
    assert (done.returncode, done.stdout) == (0, f"detached {eni} (10.0.1.22)\n"), done
    assert holder(lab, eni) is None


def test_the_own_region_in_the_environment_is_nothing_to_talk_about(
    lab: Lab, machine: Machine
) -> None:
    done = machine.eni_ctl("-a", AWS_DEFAULT_REGION=lab.region)
    assert done.returncode == 0
    assert "REGION" not in done.stderr


@pytest.mark.parametrize("value", ["evil.example/", "", " ", "us-west-1\nx"])
def test_a_region_that_is_none_is_ignored(lab: Lab, machine: Machine, value: str) -> None:
    done = machine.eni_ctl("-a", AWS_REGION=value, AWS_DEFAULT_REGION=value)
    assert done.returncode == 0, done.stderr


def test_a_region_in_roots_aws_configuration_is_ignored(lab: Lab, machine: Machine) -> None:
    machine.write("/root/.aws/config", "[default]\nregion = eu-central-1\n")
    done = machine.eni_ctl("-a", HOME="/root")
    assert done.returncode == 0, done.stderr


# --- credentials that root's shell keeps from botocore


def test_a_profile_that_does_not_exist_is_named(machine: Machine) -> None:
    done = machine.eni_ctl("-a", AWS_PROFILE="nosuch")
    assert done.returncode in (1, 4)
    assert "nosuch" in last_line(done)
    assert "Traceback" not in done.stderr


def test_credentials_from_imds_that_are_switched_off_are_told_of(machine: Machine) -> None:
    done = machine.eni_ctl("-a", AWS_EC2_METADATA_DISABLED="true")
    assert done.returncode in (1, 4)
    assert "AWS_EC2_METADATA_DISABLED" in last_line(done)


@pytest.mark.parametrize(
    ("variable", "value", "told"),
    [
        ("AWS_CA_BUNDLE", "/nosuch/ca.pem", "/nosuch/ca.pem"),
        ("AWS_CONFIG_FILE", "/run/broken", "/run/broken"),
        ("AWS_ACCESS_KEY_ID", "AKIDEXAMPLE", "secret"),
    ],
)
def test_a_setting_that_boto3_cannot_use_needs_a_person_and_is_named(
    machine: Machine, variable: str, value: str, told: str
) -> None:
    machine.write("/run/broken", "[default\nregion\n")
    machine.environment[variable] = value
    done = machine.eni_ctl("-a")
    assert done.returncode == 4
    assert told in last_line(done).lower()


@pytest.mark.parametrize("verb", [["-d"], ["-a", "-n", "web"], ["-s", "-n", "web"]])
def test_another_accounts_credentials_prove_nothing_about_the_attachment(
    lab: Lab, machine: Machine, eni: str, verb: list[str]
) -> None:
    """They are in root's shell, say. To them, EC2 shows nothing of this account."""
    assert machine.eni_ctl("-a").returncode == 0
    state = machine.state()
    done = machine.eni_ctl(*verb, **lab.aws.add_stranger())
    assert (done.returncode, done.stdout) == (4, "")
    assert last_line(done).endswith("are these credentials of its account?")
    assert machine.state() == state
    assert holder(lab, eni) == machine.instance.id


@pytest.mark.parametrize("options", [[], ["-n", "web"]])
def test_another_accounts_credentials_are_told_of_where_there_is_no_group_or_no_eni(
    lab: Lab, machine: Machine, options: list[str]
) -> None:
    done = machine.eni_ctl("-a", *options, **lab.aws.add_stranger())
    assert (done.returncode, done.stdout) == (4, "")
    assert last_line(done).endswith("are these credentials of its account?")


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("AWS_CA_BUNDLE", "/etc/ssl/certs"),
        ("AWS_CA_BUNDLE", "/etc/hosts"),
        ("AWS_DEFAULTS_MODE", "nosuch"),
        ("AWS_RETRY_MODE", "nosuch"),
        ("AWS_METADATA_SERVICE_TIMEOUT", "soon"),
        ("AWS_EC2_METADATA_SERVICE_ENDPOINT", "169.254.169.254"),
        ("AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE", "nosuch"),
        ("AWS_PROFILE", "chained"),
        ("AWS_PROFILE", "/nosuch/process"),
        ("AWS_PROFILE", "/nosuch/token"),
    ],
)
def test_a_setting_that_is_wrong_for_good_is_not_waited_for(
    machine: Machine, variable: str, value: str
) -> None:
    role = "role_arn = arn:aws:iam::123456789012:role/a"
    machine.write(
        "/root/.aws/config",
        f"""
[profile chained]
{role}
source_profile = nosuch
[profile /nosuch/process]
credential_process = /nosuch/process
[profile /nosuch/token]
{role}
web_identity_token_file = /nosuch/token
""",
    )
    machine.environment[variable] = value
    done = machine.eni_ctl("-a", HOME="/root")
    assert done.returncode == 4
    assert value in last_line(done) or variable in last_line(done)


def test_keys_in_the_environment_that_have_expired_need_a_person(
    lab: Lab, subnet: str, eni: str
) -> None:
    """As one pastes them from SSO. Nothing renews them."""
    machine = lab.launch(subnet, group="web", tokens="optional")
    lab.aws.credential_seconds = 0
    path = "http://169.254.169.254/latest/meta-data/iam/security-credentials/eni-host"
    code = f"import json, urllib.request as u; print(u.urlopen({path!r}).read().decode())"
    keys = json.loads(machine.run("/usr/bin/python3", "-c", code).stdout)
    done = machine.eni_ctl(
        "-a",
        AWS_ACCESS_KEY_ID=keys["AccessKeyId"],
        AWS_SECRET_ACCESS_KEY=keys["SecretAccessKey"],
        AWS_SESSION_TOKEN=keys["Token"],
    )
    assert done.returncode == 4
    assert "ExpiredToken" in last_line(done)
    assert last_line(done).endswith("(the keys are from the environment)")


def test_settings_that_are_empty_are_none(machine: Machine) -> None:
    names = ("AWS_METADATA_SERVICE_TIMEOUT", "AWS_METADATA_SERVICE_NUM_ATTEMPTS")
    done = machine.eni_ctl("-a", **dict.fromkeys(names, ""))
    assert done.returncode == 0, done.stderr


# --- files that root's Python must not import


@pytest.mark.parametrize("name", ["random", "json", "boto3", "requests", "shlex", "logging"])
def test_a_file_beside_the_script_is_never_imported(lab: Lab, machine: Machine, name: str) -> None:
    machine.write(f"/usr/local/sbin/{name}.py", EVIL)
    done = machine.eni_ctl("-a")
    assert done.returncode == 0, done.stderr
    assert not machine.exists("/run/was-imported")


def test_nothing_from_the_environment_or_roots_home_is_imported(lab: Lab, machine: Machine) -> None:
    version = machine.run(
        "/usr/bin/python3", "-c", "import sys; print('%d.%d' % sys.version_info[:2])"
    ).stdout.strip()
    for folder in ("/run/evil", f"/root/.local/lib/python{version}/site-packages"):
        for name in ("random", "sitecustomize", "usercustomize", "boto3"):
            machine.write(f"{folder}/{name}.py", EVIL)
    done = machine.eni_ctl("-a", PYTHONPATH="/run/evil", HOME="/root")
    assert done.returncode == 0, done.stderr
    assert not machine.exists("/run/was-imported")


def test_a_file_in_the_current_directory_is_never_imported(lab: Lab, machine: Machine) -> None:
    machine.write("/run/here/random.py", EVIL)
    done = machine.run("sh", "-c", "cd /run/here && exec eni_ctl.py -a")
    assert done.returncode == 0, done.stderr
    assert not machine.exists("/run/was-imported")


# --- nobody needs to read stderr


@pytest.mark.parametrize(
    "command",
    [
        "exec eni_ctl.py -a 2>&-",
        "exec eni_ctl.py -a 2>/dev/full",
        "eni_ctl.py -a 2>&1 >/run/out | true; exec sleep infinity",
        "exec eni_ctl.py -v -a 2>/dev/full",
        "exec eni_ctl.py -a <&- 2>&-",
    ],
)
def test_a_wait_goes_on_where_stderr_is_closed_or_full(
    lab: Lab, subnet: str, machine: Machine, eni: str, command: str
) -> None:
    peer = lab.launch(subnet, group="web")
    lab.aws.attach(lab.aws.lab_eni(eni), peer.instance, 1)
    await_that(peer.appeared.is_set)
    running = machine.popen("sh", "-c", command)
    # Long enough for several words about the waiting.
    await_that(lambda: calls(lab, "DescribeNetworkInterfaces") >= 6)
    lab.aws.detach(lab.aws.lab_eni(eni))
    await_that(lambda: holder(lab, eni) == machine.instance.id)
    await_that(lambda: machine.exists("/etc/default/eni"))
    running.kill()
    running.communicate()


@pytest.mark.parametrize("redirection", ["2>&-", "2>/dev/full"])
def test_the_deadline_holds_where_stderr_is_closed_or_full(
    lab: Lab, machine: Machine, redirection: str
) -> None:
    """A resolver that never answers: only the process as a whole can be ended."""
    machine.write("/etc/hosts", "127.0.0.1 localhost\n")
    machine.write("/etc/resolv.conf", "nameserver 10.0.1.99\noptions timeout:30 attempts:5\n")
    done = machine.run("sh", "-c", f"exec eni_ctl.py -a -t 20 {redirection}")
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize("redirection", ["2>&-", "2>/dev/full"])
def test_an_error_keeps_its_exit_code_where_stderr_is_closed_or_full(
    lab: Lab, subnet: str, redirection: str
) -> None:
    machine = lab.launch(subnet, group="web")
    done = machine.run("sh", "-c", f"exec eni_ctl.py -a {redirection}")
    assert done.returncode == 4
    done = machine.run("sh", "-c", f"exec eni_ctl.py -x {redirection}")
    assert done.returncode == 2


@pytest.mark.parametrize("redirection", [">&-", ">/dev/full", "| true"])
def test_the_work_is_done_where_stdout_is_closed_or_full(
    lab: Lab, machine: Machine, eni: str, redirection: str
) -> None:
    machine.run("sh", "-c", f"eni_ctl.py -a {redirection}")
    assert holder(lab, eni) == machine.instance.id
    assert machine.state()["ENI_ID"] == eni


def test_a_report_that_cannot_be_written_is_none(machine: Machine) -> None:
    done = machine.run("sh", "-c", "exec eni_ctl.py -s --json >/dev/full")
    assert done.returncode == 1
    assert last_line(done) == "eni_ctl.py: cannot write the report: No space left on device"
    assert machine.run("bash", "-c", "eni_ctl.py -s | true; exit ${PIPESTATUS[0]}").returncode != 1


# --- the command line


@pytest.mark.parametrize("words", [[], ["-a", "-d"], ["-x"], ["-a", "-x"], ["-a", "-t", "soon"]])
def test_a_usage_error_begins_with_the_usage_line(machine: Machine, words: list[str]) -> None:
    """The shell version printed "Usage: …", and its users look for that."""
    done = machine.eni_ctl(*words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.lower().startswith("usage: eni_ctl.py ")
    assert "eni_ctl.py: error: " in last_line(done)


@pytest.mark.parametrize(("words", "wrong"), [(["-x"], "-x"), (["-a", "--forse"], "--forse")])
def test_the_wrong_word_is_named(machine: Machine, words: list[str], wrong: str) -> None:
    assert wrong in last_line(machine.eni_ctl(*words))


def test_the_help_says_what_each_verb_does_to_what(machine: Machine) -> None:
    done = machine.eni_ctl("--help")
    assert done.returncode == 0
    assert done.stdout.lower().startswith("usage: eni_ctl.py ")
    for flag in ("-a, --attach", "-d, --detach", "-s, --status"):
        (line,) = [line for line in done.stdout.splitlines() if line.strip().startswith(flag)]
        assert not re.search(r" it$", line)


def test_the_status_of_a_name_that_nothing_has_says_so(machine: Machine) -> None:
    done = machine.eni_ctl("-s", "-n", "nosuch")
    assert done.returncode == 3
    assert 'no network interface named "nosuch"' in done.stdout + done.stderr


def test_every_error_begins_with_the_programs_name(lab: Lab, subnet: str) -> None:
    machine = lab.launch(subnet, group="web")
    done = machine.eni_ctl("-a")
    assert done.returncode == 4
    for line in done.stderr.splitlines():
        assert line.startswith("eni_ctl.py: "), done.stderr


def test_an_interrupt_by_hand_ends_with_one_line(
    lab: Lab, subnet: str, machine: Machine, eni: str
) -> None:
    peer = lab.launch(subnet, group="web")
    lab.aws.attach(lab.aws.lab_eni(eni), peer.instance, 1)
    running = machine.popen("env", "--default-signal=INT", "eni_ctl.py", "-a")
    await_that(lambda: calls(lab, "DescribeNetworkInterfaces") >= 1)
    (pid,) = [
        pid
        for pid in machine.processes()
        if b"eni_ctl.py" in subprocess.check_output(["cat", f"/proc/{pid}/cmdline"])
    ]
    os.kill(pid, signal.SIGINT)
    _, err = running.communicate(timeout=OUTER_LIMIT)
    assert running.returncode == 130
    assert "Traceback" not in err
