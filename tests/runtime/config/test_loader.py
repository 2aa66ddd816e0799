"""The runtime's command line: precedence of its sources, and errors that name them."""

from pathlib import Path

import pytest

from common.errors import ConfigError
from runtime.config.loader import configure


def test_configure_flags_override_environment_overrides_file(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("cache_dir: from-file\ngrace_s: 1\nengine:\n  max_rows: 7\n  device_budget_bytes: 1GiB\n")
    env = {"REPERTORY_GRACE_S": "2", "REPERTORY_SLAB_BYTES": "4MiB", "REPERTORY_LISTEN": "unix:/a, 0.0.0.0:1"}
    config = configure(["--config", str(file), "--max-rows", "9", "--no-fuse"], env)
    assert (config.cache_dir, config.grace_s, config.listen) == ("from-file", 2.0, ("unix:/a", "0.0.0.0:1"))
    assert (config.engine.max_rows, config.engine.device_budget_bytes, config.engine.slab_bytes) == (
        9,
        1 << 30,
        4 << 20,
    )
    assert config.engine.fuse is False
    assert configure(["--config", '{"log_json": true}'], {}).log_json
    assert configure(["--listen", "unix:/a", "--listen", "0.0.0.0:1,unix:/b"], env).listen == (
        "unix:/a",
        "0.0.0.0:1",
        "unix:/b",
    )
    for arguments, named in (
        (["--device-budget", "lots"], "'lots'"),
        (["--config", '{"grase_s": 1}'], "'grase_s'"),
        (["--max-rows", "x"], "max_rows"),
    ):
        with pytest.raises(ConfigError) as caught:
            configure(arguments, {})
        assert named in str(caught.value)
