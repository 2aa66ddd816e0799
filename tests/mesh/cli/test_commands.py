"""The command line's verbs against a real pod, as a person or a script calls them: what is printed, and the exit status."""

import io
import json
import os
import re
from pathlib import Path

import pytest

from mesh.cli.main import VERBS, main
from tests.support.command_line import Say
from tests.support.pods import RunningPod, running_pod
from tests.support.waiting import until_async
from wire.mmesh import model_mesh_pb2 as mm


async def test_alias_is_listed_apart_from_its_model_and_deleted_alone(pod: RunningPod, say: Say) -> None:
    assert (await say("register", "ada", "/ada"))[0] == 0
    assert await say("alias", "prod", "ada") == (0, "prod → ada\n", "")
    rows = [line.split() for line in (await say("list"))[1].splitlines()]
    assert next(row for row in rows if row[0] == "prod")[-1] == "ada"
    assert ["alias", "of", "ada"] in [line.split() for line in (await say("show", "prod"))[1].splitlines()]
    listed = {model["name"]: model for model in json.loads((await say("list", "--json"))[1])}
    assert (listed["prod"]["alias_of"], listed["ada"]["alias_of"]) == ("ada", "")
    for name in ("ada", "prod", "nobody"):
        status, _, error = await say("alias", name, name)
        assert (status, f"alias {name}: the target must be another name" in error) == (1, True)
    status, _, error = await say("alias", "ada", "--delete")
    assert (status, error) == (1, "repertory: alias 'ada' not found: it is a registered model\n")
    assert (await say("alias", "prod", "--delete"))[0] == 0
    assert [model["name"] for model in json.loads((await say("list", "--json"))[1])] == ["ada"]
    assert "there is no such name" in (await say("alias", "prod", "--delete"))[2]


async def test_load_reports_a_cut_context(pod: RunningPod, say: Say) -> None:
    pod.runtime.switches.context = (1680, 4096)
    cut = "ada is loaded, with a context of 1,680 tokens, cut from 4,096 to fit the device memory\n"
    assert (await say("register", "ada", "/ada", "--load"))[:2] == (0, cut)
    assert (await say("load", "ada"))[:2] == (0, cut)
    assert "1,680 tokens, cut from 4,096" in " ".join((await say("show", "ada"))[1].split())


async def test_stop_reports_the_requests_that_it_waits_for(pod: RunningPod, say: Say) -> None:
    assert (await say("register", "ada", "/ada", "--load"))[0] == 0
    pod.runtime.switches.sequences = 2
    pod.runtime.tell()
    await until_async(lambda: _running(pod, "ada"))
    status, said, error = await say("stop", "ada")
    assert (status, said) == (0, "ada is unloaded; its registration stays\n")
    assert "waiting for 2 running requests to finish" in error
    assert "`repertory stop --now ada` ends them at once" in error
    assert (await say("load", "ada"))[0] == 0
    assert await say("stop", "--now", "ada") == (0, "ada is unloaded; its registration stays\n", "")


async def _running(pod: RunningPod, name: str) -> bool:
    return bool((await pod.model(name))["running"])


async def test_list_shows_the_last_name_of_a_model_as_no_alias(pod: RunningPod, say: Say) -> None:
    """Whether its first name was removed, or a platform made the vmodel and its target in one call."""
    assert (await say("register", "ada", "/ada"))[0] == 0
    assert (await say("alias", "prod", "ada"))[0] == 0
    assert (await say("rm", "ada"))[0] == 0
    target = mm.SetVModelRequest(
        vModelId="isvc", targetModelId="isvc__isvc-0123456789", modelInfo=mm.ModelInfo(type="llm", path="/m")
    )
    target.autoDeleteTargetModel = True
    await pod.management.setVModel(target)
    await pod.register("plain")
    await pod.management.setVModel(mm.SetVModelRequest(vModelId="other", targetModelId="plain"))
    listed = {model["name"]: model["alias_of"] for model in json.loads((await say("list", "--json"))[1])}
    assert listed == {"isvc": "", "other": "plain", "plain": "", "prod": ""}


async def test_ps_refuses_a_state_that_does_not_exist(say: Say) -> None:
    status, _, error = await say("ps", "--state", "frozen")
    assert status == 2
    assert "'quarantined', 'unloaded')" in error


