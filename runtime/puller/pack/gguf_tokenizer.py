"""Makes tokenizer.json and tokenizer_config.json of the vocabulary in a GGUF file."""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from runtime.errors import LoadFailed
from runtime.puller.gguf_index import GgufIndex

_CONTROL, _USER_DEFINED = 3, 4
_GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_GPT2 = {"gpt-2", "phi-2", "mpt", "olmo"}
_SINGLE_DIGITS = {"smollm", "starcoder", "refact", "command-r", "codeshell"}
# Vocabularies whose whole words win over merges, and that begin with BOS unless the file says otherwise.
_LLAMA3 = {"llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "tekken"}
_MERGES = "tokenizer.ggml.merges"
_NAMED = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def convert_gguf_tokenizer(reader: Any, index: GgufIndex, path: Path, out_dir: Path) -> None:
    """Write the tokenizer of `path` to `out_dir`. Raises LoadFailed for a kind that is not supported."""
    kind = index.metadata.get("tokenizer.ggml.model")
    try:
        if kind == "gpt2":
            _byte_level(reader, index, out_dir)
        else:
            _by_transformers(index, path, out_dir)
    except LoadFailed:
        raise
    except Exception as error:  # a converter raises anything for a vocabulary that it cannot use
        raise LoadFailed(
            f"the tokenizer of {path.name} cannot be converted: {type(error).__name__}: {error}"
        ) from error
    if not (out_dir / "tokenizer.json").is_file():
        raise LoadFailed(f"the tokenizer of {path.name} cannot be converted: its kind {kind!r} has no fast form")


def end_of_turn_ids(index: GgufIndex) -> list[int]:
    """Return the ids of all tokens that the file says end a turn or a text."""
    found = (index.number(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
    return list(dict.fromkeys(token for token in found if token is not None))


def _by_transformers(index: GgufIndex, path: Path, out_dir: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    made: Any = PreTrainedTokenizerFast.from_pretrained(str(path.parent), gguf_file=path.name, local_files_only=True)
    if index.metadata.get("tokenizer.ggml.add_space_prefix") is False and not index.architecture.startswith("gemma"):
        backend = made.backend_tokenizer
        backend.normalizer = None
        backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="never", split=False)
        backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.save_pretrained(str(out_dir))


def _byte_level(reader: Any, index: GgufIndex, out_dir: Path) -> None:
    pre = str(index.metadata.get("tokenizer.ggml.pre") or "")
    tokens = _texts(reader, "tokenizer.ggml.tokens")
    merges = [(left, right) for left, _, right in (merge.partition(" ") for merge in _texts(reader, _MERGES))]
    kinds = [int(kind) for kind in _array(reader, "tokenizer.ggml.token_type")]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: number for number, token in enumerate(tokens)}, merges=merges, ignore_merges=pre in _LLAMA3
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(split), behavior="isolated") for split in _splits(pre)),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    added = [
        AddedToken(token, normalized=False, special=kind == _CONTROL)
        for token, kind in zip(tokens, kinds, strict=False)
        if kind in (_CONTROL, _USER_DEFINED) and token
    ]
    tokenizer.add_special_tokens([token for token in added if token.special])
    tokenizer.add_tokens([token for token in added if not token.special])
    named = {name: tokens[number] for name, number in _named_ids(index, len(tokens)).items()}
    tokenizer.post_processor = _post_processor(index, tokenizer, named, add_bos_by_default=pre in _LLAMA3)
    tokenizer.save(str(out_dir / "tokenizer.json"))
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **named}
    template = index.metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        config["chat_template"] = template
    (out_dir / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def _splits(pre: str) -> list[str]:
    if pre in _GPT2:
        return [_GPT2_SPLIT]
    if pre in _SINGLE_DIGITS:
        return [r"\p{N}", _GPT2_SPLIT]
    splits = _splits_by_name()
    if pre in splits:
        return [splits[pre]]
    known = ", ".join(sorted(_GPT2 | _SINGLE_DIGITS | splits.keys()))
    stated = f"tokenizer.ggml.pre = {pre!r}" if pre else "no tokenizer.ggml.pre"
    raise LoadFailed(
        f"the GGUF file has {stated}, so its text cannot be split as the model learnt it (known: {known}); "
        "use the safetensors version of this model"
    )


def _named_ids(index: GgufIndex, num_tokens: int) -> dict[str, int]:
    ids = {name: index.number(f"tokenizer.ggml.{key}_token_id") for name, key in _NAMED.items()}
    return {name: number for name, number in ids.items() if number is not None and 0 <= number < num_tokens}


def _post_processor(index: GgufIndex, tokenizer: Tokenizer, named: dict[str, str], *, add_bos_by_default: bool) -> Any:
    byte_level = processors.ByteLevel(trim_offsets=False)
    add_bos = bool(index.metadata.get("tokenizer.ggml.add_bos_token", add_bos_by_default)) and "bos_token" in named
    add_eos = bool(index.metadata.get("tokenizer.ggml.add_eos_token", False)) and "eos_token" in named
    if not add_bos and not add_eos:
        return byte_level
    before, after = [named["bos_token"]] * add_bos, [named["eos_token"]] * add_eos
    template = processors.TemplateProcessing(
        single=[*before, "$A", *after],
        pair=[*before, "$A", *after, *(f"{token}:1" for token in before), "$B:1", *(f"{token}:1" for token in after)],
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in {*before, *after}],
    )
    return processors.Sequence([byte_level, template])


def _texts(reader: Any, key: str) -> list[str]:
    field = reader.fields.get(key)
    if field is None:
        raise LoadFailed(f"the GGUF file has no {key}")
    return [bytes(field.parts[part]).decode("utf-8") for part in field.data]


def _array(reader: Any, key: str) -> list[Any]:
    field = reader.fields.get(key)
    return [] if field is None else [field.parts[part][0] for part in field.data]


def _splits_by_name() -> dict[str, str]:
    """Return transformers' table of splitting rules. Its releases before 5.23 have none, and then these names are refused."""
    try:
        from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
    except ImportError:
        return {}
    return dict(GGUF_PRE_TOKENIZER_SPLITS)
