"""Every bad answer, once and for good, at each IMDS path and each API action that is asked.

What is tried "for good" ends in these exit codes; all else in 1, for trying again can help:
    0   404 of the group's tag or its life-cycle state: most instances have neither
    4   403 of the token (IMDS is switched off), 404 of the role (no instance profile), a name that
        no ENI has (what is no HTML could be one), no group, AWS's own "not allowed", and codes
        that mean neither overload nor a lag (here MalformedQueryString): trying again cannot help
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from typing import Any, NamedTuple

import pytest
from lab import Lab, await_that
from lab.imds import ROLE
from lab.wire import Answer, Fault
from places import Place, note, timed, try_all, wrong_end

pytestmark = pytest.mark.timeout(1800)  # for a machine that does other things too

TOKEN = "latest/api/token"
INSTANCE = "latest/meta-data/instance-id"
ZONE = "latest/meta-data/placement/availability-zone"
REGION = "latest/meta-data/placement/region"
TAG = "latest/meta-data/tags/instance/aws:autoscaling:groupName"
STATE = "latest/meta-data/autoscaling/target-lifecycle-state"
ROLES = "latest/meta-data/iam/security-credentials/"
PATHS = [TOKEN, INSTANCE, ZONE, REGION, TAG, ROLES, ROLES + ROLE]
GROUPS, ENIS = "DescribeAutoScalingInstances", "DescribeNetworkInterfaces"
ATTACH, DETACH = "AttachNetworkInterface", "DetachNetworkInterface"
ACTIONS = (GROUPS, ENIS, ATTACH, DETACH)

PAGE = b"<html><body><h1>Log in to go on</h1></body></html>"
KINDS: dict[str, dict[str, Any]] = {
    "refused": {"refused": True},
    "reset": {"how": "reset"},
    "closed": {"how": "drop"},
    "hangs": {"how": "hang"},
    "empty": {"how": "empty"},
    "truncated": {"how": "truncate"},
    "HTML": {"how": "html"},
    "JSON": {"says": Answer(200, b'{"a": [1, 2]}')},
    "a number": {"says": Answer(200, b"5")},
    "bytes": {"says": Answer(200, b"\xff\xfe\x00\x9f\x92")},
    "redirected": {"says": Answer(302, headers={"Location": f"http://169.254.169.254/{INSTANCE}"})},
    **{
        f"bare {n}": {"says": Answer(n, PAGE, "text/html")}
        for n in (400, 401, 403, 404, 429, 500, 503)
    },
}
CODES = {
    "AuthFailure": 401,
    "InvalidClientTokenId": 403,
    "ExpiredToken": 403,
    "RequestExpired": 400,
    "Throttling": 400,
    "RequestLimitExceeded": 503,
    "InternalError": 500,
    "Unavailable": 503,
    "MalformedQueryString": 404,
    "UnauthorizedOperation": 403,
}
FINAL = ("MalformedQueryString", "UnauthorizedOperation")
# Answers of the right action whose values are of the wrong type, or missing.
EC2 = "http://ec2.amazonaws.com/doc/2016-11-15/"
SCALING = "http://autoscaling.amazonaws.com/doc/2011-01-01/"
ENI = "<networkInterfaceSet><item><attachment>{}</attachment></item></networkInterfaceSet>"
WRONG = {
    GROUPS: (
        SCALING,
        f"<{GROUPS}Result><AutoScalingInstances><member><InstanceId>i-1</InstanceId>"
        f"</member></AutoScalingInstances></{GROUPS}Result>",
    ),
    ENIS: (EC2, ENI.format("<deviceIndex>one</deviceIndex>")),
    ATTACH: (EC2, "<networkCardIndex>one</networkCardIndex>"),
    DETACH: (EC2, "<return><item>1</item></return>"),
}


class Case(NamedTuple):
    what: str
    kind: str
    code: int = 1  # the exit code where it is so for good


def options(what: str, kind: str) -> dict[str, Any]:
    """How the lab is told to answer so."""
    if kind in CODES:
        code = "AccessDenied" if (kind, what) == ("UnauthorizedOperation", GROUPS) else kind
        return {"code": code, "status": CODES[kind]}
    if kind == "wrong type":
        space, text = WRONG[what]
        xml = f'<{what}Response xmlns="{space}">{text}</{what}Response>'
        return {"says": Answer(200, xml.encode(), "text/xml")}
    return dict(KINDS[kind])


@pytest.fixture
def make_places(lab: Lab, subnet: str) -> Iterator[Callable[..., list[Place]]]:
    """Places whose pools have one ENI more, which an instance in service holds; in the end nobody
    has asked EC2 to attach it or to detach it."""
    lab.aws.detach_delay = lab.aws.attach_delay = 0.1
    peer = lab.launch(subnet, group="peers", max_interfaces=99)
    theirs: set[str] = set()

    def make(number: int, free: int = 2) -> list[Place]:
        for n in range(number):
            eni = lab.aws.create_eni(subnet, name=f"group{n}")
            lab.aws.never_plug.add(eni)
            theirs.update((eni, lab.aws.attach(lab.aws.lab_eni(eni), peer.instance, n + 1)))
        await_that(lambda: all(e.attachment_status != "attaching" for e in lab.aws.enis.values()))
        return [Place(lab, subnet, f"group{n}", free) for n in range(number)]

    yield make
    assert theirs
    assert not [call for call in lab.aws.calls if theirs & set(call.params.values())]


def once() -> list[str]:
    return sorted([*KINDS, *CODES, "wrong type"], key=lambda kind: kind != "hangs")  # the longest


def test_each_bad_answer_once_is_got_over(make_places: Callable[..., list[Place]]) -> None:
    """One run meets each kind at all paths and actions: at each the first answer is so."""

    def spoil(place: Place, kind: str, concerned: list[str]) -> list[Fault]:
        return [place.fail(what, **options(what, kind)) for what in concerned]

    def attempt(place: Place, kind: str) -> str:
        wrong = []
        paths = [] if kind in CODES or kind == "wrong type" else PATHS
        if kind in ("JSON", "a number"):  # a group may have that name
            paths = [path for path in PATHS if path != TAG]
        actions = [GROUPS, ENIS, ATTACH]
        if kind == "hangs":  # 2 s each, and 10 s
            paths, actions = [TOKEN, INSTANCE, ROLES + ROLE], [ENIS]
        for verb, concerned in (
            (["-a"], [*paths, *actions]),
            (["-a", "-n", place.name], [STATE] if paths else []),
            (["-d", "-n", place.name], [ENIS, DETACH]),
        ):
            faults = spoil(place, kind, concerned)
            done = place.machine.eni_ctl(*verb)
            right = done.returncode == 0 and len(place.held()) == (verb[0] == "-a")
            for fault in faults:
                held = right and fault in place.struck
                note(
                    f"wrong answer, once: {kind}", "API" if fault.what in ACTIONS else "IMDS", held
                )
                wrong += [] if held else [f"{kind}, {fault.what}: {done.returncode} {done.stderr}"]
        place.release()
        return "\n".join(wrong)

    assert try_all(make_places(12), once(), attempt) == []


def for_good() -> Iterator[Case]:
    """All kinds at one path and one action; at the others those that could matter there."""
    for kind in KINDS:
        yield Case(INSTANCE, kind)
    for kind in ("empty", "truncated", "hangs", "bare 400", "bare 401", "bare 404", "bare 429"):
        yield Case(TOKEN, kind)
    yield Case(TOKEN, "bare 403", 4)
    for path, kind in itertools.product((ZONE, REGION), ("truncated", "HTML", "bare 503")):
        yield Case(path, kind)
    for kind, code in {"HTML": 1, "truncated": 1, "bare 403": 1, "bare 503": 1}.items():
        yield Case(TAG, kind, code)
    yield from (Case(TAG, "bare 404", 0), Case(TAG, "JSON", 4))
    yield Case(ROLES, "bare 404", 4)
    for kind in ("refused", "hangs", "a number", "bare 503"):
        yield Case(ROLES, kind)
    for kind in ("closed", "empty", "truncated", "HTML", "JSON", "a number", "bare 500"):
        yield Case(ROLES + ROLE, kind)
    for kind in (*KINDS, *CODES, "wrong type"):
        yield Case(ENIS, kind, 4 if kind in FINAL else 1)
    some = ("hangs", "empty", "HTML", "bare 403", "wrong type", "RequestExpired", *FINAL)
    for kind in some:
        # The answer of the wrong type is about another instance: this one is in no group.
        yield Case(GROUPS, kind, 4 if kind in (*FINAL, "wrong type") else 1)
        # Even where EC2 refuses all free ENIs, the one that is held may become free.
        yield Case(ATTACH, kind)
    yield Case(ATTACH, "truncated", 0)  # it took effect, and the next look shows it


def endure(
    place: Place, case: Case, *arguments: str, prepare: Callable[[], object] = lambda: None
) -> str:
    """Run with a fault that stays; what is wrong with the end that it comes to.

    With a deadline that a machine which is busy otherwise may miss before the run meets the fault,
    or has told it from what passes: then again, with a longer one.
    """
    for seconds in (20, 60, 180) if case.code == 0 else (3, 20, 60, 180):
        place.release()
        prepare()
        fault = place.fail(case.what, times=-1, **options(case.what, case.kind))
        done, took = timed(partial(place.machine.eni_ctl, *arguments, "-t", str(seconds)))
        met = fault in place.struck
        if met and done.returncode == case.code:
            break
    wrong = "" if met else "it was never asked, "
    if done.returncode or case.code:
        wrong += wrong_end(done, case.code, took, seconds + 120)
    where = "API" if case.what in ACTIONS else "IMDS"
    note(f"wrong answer, for good: {case.kind}", where, not wrong)
    place.release()
    return f"{arguments} {case}: {wrong}\n{done.stderr}" if wrong else ""


def test_each_bad_answer_for_good_is_one_line_and_the_right_exit_code(
    make_places: Callable[..., list[Place]],
) -> None:
    assert try_all(make_places(6), for_good(), lambda p, c: endure(p, c, "-a")) == []


def test_each_bad_answer_while_detaching_is_one_line_and_the_right_exit_code(
    make_places: Callable[..., list[Place]],
) -> None:
    def attempt(place: Place, case: Case) -> str:
        return endure(place, case, "-d", prepare=lambda: place.attach(place.enis[0]))

    kinds = ("reset", "hangs", "empty", "JSON", "bare 403", "wrong type", "RequestExpired", *FINAL)
    cases = [Case(DETACH, kind, 4 if kind in FINAL else 1) for kind in kinds]
    cases.append(Case(DETACH, "truncated", 0))  # it took effect
    assert try_all(make_places(6), cases, attempt) == []


def test_a_holder_whose_state_cannot_be_known_is_left_alone(
    make_places: Callable[..., list[Place]],
) -> None:
    """make_places looks at that; all ENIs of the name are held by an instance in service."""
    kinds = ("reset", "empty", "HTML", "bare 403", "bare 503", "wrong type", "Throttling", *FINAL)
    cases = [Case(GROUPS, kind, 4 if kind in FINAL else 1) for kind in kinds]
    cases += [Case(STATE, kind) for kind in ("truncated", "HTML", "bare 503")]
    attempt: Callable[[Place, Case], str] = lambda p, c: endure(p, c, "-a", "-n", p.name)  # noqa: E731
    assert try_all(make_places(6, free=0), cases, attempt) == []


def test_a_token_may_expire_before_any_request(make_places: Callable[..., list[Place]]) -> None:
    def attempt(place: Place, path: str) -> str:
        def expire() -> None:
            tokens = place.lab.aws.imds_tokens
            for token in [t for t, (who, _) in tokens.items() if who == place.machine.instance.id]:
                del tokens[token]

        fault = place.fail(path, do=expire, how="hang", seconds=0.01)
        done = place.machine.eni_ctl("-a")
        held = done.returncode == 0 and fault in place.struck
        note("wrong answer, once: expired token", "IMDS", held)
        place.release()
        return "" if held else f"{path}: {done.stderr}"

    assert try_all(make_places(6), PATHS[1:], attempt) == []


def test_credentials_may_expire_before_any_call(make_places: Callable[..., list[Place]]) -> None:
    """EC2 says RequestExpired, Auto Scaling ExpiredToken; IMDS has new ones."""

    def attempt(place: Place, action: str) -> str:
        def expire() -> None:
            place.machine.instance.credentials.expiration -= timedelta(days=1)

        verb = "-d" if action == DETACH else "-a"
        if verb == "-d":
            place.attach(place.enis[0])
        fault = place.fail(action, do=expire, how="hang", seconds=0.01)
        done = place.machine.eni_ctl(verb)
        held = done.returncode == 0 and fault in place.struck
        note("wrong answer, once: expired credentials", "API", held)
        place.release()
        return "" if held else f"{action}: {done.stderr}"

    assert try_all(make_places(4), [GROUPS, ENIS, ATTACH, DETACH], attempt) == []


def test_a_describe_that_lags_costs_neither_a_second_eni_nor_a_wrong_word(
    make_places: Callable[..., list[Place]],
) -> None:
    """Each run begins while EC2 still shows what was before the one before it."""
    (place,) = make_places(1)
    aws = place.lab.aws
    aws.describe_lag = 2
    # The peer has had its own for longer than that.
    await_that(lambda: all(e.seen(2) == e.describe() for e in aws.enis.values()))
    for verb, number in (("-a", 1), ("-a", 1), ("-d", 0), ("-d", 0), ("-a", 1), ("-d", 0)):
        done = place.machine.eni_ctl(verb)
        held = done.returncode == 0 and len(place.held()) == number
        note("stale describe", f"eni_ctl.py {verb}", held)
        assert held, f"{verb}: {done.stderr}"


@pytest.mark.parametrize("how", ["truncate", "html", "reset"])
def test_the_groups_name_in_imds_is_taken_whole_or_not_at_all(
    lab: Lab, subnet: str, how: str
) -> None:
    """A wrong name would have -d say "not attached", and exit 0."""
    place = Place(lab, subnet, "wéb ✓", free=1, tags_in_imds=True)
    for verb, number in (("-a", 1), ("-d", 0)):
        fault = place.fail(TAG, how=how)
        done = place.machine.eni_ctl(verb)
        held = done.returncode == 0 and fault in place.struck and len(place.held()) == number
        note(f"wrong answer, once: {how} of the group's name", f"eni_ctl.py {verb}", held)
        assert held, done.stderr
        assert place.machine.state()["ASG_NAME"] == "wéb ✓"