async def test_cache_of_a_foreign_runtime_is_refused(tmp_path: Path, say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running_pod(tmp_path / "foreign", foreign=True) as running:
        monkeypatch.setenv("REPERTORY_SERVER", f"http://127.0.0.1:{running.pod.http.port}")
        status, _, error = await say("cache")
    assert (status, error) == (1, "repertory: this runtime has no disk cache that can be listed\n")


async def test_run_json_prints_the_response_of_the_api(pod: RunningPod, say: Say) -> None:
    assert (await say("register", "q", "/q"))[0] == 0
    status, told, _ = await say("run", "q", "hello", "--max-tokens", "3", "--json")
    assert status == 0
    assert json.loads(told)["path"] == "/v1/chat/completions"
    assert pod.runtime.bodies[-1]["max_tokens"] == 3


async def test_run_refuses_an_empty_prompt_without_a_terminal(
    pod: RunningPod, say: Say, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    status, told, error = await say("run", "q")
    assert (status, told) == (2, "")
    assert "the prompt is empty" in error


async def test_usage_error_shows_the_usage_of_the_verb(say: Say) -> None:
    status, _, error = await say("ps", "--colour")
    assert status == 2
    assert error.startswith("usage: repertory ps ")


async def test_options_before_the_verb_belong_to_it(pod: RunningPod, say: Say) -> None:
    assert (await say("register", "ada", "/ada"))[0] == 0
    server = os.environ["REPERTORY_SERVER"]
    status, out, _ = await say("--json", "--server", server, "list", "ad*")
    assert (status, [model["name"] for model in json.loads(out)]) == (0, ["ada"])
    status, _, error = await say("--colour", "ps")
    assert status == 2
    assert error.startswith("usage: repertory ps ")


async def test_ps_lists_what_is_loaded_and_list_everything(pod: RunningPod, say: Say) -> None:
    assert (await say("register", "ada", "/ada", "--load"))[0] == 0
    assert (await say("register", "bob", "/bob"))[0] == 0
    status, out, hint = await say("ps")
    assert status == 0
    assert ("ada" in out, "bob" in out) == (True, False)
    assert hint == "1 more registered name is not loaded; `repertory list` shows all\n"
    assert "bob" in (await say("list"))[1]
    assert "bob" in (await say("ps", "--all"))[1]
    named = json.loads((await say("list", "--state", "unloaded", "--json"))[1])
    assert [model["name"] for model in named] == ["bob"]
    on_pod = json.loads((await say("list", "--pod", pod.pod.instance_id, "--json"))[1])
    assert [model["name"] for model in on_pod] == ["ada"]


async def test_pods_lists_the_pod_with_its_addresses(pod: RunningPod, say: Say) -> None:
    status, out, _ = await say("pods", "--json")
    assert status == 0
    assert [found["instance_id"] for found in json.loads(out)] == [pod.pod.instance_id]
    assert pod.pod.instance_id in (await say("pods"))[1]


async def test_run_of_an_unknown_name_shows_the_nearest_names_first(pod: RunningPod, say: Say) -> None:
    for name in ("alpha", "smollm-chat", "zeta"):
        assert (await say("register", name, f"/{name}"))[0] == 0
    status, _, error = await say("run", "SmolLM-chta", "hello")
    assert status == 1
    assert "served here: smollm-chat, alpha, zeta" in error


@pytest.mark.parametrize("server", ["http://127.0.0.1:abc", "http://[::1", "ftp://x", "http://"])
async def test_server_option_refuses_what_is_no_address(server: str, say: Say) -> None:
    status, _, error = await say("ps", "--server", server)
    assert (status, error) == (2, f"repertory: server {server!r} is not an http:// or https:// address\n")


async def test_output_on_a_pipe_is_not_folded(pod: RunningPod, say: Say) -> None:
    path = "/a" + "/folder" * 60
    assert (await say("register", "n" * 150, path))[0] == 0
    assert path in (await say("show", "n" * 150))[1]
    assert f"{'n' * 150}  not loaded" in (await say("list"))[1]
    assert path in (await say("fit", path))[1]


async def test_json_fields_are_those_of_the_documentation(pod: RunningPod, say: Say) -> None:
    """A script reads them: `docs/api-mesh.md` names each, and nothing else."""
    assert (await say("register", "q", "/q"))[0] == 0
    told = json.loads((await say("load", "q", "--json"))[1])
    page = (Path(__file__).resolve().parents[3] / "docs" / "api-mesh.md").read_text()
    table = page.split("with `--json` (")[1].split("| --- | --- |\n")[1].split("\n\n")[0]
    fields = {name for row in table.splitlines() for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert fields == set(told)
    of_a_copy = page.split("Fields of a copy, ")[1].split("\n\n")[1]
    assert set(re.findall(r"`([a-z_]+)`", of_a_copy)) == set(told["copies"][0])


def test_verbs_are_those_of_the_parser(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    offered = set(re.findall(r"^    ([a-z-]+)(?: \(([a-z, ]+)\))?", capsys.readouterr().out, re.MULTILINE))
    names = {name for verb, aliases in offered for name in (verb, *filter(None, aliases.split(", ")))}
    assert names == VERBS
