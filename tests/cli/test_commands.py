"""Each command, on a store that a session wrote."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import agentckpt
from agentckpt.cli.main import COMMANDS, build_parser
from agentckpt.errors import EXIT_CODES, EffectUnknownError

Command = Any


def test_ls_names_sessions_and_their_heads(command: Command, shared_store: Path) -> None:
    ran = command("-s", shared_store, "ls", "--json")
    (row,) = ran.json["sessions"]
    assert ran.code == 0
    assert (row["name"], row["turn"], row["checkpoints"], row["unknown"]) == ("fix", 3, 4, 0)
    text = command("-s", shared_store, "ls").out
    assert row["head"][:8] in text
    assert "fix" in text


def test_log_is_newest_first_and_marks_the_head(command: Command, shared_store: Path) -> None:
    rows = command("-s", shared_store, "log", "fix", "--json").json["rows"]
    assert [row["turn"] for row in rows] == [3, 2, 1, 0]
    assert [row["head"] for row in rows] == [True, False, False, False]
    lines = command("-s", shared_store, "log", "fix", "-n", "2").out.splitlines()
    assert [line[0] for line in lines] == ["@", "○"]


def test_show_takes_names_and_short_ids_and_lists_parts(command: Command, shared_store: Path) -> None:
    by_name = command("-s", shared_store, "show", "fix", "--json").json
    by_id = command("-s", shared_store, "show", by_name["id"][:8], "--json").json
    assert by_name == by_id
    assert {part["kind"] for part in by_name["parts"]} == {"sandbox", "state"}
    assert by_name["turn"] == 3
    assert "part sandbox" in command("-s", shared_store, "show", "fix").out


def test_diff_names_changed_files_and_state(command: Command, shared_store: Path) -> None:
    rows = command("-s", shared_store, "log", "fix", "--json").json["rows"]
    found = command("-s", shared_store, "diff", rows[1]["id"], rows[0]["id"], "--json").json
    lines = {part["part"]: part["lines"] for part in found["parts"]}
    assert lines["sandbox"] == ["+ file-2", "~ log.txt"]
    assert '+ "count": 3,' in [" ".join(line.split()) for line in lines["state"]]


def test_cat_gives_the_bytes_of_a_file_the_state_and_the_manifest(command: Command, shared_store: Path) -> None:
    assert command("-s", shared_store, "cat", "fix:log.txt").out == "line 0\nline 1\nline 2\n"
    assert json.loads(command("-s", shared_store, "cat", "fix", "--state").out)["count"] == 3
    assert json.loads(command("-s", shared_store, "cat", "fix", "--manifest").out)["turn"] == 3
    assert command("-s", shared_store, "cat", "fix:none").code == 10


def test_effects_show_class_state_and_result(command: Command, shared_store: Path) -> None:
    rows = command("-s", shared_store, "effects", "fix", "--json").json["effects"]
    assert [(row["cls"], row["state"]) for row in rows] == [("sandbox", "committed")] * 3 + [("irreversible", "committed")]
    assert rows[-1]["value"] == "released v1"
    assert rows[-1]["begun"] <= rows[-1]["ended"]
    assert command("-s", shared_store, "effects", "fix", "--unknown").code == 0


def test_stats_count_objects(command: Command, shared_store: Path) -> None:
    facts = command("-s", shared_store, "stats", "--json").json["facts"]
    assert facts["num_sessions"] == 1
    assert facts["num_checkpoints"] == 4
    assert facts["pack_bytes"] > 0


def test_fork_tag_promote_rm(command: Command, store: Path) -> None:
    rows = command("-s", store, "log", "fix", "--json").json["rows"]
    older = rows[2]["id"]
    assert command("-s", store, "fork", older[:8], "try").code == 0
    assert command("-s", store, "fork", older[:8], "try").code == 11
    assert command("-s", store, "tag", "try", "green").code == 0
    assert command("-s", store, "show", "green", "--json").json["id"] == older
    assert "try" in command("-s", store, "log", "fix").out
    promoted = command("-s", store, "promote", "try", "--json").json
    assert (promoted["name"], promoted["head"]) == ("fix", older)
    assert command("-s", store, "log", "fix", "--json").json["rows"][0]["reason"] == "promote"
    assert command("-s", store, "tag", "-d", "green").code == 0
    assert command("-s", store, "show", "green").code == 10
    assert command("-s", store, "rm", "try").code == 0
    assert command("-s", store, "log", "try").code == 10
    assert command("-s", store, "verify", "--data").code == 0


def test_restore_writes_the_files_and_dry_run_writes_nothing(command: Command, shared_store: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    planned = command("-s", shared_store, "restore", "fix", "--sandbox", target, "--dry-run", "--json").json
    assert not target.exists()
    assert "file-2" in planned["plan"]
    done = command("-s", shared_store, "restore", "fix", "--sandbox", target, "--json").json
    assert done["num_files"] == planned["num_files"] == 5
    assert (target / "log.txt").read_text() == "line 0\nline 1\nline 2\n"
    again = command("-s", shared_store, "restore", "fix", "--sandbox", target)
    assert again.code == 11
    assert "hint:" in again.err


def test_init_makes_a_store_only_in_an_empty_place(command: Command, tmp_path: Path) -> None:
    assert command("init", tmp_path / "new").code == 0
    assert command("-s", tmp_path / "new", "ls", "--json").json["sessions"] == []
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert command("init", tmp_path / "full").code != 0


def test_prune_keeps_a_whole_store(command: Command, store: Path) -> None:
    planned = command("-s", store, "prune", "--dry-run")
    assert planned.code == 0
    assert command("-s", store, "prune").code == 0
    assert command("-s", store, "verify", "--data").code == 0
    assert command("-s", store, "cat", "fix:log.txt").out.startswith("line 0")


def test_view_is_one_page_that_loads_nothing_and_escapes_content(command: Command, shared_store: Path, tmp_path: Path) -> None:
    page = tmp_path / "run.html"
    assert command("-s", shared_store, "view", "fix", "-o", page).code == 0
    text = page.read_text()
    assert "default-src 'none'" in text
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "").replace("http-equiv", "")
    assert "<b>note" not in text
    assert "\\u003cb>note 2" in text
    data = json.loads(text.split('type="application/json">')[1].split("</script>")[0])
    assert [cut["turn"] for cut in data["cuts"]] == [0, 1, 2, 3]
    assert {event["lane"] for event in data["events"]} == {"sandbox", "effect"}


def test_a_redacted_page_holds_no_contents(command: Command, shared_store: Path, tmp_path: Path) -> None:
    page = tmp_path / "run.html"
    assert command("-s", shared_store, "view", "fix", "-o", page, "--redact").code == 0
    text = page.read_text()
    for secret in ("note 2", "log.txt", "released", "v1", "echo"):
        assert secret not in text


def test_completion_offers_commands_and_sessions(command: Command, shared_store: Path) -> None:
    assert "complete -o filenames" in command("completion", "bash").out
    assert command("completion", "--words", "--", "pr").out.split() == ["promote", "prune"]
    assert command("completion", "--words", "--", "-s", str(shared_store), "log", "f").out.split() == ["fix"]


def test_doctor_says_what_works(command: Command, shared_store: Path) -> None:
    checks = {check["name"]: check for check in command("-s", shared_store, "doctor", "--json").json["checks"]}
    assert checks["flock"]["ok"]
    assert checks["store"]["found"] == "format 1, 1 session"


@pytest.mark.parametrize("name", [c.name for c in COMMANDS])
def test_every_command_has_help(command: Command, name: str) -> None:
    ran = command(name, "--help")
    assert ran.code == 0
    assert "--json" in ran.out


def test_help_shows_the_exit_codes() -> None:
    text = build_parser().format_help()
    for code, meaning in EXIT_CODES.items():
        assert f"{code:>3}  {meaning}" in text


def test_stored_text_cannot_drive_the_terminal(command: Command, tmp_path: Path) -> None:
    from agentckpt.store import Draft, Store

    with Store.open(tmp_path / "s", create=True) as opened:
        body = {"name": "bad\x1b[2J", "tenant": "local", "lineage": bytes(16), "parent": None}
        opened.append(lambda view: [Draft("session", bytes(16), body)])
    out = command("-s", tmp_path / "s", "ls").out
    assert "\x1b" not in out
    assert "bad" in out


def test_the_installed_command_runs(shared_store: Path) -> None:
    environment = {**os.environ, "AGENTCKPT_STORE": str(shared_store), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-m", "agentckpt", "ls"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "fix" in done.stdout


def test_a_head_that_only_moved_wrote_nothing(command: Command, store: Path) -> None:
    older = command("-s", store, "log", "fix", "--json").json["rows"][2]["id"]
    assert command("-s", store, "fork", older, "try").code == 0
    assert command("-s", store, "promote", "try").code == 0
    rows = command("-s", store, "log", "fix", "--json").json["rows"]
    assert (rows[0]["id"], rows[0]["reason"]) == (older, "promote")
    assert rows[0]["new_bytes"] == 0 < rows[1]["new_bytes"]
    assert [row["forks"] for row in rows if row["id"] == older] == [[], ["try"]]
    assert command("-s", store, "stats", "--json").json["facts"]["num_checkpoints"] == 4


def test_what_a_command_lacks_is_a_usage_error(command: Command, shared_store: Path) -> None:
    for arguments in (["tag", "x"], ["log", "fix", "-n", "0"], ["completion", "tcsh"], ["log"], ["none"]):
        assert command("-s", shared_store, *arguments).code == 2, arguments


def test_results_are_shown_as_words_with_what_is_plain_first(command: Command, shared_store: Path) -> None:
    text = command("-s", shared_store, "effects", "fix").out
    assert "exit_code=0" in text
    assert "command=echo line 0" in text
    assert "{" not in text


@pytest.mark.parametrize("applied", [True, False])
def test_a_person_resolves_an_unknown_effect_and_the_session_goes_on(command: Command, tmp_path: Path, applied: bool) -> None:
    calls: list[str] = []

    @agentckpt.tool(effect="irreversible", intent_key=lambda version: version)
    def ship(version: str) -> str:
        calls.append(version)
        if len(calls) == 1:
            raise OSError("the line went dead")
        return "second"

    def run() -> str:
        with agentckpt.Session.open(tmp_path / "store", "fix") as session:
            for turn in session.turns():
                return str(turn.call(ship, version="v1"))
        raise AssertionError

    for _ in range(2):
        with pytest.raises(EffectUnknownError, match="turn 1") as error:
            run()
    assert calls == ["v1"]
    (effect,) = command("-s", tmp_path / "store", "effects", "fix", "--json").json["effects"]
    assert f"agentckpt resolve {effect['key'][:12]}" in str(error.value.hint)
    how = ["--applied", "--value", '"first"'] if applied else ["--not-applied"]
    assert command("-s", tmp_path / "store", "resolve", "ffff", *how).code == 10
    assert command("-s", tmp_path / "store", "resolve", effect["key"][:12], "--applied", "--value", "{").code == 2
    assert command("-s", tmp_path / "store", "resolve", effect["key"][:12], *how).code == 0
    assert command("-s", tmp_path / "store", "effects", "fix", "--unknown").code == 0
    assert run() == ("first" if applied else "second")
    assert calls == (["v1"] if applied else ["v1", "v1"])
    assert command("-s", tmp_path / "store", "resolve", effect["key"], "--not-applied").code == 11
