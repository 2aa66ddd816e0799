"""Decides how a class of models may run, by comparing logits with Hugging Face's own forward pass on a small random
model.

The fused stack is used if it agrees. Otherwise the module's own code runs behind the attention hook, if that agrees:
a mask or a bias that bypasses the hook would show here. A class that cannot be made small is tested on a few random
layers of its own size. A class that cannot be tested is refused.
"""

import json
import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from common.model_key import Quantization
from runtime.checkpoint.meta_model import build_skeleton
from runtime.engine.memory.weight_readiness import AlwaysReady
from runtime.engine.model.build.fuse import NoMatchError, match_stack
from runtime.engine.model.build.kv_fixture import KvFixture, trial_planes
from runtime.engine.model.build.tiny_model import cut, random_model, shrink
from runtime.engine.model.run.attention import IMPLEMENTATION, register
from runtime.engine.model.run.fused_spec import StackSpec
from runtime.engine.model.run.fused_stack import FusedStack
from runtime.engine.model.run.kv_geometry import attention_geometry
from runtime.engine.model.run.rope import fix_frequencies, rotary_tables
from runtime.engine.model.run.step import CausalForward
from runtime.engine.model.run.unfused import UnfusedForward

_TOLERANCE = 3e-5  # relative to the largest logit; float32 noise through a few layers is ten times smaller
_MAX_PARAMETERS = 1 << 29  # of a test model: 2 GiB in float32, and the same again for its twin
_BLOCK_TOKENS = 16
_LENGTHS = (27, 10)  # tokens of two rows: more than a page and more than a tiny model's window
_STEPS = (
    ((0, 0, 13), (1, 0, 9)),
    ((0, 13, 12),),
    ((1, 9, 1), (0, 25, 1)),
    ((0, 26, 1),),
)  # (row, first, count): chunks, then decode


@dataclass(frozen=True, slots=True)
class Verdict:
    """How a class of models runs. `reason` says why it is not fused, or, if `refused`, why it cannot run."""

    fused: bool
    interleaved: bool
    refused: bool
    reason: str


class _UntestableError(Exception):
    """The reduced model itself cannot run, so the test has no result."""


class EquivalenceChecker:
    """Returns verdicts and caches them per class and set of flags. Safe to use from several loading threads."""

    def __init__(self, fuse: bool) -> None:
        register()
        self._fuse = fuse
        self._lock = threading.Lock()
        self._verdicts: dict[str, Verdict] = {}

    def verdict(self, model_class: Any, config: Any) -> Verdict:
        with self._lock, torch.inference_mode():
            causes = []
            for reduce in (shrink, cut):
                try:
                    return self._remembered(model_class, reduce(config))
                except Exception as error:  # A configuration that cannot be reduced does not disqualify the model.
                    causes.append(
                        f"{type(error).__name__}: {error}" if not isinstance(error, _UntestableError) else str(error)
                    )
            return Verdict(
                False,
                False,
                True,
                f"it cannot be tested as a tiny model ({causes[0]}) or as a few of its own layers ({causes[1]})",
            )

    def _remembered(self, model_class: Any, small: Any) -> Verdict:
        key = f"{model_class.__name__} {json.dumps(small.to_dict(), sort_keys=True, default=str)}"
        if key not in self._verdicts:
            self._verdicts[key] = self._try(model_class, small)
        return self._verdicts[key]

    def _try(self, model_class: Any, config: Any) -> Verdict:
        """Test a reduced model. Raises _UntestableError, or whatever error the class raises when it is created."""
        num_parameters = sum(
            parameter.numel() for parameter in build_skeleton(model_class, config, "eager").parameters()
        )
        if num_parameters > _MAX_PARAMETERS:
            raise _UntestableError(f"its {num_parameters} parameters exceed the limit of {_MAX_PARAMETERS}")
        ids = [
            torch.randint(0, config.vocab_size, (length,), generator=torch.Generator().manual_seed(length))
            for length in _LENGTHS
        ]
        oracle = random_model(model_class, config, "eager")
        fix_frequencies(oracle, 1)
        expected = [oracle(input_ids=row[None], use_cache=False).logits[0] for row in ids]
        scale = max(float(row.abs().max()) for row in expected)
        reasons = []
        if self._fuse:
            for interleaved in (False, True):
                try:
                    spec = match_stack(oracle, interleaved)
                    worst = _difference(fused_from_module(oracle, spec), oracle, ids, expected)
                except Exception as error:
                    reasons.append(
                        str(error) if isinstance(error, NoMatchError) else f"{type(error).__name__}: {error}"
                    )
                    break
                if worst <= _TOLERANCE * scale:
                    return Verdict(True, interleaved, False, "")
                reasons.append(f"the logits of a tiny model differ by {worst:.1e}")
        else:
            reasons.append("fusing is switched off")

        try:
            hooked = random_model(model_class, config, IMPLEMENTATION)
            fix_frequencies(hooked, 1)
            worst = _difference(UnfusedForward(hooked, AlwaysReady(), 0), hooked, ids, expected)
        except Exception as error:
            return Verdict(False, False, True, f"its code does not run behind the attention hook: {error}")
        if worst > _TOLERANCE * scale:
            return Verdict(
                False,
                False,
                True,
                f"its code does more than the attention hook carries: the logits of a tiny model differ by {worst:.1e}",
            )
        return Verdict(False, False, False, reasons[0])


def fused_from_module(model: nn.Module, spec: StackSpec) -> FusedStack:
    """Return a fused stack over a real module's own tensors, concatenated where the spec joins them."""
    views: dict[str, Tensor] = dict(model.state_dict())
    for join in spec.joins(views):
        views[join.name] = torch.cat([views[name] for name in join.members])
    rotary = model.get_submodule(spec.rotary)
    return FusedStack(
        spec,
        views,
        rotary_tables(rotary, torch.device("cpu")),
        Quantization.NONE,
        AlwaysReady(),
        [0] * (len(spec.layers) + 2),
    )


def _difference(forward: CausalForward, model: nn.Module, ids: list[Tensor], expected: list[Tensor]) -> float:
    """Return the largest difference of any logit, over steps that mix prefill chunks and decode."""
    geometry = attention_geometry(model)
    stride = geometry.token_stride
    planes = trial_planes(geometry.num_layers, stride, _BLOCK_TOKENS, 8, torch.float32)
    rows = KvFixture(planes, stride, _BLOCK_TOKENS, [3, 1, 4, 0, 5, 2], len(ids), 4, torch.device("cpu"))
    worst = 0.0
    for chunks in _STEPS:
        positions, context = rows.step(chunks)
        tokens = torch.cat([ids[row][first : first + count] for row, first, count in chunks])
        logits = forward(tokens, positions, torch.arange(len(tokens)), context)
        wanted = torch.cat([expected[row][first : first + count] for row, first, count in chunks])
        difference = (logits - wanted).abs().max()
        worst = max(worst, float(difference.nan_to_num(float("inf"))))
    return worst
