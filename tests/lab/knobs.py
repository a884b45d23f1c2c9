"""What a test may change in the lab's AWS, before a run or while it runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Hook = Callable[[str, Any], object]
Change = Callable[[dict[str, Any]], dict[str, Any]]


@dataclass
class Refusal:
    """EC2 refuses an action for one resource. `times` counts down to 0; -1 is for ever."""

    action: str
    resource: str  # id of an ENI or an instance
    code: str
    message: str
    status: int = 400
    times: int = -1

    def strikes(self, action: str, resources: list[str]) -> bool:
        """Count a request: is it to be refused?"""
        if self.times == 0 or action != self.action or self.resource not in resources:
            return False
        self.times -= self.times > 0
        return True


@dataclass
class Denial:
    """IAM denies an action for one resource, though the role's policy allows the action."""

    action: str
    resource: str  # id of an ENI or an instance
    why: str  # a key of lab.ec2.DENIED


@dataclass
class Knobs:
    """All times are seconds."""

    # How long things take, and how late they are known.
    attach_delay: float = 0.2
    detach_delay: float = 0.2
    shutdown_delay: float = 0.2
    credential_seconds: int = 6 * 3600
    imds_lag: float = 0.0
    describe_lag: float = 0.0
    # Lags of the next answers, one each: [0, 9] shows what was so 9 s ago after what is so now.
    next_lags: list[float] = field(default_factory=list)

    # The account's size and limits. See lab.ec2.EC2_THROTTLE.
    page_size: int = 1000
    large_account: bool = False
    throttle: dict[str, tuple[int, float]] = field(default_factory=dict)

    # Called in the lab's timer thread with an instance id and moto's ENI.
    plug: Hook = lambda instance_id, eni: None
    unplug: Hook = lambda instance_id, eni: None

    # What goes wrong with one ENI or instance. See also Aws.refuse, Aws.deny and Aws.fail.
    never_plug: set[str] = field(default_factory=set)  # attached without a device appearing
    stuck: set[str] = field(default_factory=set)  # ENIs that stay "detaching" until forced
    stuck_for_good: set[str] = field(default_factory=set)  # ... even then, at a host that is broken
    refuse_detach: set[str] = field(default_factory=set)  # instances
    refusals: list[Refusal] = field(default_factory=list)
    denials: list[Denial] = field(default_factory=list)
