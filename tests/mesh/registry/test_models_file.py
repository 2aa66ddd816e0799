"""The models file: what it may declare, and registrations that follow it."""

from pathlib import Path

import pytest

from common.errors import ConfigError
from mesh.registry.models_file import DeclaredModel, read_models_file
from tests.support.pods import running_pod
from tests.support.waiting import until


def write(directory: Path, text: str) -> Path:
    file = directory / "models.yaml"
    file.write_text(text)
    return file


def test_read_models_file_gives_models_and_aliases(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        "models:\n  smol: {uri: /smol, quantize: nf4, sampling: {temperature: 0.2}, load: true}\n  big: hf://org/big\n"
        "aliases: {prod: smol}\n",
    )
    found = read_models_file(file)
    assert found.models == (
        DeclaredModel("smol", "/smol", "llm", {"quantize": "nf4", "sampling": {"temperature": 0.2}}, True),
        DeclaredModel("big", "hf://org/big", "llm", {}),
    )
    assert found.aliases == {"prod": "smol"}


def test_read_models_file_of_an_empty_file_declares_nothing(tmp_path: Path) -> None:
    assert read_models_file(write(tmp_path, "")).names == frozenset()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: {}", "unknown section 'model'"),
        ("models: [a]", "must hold `NAME: …` lines"),
        ("models: {a: {quantize: nf4}}", "model a: uri is missing"),
        ("models: {a: {uri: /a, quantize: nf5}}", "quantize is 'nf5'"),
        ("models: {a: {uri: /a, double_quant: true}}", "double_quant needs quantize"),
        ("models: {a: {uri: /a, load: 3}}", "model a: .*load"),
        ("models: {'a b': /a}", "may not contain ' '"),
        ("models: {a: /a}\naliases: {a: a}", "both a model and an alias"),
        ("models: {a: /a}\naliases: {b: 3}", "alias b: expected the name of a model"),
    ],
)
def test_read_models_file_names_what_is_wrong(text: str, words: str, tmp_path: Path) -> None:
    file = write(tmp_path, text)
    with pytest.raises(ConfigError, match=words) as refused:
        read_models_file(file)
    assert str(file) in str(refused.value)


async def test_declared_models_follow_changes_of_the_file(tmp_path: Path) -> None:
    file = write(tmp_path, "models: {ada: {uri: /ada, load: true}, bob: /bob}\naliases: {prod: ada}\n")
    async with running_pod(tmp_path / "pod", models_file=str(file)) as running:
        await running.name("mine", "/mine")
        assert running.pod.registry.names() == ["ada", "bob", "mine", "prod"]
        await until(lambda: "/ada" in running.runtime.loaded.values())

        write(tmp_path, "models: {bob: {uri: /bob2}, cyd: /cyd}\naliases: {stable: bob}\n")
        await running.pod.apply_models_file()
        assert running.pod.registry.names() == ["bob", "cyd", "mine", "stable"]
        assert (await running.model("bob"))["uri"] == "/bob2"
        await until(lambda: "/ada" not in running.runtime.loaded.values())


async def test_declared_models_ignore_a_file_that_became_invalid(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = write(tmp_path, "models: {ada: /ada}\n")
    async with running_pod(tmp_path / "pod", models_file=str(file)) as running:
        write(tmp_path, "models: {ada: {uri: /ada, quantize: nf5}, bob: /bob}\n")
        await running.pod.apply_models_file()
        assert running.pod.registry.names() == ["ada"]
    assert "the registrations stay as they are" in caplog.text


async def test_pod_start_refuses_an_invalid_models_file(tmp_path: Path) -> None:
    file = write(tmp_path, "models: 3")
    with pytest.raises(ConfigError, match="must hold"):
        async with running_pod(tmp_path / "pod", models_file=str(file)):
            pass
