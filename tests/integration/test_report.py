"""What a report tells of a store, and the server that shows it live."""

import http.client
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch

import ckptstore
from ckptstore import report, retention
from ckptstore.errors import InvalidInputError, NotFoundError
from ckptstore.objects.base import Objects
from ckptstore.objects.open import open_objects
from ckptstore.report import charts, page
from ckptstore.report.facts import StoreFacts
from ckptstore.report.serving import LiveReport
from ckptstore.testing import RecordingObjects
from tests.integration.test_cli import Cli, cli

__all__ = ["cli"]

RULES = retention.rules(keep_last=2, keep_every=None, keep_within=None, keep_best=None, keep_tags=None)


@pytest.fixture
def store(tmp_path: Path) -> ckptstore.Store:
    store = ckptstore.Store(tmp_path / "ckpts")
    shared = torch.arange(100_000.0)
    for name in ("a", "b"):
        for step in (1, 2, 3):
            own = torch.full((50_000,), float(step + 10 * (name == "b")))
            state = {"shared": shared, "own": own, "step": step}
            store.run(name).save(state, step=step, metrics={"loss": 1 / step, "note": "x"})
    store.run("a").tag(1, "first")
    return store


def facts_of(store: ckptstore.Store, run: str | None = None, **options: Any) -> StoreFacts:
    return report.make(open_objects(store.url), run, RULES, "--keep-last 2", **options)


def test_runs_are_told_with_what_they_cost_and_share(store: ckptstore.Store) -> None:
    facts = facts_of(store)
    usage = store.usage()
    assert [run.name for run in facts.runs] == ["a", "b"]
    for run in facts.runs:
        assert run.stored_bytes == usage.runs[run.name].stored_bytes
        assert run.shared_bytes == usage.runs[run.name].shared_bytes
        assert run.logical_bytes == usage.runs[run.name].logical_bytes
    assert facts.stored_bytes == usage.stored_bytes
    assert [facts.shared[i][i] for i in (0, 1)] == [run.stored_bytes for run in facts.runs]
    assert facts.shared[0][1] == facts.shared[1][0] == facts.runs[0].shared_bytes


def test_no_chunk_is_read_and_each_manifest_once(store: ckptstore.Store) -> None:
    objects = RecordingObjects(open_objects(store.url))
    report.make(objects, None, RULES, "--keep-last 2")
    got = [key for key in objects.keys("get") if not key.endswith("ckptstore.json")]
    assert len(got) == len(set(got)) == 6
    assert all(key.startswith("runs/") for key in got)


def test_checkpoints_are_told_with_metrics_tags_and_what_a_prune_would_do(store: ckptstore.Store) -> None:
    run = facts_of(store).runs[0]
    assert [each.step for each in run.checkpoints] == [1, 2, 3]
    assert run.checkpoints[1].numbers == {"loss": 0.5}
    assert run.checkpoints[1].metrics == {"loss": "0.5", "note": "x"}
    assert [each.kept for each in run.checkpoints] == [["tag first"], ["last 2"], ["newest", "last 2"]]
    assert run.freed_bytes == 0
    freed = facts_of(store).runs[1].freed_bytes
    planned = store.prune("b", keep_last=2, dry_run=True).freed_bytes
    assert 0 < freed <= planned


def test_the_heat_map_shows_which_tensors_changed(store: ckptstore.Store) -> None:
    heat = facts_of(store).runs[0].heat
    assert heat is not None
    assert (heat.steps, heat.tensors, heat.values) == ([2, 3], ["shared", "own"], [[0.0, 0.0], [1.0, 1.0]])
    assert not heat.is_drift


def test_drift_is_how_far_they_moved(store: ckptstore.Store) -> None:
    heat = facts_of(store, drift=True).runs[0].heat
    assert heat is not None
    assert heat.is_drift
    assert heat.values == [[0.0, 0.0], [pytest.approx(1.0), pytest.approx(0.5)]]


def test_one_run_can_be_shown_alone(store: ckptstore.Store) -> None:
    facts = facts_of(store, "b")
    assert [run.name for run in facts.runs] == ["b"]
    assert "The store" not in page.render(facts, whole=False)
    with pytest.raises(NotFoundError, match="no run 'c'"):
        facts_of(store, "c")


def test_a_damaged_checkpoint_is_shown_as_such_and_the_rest_as_it_is(store: ckptstore.Store, tmp_path: Path) -> None:
    manifest = sorted((tmp_path / "ckpts/runs/a").iterdir())[1]
    manifest.chmod(0o600)
    manifest.write_bytes(b"x" * 2000)
    for chunk in (tmp_path / "ckpts/chunks").rglob("*"):
        if chunk.is_file():
            chunk.chmod(0o600)
            chunk.write_bytes(b"x")
    store.verify()
    facts = facts_of(store, drift=True)
    assert [each.damaged for each in facts.runs[0].checkpoints] == [True, True, True]
    assert [bool(each.created) for each in facts.runs[0].checkpoints] == [True, False, True]
    shown = page.render(facts, whole=True)
    assert "manifest damaged" in shown


