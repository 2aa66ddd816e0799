"""register, fit and rm against a real pod: what changes, what is said of the files, and what is refused."""

import json
from pathlib import Path

import pytest

from tests.support.command_line import Say
from tests.support.pods import RunningPod
from wire.repertory import runtime_pb2 as state_pb


async def test_register_refuses_a_relative_path_that_does_not_exist(pod: RunningPod, say: Say) -> None:
    status, _, error = await say("register", "q", "Qwen/Qwen3-0.6B")
    assert status == 2
    assert "hf://Qwen/Qwen3-0.6B" in error
    assert (await say("list"))[1].startswith("no models are registered")
    # a path of the server's own machine may well lead nowhere here
    assert (await say("register", "q", "/on/the/server"))[0] == 0
    # nor is a path in a bucket one
    assert (await say("register", "r", "models/r", "--storage-key", "store"))[0] == 0
    assert (await say("register", "r", "tests", "--storage-param", "bucket=b"))[0] == 0
    assert json.loads((await say("show", "r", "--json"))[1])["uri"] == "tests"
    assert (await say("register", "r", "./tests", "--storage-param", "bucket=b"))[0] == 0
    assert json.loads((await say("show", "r", "--json"))[1])["uri"] == str(Path("tests").absolute())


async def test_register_reports_new_replaced_and_unchanged_names(pod: RunningPod, say: Say) -> None:
    assert (await say("register", "q", "/q"))[1] == "q is registered (new)\n"
    assert (await say("register", "q", "/q"))[1] == "q is registered already, with the same files and settings\n"
    assert (await say("register", "q", "/r"))[1] == "q is replaced (it was /q)\n"
    assert (await say("load", "q"))[0] == 0
    pod.runtime.switches.load_s = 30.0
    assert (await say("register", "q", "/s"))[1] == "q is replaced: /r answers until /s is loaded\n"


async def test_register_shows_what_the_weights_take(pod: RunningPod, say: Say) -> None:
    assert "q: 9.5 MiB of weights; budget 95 MiB" in (await say("register", "q", "/q"))[2]
    pod.runtime.switches.size_bytes["/big"] = 200_000_000
    assert "warning: big cannot be loaded here: too large" in (await say("register", "big", "/big"))[2]


async def test_register_warns_of_files_that_cannot_be_loaded(pod: RunningPod, say: Say) -> None:
    pod.runtime.switches.unreadable["/sql"] = "/sql is a LoRA adapter"
    status, out, note = await say("register", "sql", "/sql")
    assert (status, out, note) == (
        0,
        "sql is registered (new)\n",
        "warning: sql cannot be loaded: /sql is a LoRA adapter\n",
    )


async def test_rm_of_a_base_names_its_adapters(pod: RunningPod, say: Say) -> None:
    for arguments in (("base", "/base"), ("other", "/other"), ("sql", "/sql", "--adapter-of", "base")):
        assert (await say("register", *arguments))[0] == 0
    assert (await say("rm", "other"))[2] == ""
    assert "sql cannot be loaded until base is registered again" in (await say("rm", "base"))[2]


async def test_register_says_what_a_gguf_file_takes_before_it_is_registered(
    pod: RunningPod, say: Say, tmp_path: Path
) -> None:
    pod.runtime.switches.unpacking["/q.gguf"] = {
        "unpacked_blocks": "Q4_K",
        "stored_bytes": 5 << 20,
        "weight_bytes": 16 << 20,
        "nf4_weight_bytes": 6 << 20,
    }
    sentence = (
        "q: 5.0 MiB of Q4_K blocks are unpacked to 16 MiB when the model is loaded; --quantize nf4 takes 6.0 MiB\n"
    )
    assert (await say("register", "q", "/q.gguf"))[2].startswith(sentence)
    assert "5.0 MiB of Q4_K blocks, which are unpacked; as nf4 6.0 MiB" in (await say("fit", "/q.gguf"))[1]
    pod.runtime.switches.unpacking["/q4_0.gguf"] = {
        **pod.runtime.switches.unpacking["/q.gguf"],
        "unpacked_blocks": "Q4_0",
        "kept_weight_bytes": 7 << 20,
    }
    note = (await say("register", "k", "/q4_0.gguf"))[2]
    assert "unpacked to 16 MiB when the model is loaded; --gguf-blocks keep takes 7.0 MiB and is slower\n" in note
    assert "as nf4 6.0 MiB; kept 7.0 MiB" in (await say("fit", "/q4_0.gguf"))[1]
    answer = await pod.name("r", "/q.gguf")
    assert (answer["fit"]["unpacked_blocks"], answer["fit"]["weight_bytes"]) == ("Q4_K", 16 << 20)
    assert (await pod.model("r"))["fit"] is None
    file = tmp_path / "models.yaml"
    file.write_text("models: {s: /q.gguf}\n")
    assert (await say("register", "-f", str(file)))[2] == sentence.replace("q:", "s:", 1)


