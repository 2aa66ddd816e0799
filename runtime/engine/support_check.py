"""Whether the engine can run a checkpoint, from its configuration alone: `python -m runtime.engine.support_check PATH [MAX_MODEL_LEN]`.

It is a process of its own because the check needs torch and the model's code: like a load, it builds a tiny model. PATH is a directory with
config.json. It prints one JSON line: the reason against it, or an empty string. It reads no weights.
"""

import json
import sys
from pathlib import Path

from common.parent import die_with_parent
from runtime.engine.import_stubs import light_imports
from runtime.errors import LoadFailed
from runtime.types import Checkpoint

_NAME = "it"  # stands for the model in messages, whose beginning is cut off


def refusal(folder: Path, max_model_len: int | None) -> str:
    """Return why the engine cannot run the checkpoint; empty if it can."""
    from runtime.checkpoint.model_config import read_card
    from runtime.engine.model.build.equivalence_check import EquivalenceChecker

    try:
        card = read_card(_NAME, Checkpoint(model_dir=str(folder), dtype="float32"), max_model_len)
    except LoadFailed as error:
        return error.detail
    verdict = EquivalenceChecker(fuse=False).verdict(card.model_class, card.config)
    return f"{card.architecture} is not supported: {verdict.reason}" if verdict.refused else ""


def main(arguments: list[str]) -> int:
    die_with_parent()
    with light_imports():
        reason = refusal(Path(arguments[0]), int(arguments[1]) if len(arguments) > 1 else None)
    print(json.dumps(reason))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