def test_a_store_without_runs_is_a_page_as_well(tmp_path: Path) -> None:
    store = ckptstore.Store(tmp_path / "ckpts")
    store.run("a").save({"x": 1}, step=1)
    store.run("a").delete(1)
    assert "There is no checkpoint in it" in page.render(facts_of(store), whole=True)


def test_what_is_not_finite_is_no_number_of_json(tmp_path: Path) -> None:
    store = ckptstore.Store(tmp_path / "ckpts")
    for step, value in enumerate((float("nan"), float("inf"), 1.0)):
        store.run("a").save({"w": torch.full((3,), float(step))}, step=step, metrics={"loss": value})
    shown = page.render(facts_of(store, drift=True), whole=True)
    found = re.search('<script id="charts" type="application/json">(.*?)</script>', shown, re.DOTALL)
    assert found
    data = json.loads(found[1], parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert {row["value"] for row in data["run-1-metrics"]["spec"]["data"]["values"]} == {1.0}


def test_the_page_says_what_may_run_in_it_and_that_nothing_is_fetched(store: ckptstore.Store) -> None:
    shown = page.render(facts_of(store), whole=True)
    policy = re.search('http-equiv="Content-Security-Policy" content="([^"]*)"', shown)
    assert policy
    text = policy[1].replace("&#39;", "'")
    assert "default-src 'none'" in text
    assert "connect-src 'none'" in text
    assert "unsafe-inline" not in text.partition("script-src")[2].partition(";")[0]
    assert "unsafe-eval" not in text
    assert not re.search(r'(src|href)="https?:', shown)


def test_more_tensors_and_steps_than_a_screen_shows_are_left_out_and_counted(tmp_path: Path) -> None:
    run = ckptstore.Store(tmp_path / "ckpts").run("a")
    for step in range(130):
        run.save({f"t{number}": torch.full((number + 1,), float(step)) for number in range(60)}, step=step)
    heat = facts_of(ckptstore.Store(tmp_path / "ckpts")).runs[0].heat
    assert heat is not None
    assert (len(heat.steps), heat.steps[-1], len(heat.tensors), heat.left_out) == (120, 129, 48, 12)
    assert "12 smaller tensors are left out" in charts._heat(heat)["title"]


# ---- the command line


def test_report_writes_a_file_as_a_whole(cli: Cli, store: ckptstore.Store, tmp_path: Path) -> None:
    done = cli("report", store.url, "-o", "r.html")
    assert done.status == 0
    assert re.fullmatch(r"wrote r.html: 2 runs, 6 checkpoints, 9\d\d kB\n", done.out)
    content = Path("r.html").read_text(encoding="utf-8")
    assert content.startswith("<!DOCTYPE html>")
    assert Path("r.html").stat().st_mode & 0o777 == 0o666 & ~_umask()
    assert cli("report", f"{store.url}/b", "-o", "r.html", "--json").document["checkpoints"] == 3
    assert [path.name for path in Path().iterdir() if "r.html" in path.name] == ["r.html"]


def _umask() -> int:
    import os

    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_where_no_file_can_be_written_the_error_says_so_before_the_work(cli: Cli, store: ckptstore.Store) -> None:
    done = cli("report", store.url, "-o", "none/r.html")
    assert done.status == 3
    assert "there is no folder none" in done.err
    Path("folder").mkdir()
    assert "folder is a folder" in cli("report", store.url, "-o", "folder").err


def test_of_one_run_nothing_is_said_of_what_others_share(store: ckptstore.Store) -> None:
    whole, alone = page.render(facts_of(store), whole=True), page.render(facts_of(store, "a"), whole=False)
    assert "shared with other runs" in whole
    assert "<dt>shared with other runs</dt>" not in alone
    assert "a prune would free, if no other run shares it" in alone


def test_a_checkpoint_that_is_deleted_meanwhile_is_left_out_of_the_drift(store: ckptstore.Store) -> None:
    from ckptstore.report.drifting import drift

    facts = facts_of(store).runs[0]
    store.run("a").delete(2)
    heat = drift(open_objects(store.url), facts, 1)
    assert heat is not None
    assert heat.steps == [3]
    assert heat.values[1] == [pytest.approx(2.0)]


def test_drift_reads_each_manifest_once_more_and_lists_a_run_once_more(store: ckptstore.Store) -> None:
    counted = {}
    for with_drift in (False, True):
        objects = RecordingObjects(open_objects(store.url))
        report.make(objects, "a", RULES, "--keep-last 2", drift=with_drift)
        manifests = sum(key.startswith("runs/") for key in objects.keys("get"))
        counted[with_drift] = manifests, objects.count("list")
    assert counted[True] == (2 * counted[False][0], counted[False][1] + 1)


def test_without_the_extra_the_error_says_what_to_install(
    cli: Cli, store: ckptstore.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "vl_convert", None)
    done = cli("report", store.url)
    assert done.status == 2
    assert "pip install 'ckptstore[report]'" in done.err
    with pytest.raises(InvalidInputError):
        page.require()


def test_a_port_that_is_taken_is_said(cli: Cli, store: ckptstore.Store) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = cli("ui", store.url, "--no-open", "--port", str(taken.getsockname()[1]))
    assert done.status == 2
    assert "cannot be listened on" in done.err


# ---- the server


@pytest.fixture
def served(store: ckptstore.Store) -> Iterator[tuple[LiveReport, RecordingObjects]]:
    objects = RecordingObjects(open_objects(store.url))
    live = LiveReport(objects, lambda state: _page(objects, state))
    thread = threading.Thread(target=live.run)
    thread.start()
    yield live, objects
    live.stop()
    thread.join()
    live.close()


def _page(objects: Objects, state: str) -> str:
    return report.render(report.make(objects, None, RULES, "--keep-last 2"), whole=True, live=state)


def ask(live: LiveReport, path: str, host: str | None = None) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", live.port, timeout=30)
    connection.request("GET", path, headers={"Host": host} if host else {})
    answer = connection.getresponse()
    content = answer.read().decode()
    connection.close()
    return answer.status, content


def test_only_who_has_the_address_sees_the_page(served: tuple[LiveReport, RecordingObjects]) -> None:
    live, _ = served
    path = urlsplit(live.url).path
    assert len(path) > 20
    assert ask(live, path)[0] == 200
    for other in ("/", "/state", path[:-2], f"{path}other"):
        assert ask(live, other)[0] == 404


def test_a_page_from_elsewhere_cannot_reach_it_by_another_name(served: tuple[LiveReport, RecordingObjects]) -> None:
    live, _ = served
    path = urlsplit(live.url).path
    for host in ("evil.example", f"evil.example:{live.port}", "127.0.0.1:1"):
        assert ask(live, path, host)[0] == 403
    assert ask(live, path, f"localhost:{live.port}")[0] == 200


def test_the_page_is_made_again_only_when_something_changed(
    served: tuple[LiveReport, RecordingObjects], store: ckptstore.Store
) -> None:
    live, objects = served
    path = urlsplit(live.url).path
    first, state = ask(live, path), ask(live, f"{path}state")
    objects.clear()
    assert (ask(live, path), ask(live, f"{path}state")) == (first, state)
    assert objects.count("get") == 0
    store.run("a").save({"x": 1}, step=9)
    assert ask(live, f"{path}state")[1] != state[1]
    assert ask(live, path)[1] != first[1]


def test_a_store_that_is_gone_is_said_and_the_server_goes_on(
    served: tuple[LiveReport, RecordingObjects], tmp_path: Path
) -> None:
    live, _ = served
    path = urlsplit(live.url).path
    (tmp_path / "ckpts").rename(tmp_path / "away")
    status, text = ask(live, path)
    assert status == 503
    assert "is not a ckptstore store" in text
    (tmp_path / "away").rename(tmp_path / "ckpts")
    assert ask(live, path)[0] == 200


def test_a_metric_that_no_run_has_is_refused(cli: Cli, store: ckptstore.Store) -> None:
    done = cli("report", store.url, "--keep-best", "lost")
    assert done.status == 2
    assert "no run has the metric of a rule: --keep-best lost" in done.err


def test_a_dash_is_standard_output(cli: Cli, store: ckptstore.Store) -> None:
    done = cli("report", store.url, "-o", "-")
    assert done.out.startswith("<!DOCTYPE html>")
    assert not Path("-").exists()
    assert cli("report", store.url, "-o", "-", "--json").status == 2


def test_few_steps_are_named_one_by_one_and_many_metrics_are_counted(tmp_path: Path) -> None:
    run = ckptstore.Store(tmp_path / "ckpts").run("a")
    for step in (1, 2):
        run.save({"x": step}, step=step, metrics={f"m{number}": 0.5 for number in range(50)})
    drawn = charts.of_run(facts_of(ckptstore.Store(tmp_path / "ckpts")).runs[0])
    assert drawn["bytes"]["spec"]["encoding"]["x"]["axis"]["values"] == [1, 2]
    assert drawn["metrics"]["title"] == "Metrics; 2 more are in the table alone"


def test_the_browser_is_sent_there_without_the_address_on_a_command_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from ckptstore.cli import reporting

    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    reporting._open("http://127.0.0.1:1/secret/")
    [place] = opened
    assert "secret" not in place
    page_there = Path(urlsplit(place).path)
    assert page_there.stat().st_mode & 0o077 == 0
    assert "http://127.0.0.1:1/secret/" in page_there.read_text(encoding="utf-8")
