"""The three ways in which the outside world can meet a retry: by key, by question, and not at all.

All three post to the same witness. They differ in what they declare, and that is all that recovery needs.
"""

from __future__ import annotations

import json
import urllib.parse
import urllib.request

from ..session.tools import Applied, Effect, tool
from ..testing.witness import post

KEYED, ASKED, NEITHER = "deploy_keyed", "deploy_asked", "deploy_neither"


def is_deployed(version: str, url: str, effect: Effect) -> Applied | bool:
    """Ask the witness whether the effect of this key arrived."""
    query = urllib.parse.urlencode({"tool": ASKED, "key": effect.key})
    with urllib.request.urlopen(f"{url}/seen?{query}", timeout=10) as answer:
        return Applied(version) if json.load(answer)["arrivals"] else False


@tool(effect="idempotent", intent_key=lambda version: version, volatile=["url"], name=KEYED)
def deploy_keyed(version: str, url: str, effect: Effect) -> str:
    """The other side honours the key: after a crash it is sent again, and applied once."""
    post(f"{url}/deploy", {"tool": KEYED, "version": version}, key=effect.key)
    return version


@tool(effect="irreversible", intent_key=lambda version: version, volatile=["url"], verify=is_deployed, name=ASKED)
def deploy_asked(version: str, url: str, effect: Effect) -> str:
    """The other side can be asked: after a crash ``is_deployed`` decides."""
    post(f"{url}/deploy", {"tool": ASKED, "version": version}, key=effect.key)
    return version


@tool(effect="irreversible", intent_key=lambda version: version, volatile=["url"], name=NEITHER)
def deploy_neither(version: str, url: str, effect: Effect) -> str:
    """Neither: a crash between dispatch and outcome leaves it unknown, and a person decides."""
    post(f"{url}/deploy", {"tool": NEITHER, "version": version}, key=effect.key)
    return version


DEPLOYS = (deploy_keyed, deploy_asked, deploy_neither)
