"""An engine's imports: without torch's compiler, which is there all the same for whoever asks for it later."""

import subprocess
import sys

PROGRAM = """
import sys
from runtime.engine.import_stubs import leave_out, without_compiler
leave_out()
with without_compiler():
    import runtime.engine.device.backend
    import transformers.generation.utils
    import transformers.models.llama.modeling_llama
loaded = [name for name in ("torch._dynamo", "sympy", "torch.distributed.tensor", "accelerate") if sys.modules.get(name)]
assert not loaded, loaded
import torch
from transformers import LlamaConfig
from runtime.checkpoint.meta_model import build_skeleton
config = LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=16)
build_skeleton(transformers.models.llama.modeling_llama.LlamaForCausalLM, config, "eager")
assert "torch._dynamo" not in sys.modules
import torch._dynamo
assert torch._dynamo.is_compiling() is False
from transformers.masking_utils import TransformGetItemToIndex
with TransformGetItemToIndex():
    pass
print("light")
"""


def test_an_engine_starts_without_a_compiler() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=200, check=False)
    assert done.stdout.strip() == "light", done.stderr[-2000:]
