"""What outlives an engine: the front and one engine after another write it, each from a process of its own."""

from pathlib import Path

from runtime.ipc.crash_marker import CrashMarker


def test_crash_marker_reads_and_wipes_each_crash(tmp_path: Path) -> None:
    """Or a start that fails before anything ran would be put down to the model of the death before it, and quarantine that."""
    front = CrashMarker(tmp_path / "crash-marker")
    for model_id in ("a", "b", "b"):
        engine = CrashMarker(tmp_path / "crash-marker")
        engine.mark(model_id)
        engine.close()
        assert front.read() == model_id
        front.mark("")
        assert front.read() is None
    front.close()
