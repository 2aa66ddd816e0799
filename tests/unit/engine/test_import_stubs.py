"""An engine's imports come without torch's compiler, and afterwards every library is what it was."""

import subprocess
import sys

LIGHT = """
import gc
import sys
import torch, torch.distributed
from runtime.engine.import_stubs import light_imports
real = torch.compile, torch.distributed.is_available
collections = []
gc.callbacks.append(lambda phase, info: collections.append(phase))
with light_imports():
    collections.clear()
    import runtime.engine.device.backend
    import transformers.generation.utils
    import bitsandbytes.functional
    assert not collections
assert gc.get_freeze_count() > 100_000
def loaded():
    heavy = ("torch._dynamo", "sympy", "torch.distributed.tensor", "accelerate", "boto3")
    return [name for name in heavy if sys.modules.get(name)]
assert not loaded(), loaded()
"""

RESTORED = """
assert (torch.compile, torch.distributed.is_available) == real
hidden = [name for name, module in sys.modules.items() if module is None]
assert not hidden, hidden
assert gc.isenabled()
import accelerate
"""

LATER = """
import transformers.models.llama.modeling_llama
from transformers import LlamaConfig
from runtime.checkpoint.meta_model import build_skeleton
config = LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=16)
build_skeleton(transformers.models.llama.modeling_llama.LlamaForCausalLM, config, "eager")
assert not loaded(), loaded()
"""

COMPILER = """
import torch._dynamo
assert torch._dynamo.is_compiling() is False
from transformers.masking_utils import TransformGetItemToIndex
with TransformGetItemToIndex():
    pass
assert torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)).item() == 2
"""

FAILED = """
import gc
import sys
import torch, torch.distributed
from runtime.engine.import_stubs import light_imports
real = torch.compile, torch.distributed.is_available
try:
    with light_imports():
        raise ImportError
except ImportError:
    pass
"""


def run(program: str) -> None:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_light_imports_leave_the_compiler_out_for_later_models_and_put_everything_back() -> None:
    run(LIGHT + LATER + RESTORED + COMPILER)


def test_light_imports_put_everything_back_after_an_error() -> None:
    run(FAILED + RESTORED)
