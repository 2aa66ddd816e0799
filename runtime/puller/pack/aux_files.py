"""Writes the files beside the weights of a packed directory: configuration and tokenizer files, copied or converted."""

import json
import shutil
from pathlib import Path
from typing import Any

from runtime.errors import LoadFailed
from runtime.puller.source import module_files

_COPIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "modules.json",
    "config_sentence_transformers.json",
)


def copy_beside(model_dir: Path, out_dir: Path) -> None:
    """Copy config.json without its quantisation, and the other files unchanged."""
    config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    write_config(config, out_dir)
    for name in _COPIED:
        if (model_dir / name).is_file():
            shutil.copyfile(model_dir / name, out_dir / name)
    templates = "additional_chat_templates"
    if (model_dir / templates).is_dir():
        shutil.copytree(model_dir / templates, out_dir / templates, dirs_exist_ok=True)
    for file in module_files(model_dir):
        (out_dir / file.parent.name).mkdir(exist_ok=True)
        shutil.copyfile(file, out_dir / file.parent.name / file.name)


def write_config(config: "dict[str, Any]", out_dir: Path) -> None:
    for name in ("quantization_config", "_name_or_path", "auto_map"):
        config.pop(name, None)
    (out_dir / "config.json").write_text(json.dumps(config, indent=2, default=str), encoding="utf-8")


def convert_tokenizer(model_dir: Path, out_dir: Path) -> None:
    """Make a tokenizer.json of a slow tokenizer's files. Raises LoadFailed with transformers' message."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(model_dir), local_files_only=True, trust_remote_code=False)
        tokenizer.save_pretrained(str(out_dir))
    except Exception as error:  # Any error of a converter means that the tokenizer cannot be used.
        raise LoadFailed(
            f"the tokenizer cannot be converted to tokenizer.json: {type(error).__name__}: {error}"
        ) from error
    if not (out_dir / "tokenizer.json").is_file():
        raise LoadFailed(
            f"the tokenizer cannot be converted to tokenizer.json: {type(tokenizer).__name__} has no fast form"
        )