async def test_fit_takes_a_name_before_a_file_of_that_name(
    pod: RunningPod, say: Say, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.gguf").touch()
    status, _, error = await say("fit", "m.gguf", "--adapter-of", "nobody")
    assert (status, "'nobody' is not registered" in error, len(pod.runtime.fits)) == (1, True, 0)
    assert (await say("fit", "m.gguf"))[0] == 0
    assert pod.runtime.fits[-1].model_path == str(tmp_path / "m.gguf")
    await pod.name("m.gguf", "/elsewhere")
    assert (await say("fit", "m.gguf"))[0] == 0
    assert pod.runtime.fits[-1].model_path == "/elsewhere"
    status, _, error = await say("fit", "nobody")
    assert (status, "model not found" in error) == (1, True)


async def test_register_shows_the_size_even_if_the_registration_fails(pod: RunningPod, say: Say) -> None:
    """The size comes first, so that a person can change the settings before anything is registered."""
    status, out, note = await say("register", "no spaces", "/q")
    assert (status, out) == (1, "")
    assert note.startswith("no spaces: 9.5 MiB of weights; budget 95 MiB\n")


async def test_register_refuses_at_once_what_the_runtime_can_never_load(pod: RunningPod, say: Say) -> None:
    pod.runtime.switches.invalid["/q"] = "path '/q' is outside the model roots"
    status, _, error = await say("register", "q", "/q")
    assert (status, error) == (1, "repertory: path '/q' is outside the model roots\n")
    assert json.loads((await say("list", "--json"))[1]) == []


async def test_register_a_file_registers_all_of_it_or_nothing(pod: RunningPod, say: Say, tmp_path: Path) -> None:
    file = tmp_path / "models.yaml"
    file.write_text("models: {ada: {uri: /ada, load: true}, bob: /bob}\naliases: {prod: ada}\n")
    status, out, _ = await say("register", "-f", str(file))
    assert (status, out) == (0, "ada is registered (new); its load has begun\nbob is registered (new)\nprod → ada\n")
    file.write_text("models: {cyd: /cyd, ada: {uri: /ada, quantize: nf5}}\n")
    status, _, error = await say("register", "-f", str(file))
    assert status == 2
    assert "quantize is 'nf5'" in error
    assert [model["name"] for model in json.loads((await say("list", "--json"))[1])] == ["ada", "bob", "prod"]


async def test_register_needs_a_name_and_a_uri_or_a_file(say: Say) -> None:
    assert (await say("register", "q"))[::2] == (2, "repertory: register: give a name and a URI, or --file FILE\n")


async def test_rm_files_drops_the_files_that_no_other_name_needs(pod: RunningPod, say: Say) -> None:
    pod.runtime.files = [
        state_pb.CachedFiles(key="pulled-a", kind="pulled", uri="/shared", size_bytes=1 << 20),
        state_pb.CachedFiles(key="packed-b", kind="packed", uri="/shared", size_bytes=1 << 20, in_use=True),
    ]
    for name in ("one", "two"):
        assert (await say("register", name, "/shared"))[0] == 0
    listed = json.loads((await say("cache", "--json"))[1])["entries"]
    assert {entry["key"]: entry["names"] for entry in listed} == {
        "pulled-a": ["one", "two"],
        "packed-b": ["one", "two"],
    }
    status, out, note = await say("rm", "one", "--files")
    assert (status, out, note) == (0, "one is removed\n", "its files stay, because two has the same source\n")
    _, _, note = await say("rm", "two", "--files")
    assert note == "1.0 MiB of files dropped; 1 of them are in use and stay\n"
    assert (await say("cache", "--prune"))[1] == "0 B freed\n"


async def test_register_refuses_a_secret_without_showing_it(pod: RunningPod, say: Say) -> None:
    for arguments in (("https://user:word@example.com/m",), ("/q", "--storage-param", "hf_token=word")):
        status, _, error = await say("register", "q", *arguments)
        assert status == 1
        assert "repertory: model q: " in error
        assert "word" not in error.replace("password", "")


async def test_register_refuses_a_context_of_zero_tokens(pod: RunningPod, say: Say) -> None:
    status, _, error = await say("register", "q", "/q", "--max-model-len", "0")
    assert status == 1
    assert "max_model_len" in error


async def test_fit_of_a_name_merges_the_given_settings(pod: RunningPod, say: Say) -> None:
    assert (await say("register", "q", "/q", "--dtype", "float32"))[0] == 0
    status, told, error = await say("fit", "q", "--quantize", "nf4", "--double-quant", "--json")
    assert (status, error) == (0, "")
    assert json.loads(told)["fits"] is True
    key = json.loads(pod.runtime.fits[-1].model_key)
    assert {name: key[name] for name in ("quantize", "double_quant", "dtype")} == {
        "quantize": "nf4",
        "double_quant": True,
        "dtype": "float32",
    }
