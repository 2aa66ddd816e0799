"""Runs the command line's verbs within a test."""

import asyncio

import pytest

from mesh.cli.main import main


class Say:
    """`await say("ps")`: exit status, stdout and stderr."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    async def __call__(self, *arguments: str) -> tuple[int, str, str]:
        self._capsys.readouterr()
        try:
            status = await asyncio.to_thread(main, arguments)
        except SystemExit as error:
            status = int(error.code or 0)
        said = self._capsys.readouterr()
        return status, said.out, said.err
