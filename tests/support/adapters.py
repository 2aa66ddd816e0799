"""PEFT adapters for tests: made by PEFT over a tiny model, with random matrices large enough to change the text, and saved by PEFT."""

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def peft_model(model: PreTrainedModel, *, seed: int = 0, spread: float = 0.3, **options: Any) -> PeftModel:
    """Wrap `model` (in place) in an adapter whose A and B are random. `options` are LoraConfig's."""
    options.setdefault("target_modules", TARGETS)
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of combinations that it could not merge
        wrapped: PeftModel = get_peft_model(model, LoraConfig(**options))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if ".lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * spread)
    return wrapped.eval()


def save_adapter(wrapped: PeftModel, folder: Path) -> Path:
    """Save the adapter as PEFT does. Returns the folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of embeddings that it saves
        wrapped.save_pretrained(str(folder), safe_serialization=True)
    return folder
