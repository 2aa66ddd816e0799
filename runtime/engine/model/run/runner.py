"""Runs one model's steps: upload, inputs, forward pass, draws, results (interfaces.Runner).

This is the hot path of every model, device and feature. Nothing may be added here that waits for the device, loops over rows in Python when all
rows are plain, or depends on a model family: features attach through the sampler, the log-probabilities and the plan.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from runtime.config.schema import EngineConfig
from runtime.engine.grammar.interfaces import TokenMasks, mask_words
from runtime.engine.interfaces import Bucket, GraphChoice, RowSetup, StepPlan
from runtime.engine.kernels.adapters import sample_chunks, token_chunks
from runtime.engine.kernels.argmax import draw_largest, largest
from runtime.engine.kernels.inputs import build_inputs, commit_draws
from runtime.engine.model.run.adapters import StepAdapters
from runtime.engine.model.run.buckets import bucket_of, standard, wide
from runtime.engine.model.run.cuda_graphs import ModelGraphs
from runtime.engine.model.run.device_state import DeviceState
from runtime.engine.model.run.input_buffers import StepShape
from runtime.engine.model.run.logprobs import LogprobRows, StepLogprobs, score
from runtime.engine.model.run.mask_lines import MaskMemory, StepMaskLines
from runtime.engine.model.run.pooling import PooledRows, pool, pooled_tokens
from runtime.engine.model.run.result_ring import StepLaunched
from runtime.engine.model.run.row_state import to_device
from runtime.engine.model.run.sampler import Sampler
from runtime.engine.model.run.step import BuiltModel, StepContext
from runtime.errors import EngineFault
from runtime.types import ModelFacts


@dataclass(frozen=True, slots=True)
class _ForwardPass:
    """A forward pass that has been launched. `plain`: its draws have been launched, too. `eager`: it ran in the plan's own sizes."""

    plan: StepPlan
    shape: StepShape
    line: int
    logits: torch.Tensor
    plain: bool
    eager: bool
    pooled: PooledRows | None


class ModelRunner:
    """Runs one built model.

    `weights_ready`: whether the last byte of the weights has arrived. Graphs wait for that on the host; eager passes wait on the device.
    `compiled`: whether the kernels of a bucket are compiled. Idle turns capture no other buckets.
    """

    def __init__(
        self,
        built: BuiltModel,
        facts: ModelFacts,
        config: EngineConfig,
        state: DeviceState,
        weights_ready: Callable[[], bool] = lambda: True,
        compiled: Callable[[Bucket], bool] = lambda bucket: True,
    ) -> None:
        del config
        self.facts = facts
        self._built = built
        self._state = state
        self._page_table = state.rows.page_table(-(-built.max_model_len // built.block_tokens) + 1)
        self._sampler = Sampler(built.vocab_size, state.rows)
        self._logprobs = LogprobRows()
        self._undrawn: _ForwardPass | None = None
        self._mask_memory = MaskMemory(mask_words(built.vocab_size), state.device)
        likely = tuple(dict.fromkeys(bucket.within(state.max_rows, state.max_tokens) for bucket in standard()))
        self._graphs = ModelGraphs(
            facts.model_id, state.graphs, state.uploads.blank, self.run_padded, weights_ready, likely, compiled
        )

    def open_row(self, setup: RowSetup) -> None:
        self._sampler.open(setup)
        self._logprobs.open(setup)

    def close_row(self, row: int) -> None:
        self._sampler.close(row)
        self._logprobs.close(row)

    def choose_graph(self, plan: StepPlan) -> GraphChoice:
        if not self._state.graphs.enabled or plan.prompt_logprobs or plan.pooled:
            return GraphChoice()
        counts = plan.counts
        longest = max(map(int.__add__, plan.starts, counts))
        bucket = bucket_of(sum(counts), len(counts), sum(plan.samples), max(counts), longest)
        if bucket is None:
            return GraphChoice()
        bucket = bucket._replace(adapted=bool(plan.adapters))
        rows, tokens = self._state.max_rows, self._state.max_tokens
        return self._graphs.choose(bucket.within(rows, tokens), wide(bucket).within(rows, tokens))

    def has_graph(self, bucket: Bucket) -> bool:
        return self._graphs.find(bucket) is not None

    def is_prepared(self) -> bool:
        return self._graphs.is_prepared()

    @torch.inference_mode()
    def capture(self, bucket: Bucket, *, record: bool) -> None:
        self._graphs.capture(bucket, record=record)

    @torch.inference_mode()
    def launch(self, plan: StepPlan, padded_to: Bucket | None = None) -> StepLaunched:
        return self._finish(self._begin(plan, padded_to), None)

    @torch.inference_mode()
    def launch_forward(self, plan: StepPlan, padded_to: Bucket | None = None) -> None:
        self._undrawn = self._begin(plan, padded_to)

    def mask_lines(self, count: int) -> TokenMasks:
        return self._mask_memory.lines(count)

    @torch.inference_mode()
    def launch_draws(self, masks: TokenMasks) -> StepLaunched:
        forward, self._undrawn = self._undrawn, None
        if forward is None or len(masks) != len(forward.plan.masked):
            expected = 0 if forward is None else len(forward.plan.masked)
            raise EngineFault(f"{len(masks)} masks were given, the launched forward pass needs {expected}")
        return self._finish(forward, StepMaskLines(forward.plan.masked, masks))

    def _begin(self, plan: StepPlan, padded_to: Bucket | None) -> _ForwardPass:
        state = self._state
        line = state.results.take_line()
        shape = state.uploads.pack(plan, line)
        if len(plan.new_blocks) > state.uploads.max_blocks:
            state.rows.enter_blocks(self._page_table, plan.new_blocks[state.uploads.max_blocks :])
        further_at = self._logprobs.prompt_positions(plan, shape) if plan.prompt_logprobs else []
        hidden_at = pooled_tokens(plan, shape) if plan.pooled else None
        self._sampler.unmask(shape, plan.masked)
        plain = self._sampler.all_plain(shape)
        state.results.begin()
        state.uploads.send()
        self._sampler.begin(plan)
        hidden = None
        if padded_to is not None:
            logits = self._graphs.run(padded_to)
        else:
            num_samples = max(1, shape.num_samples)
            logits, hidden = self._pass(
                shape.num_tokens,
                shape.num_rows,
                shape.num_samples,
                shape.max_query_len,
                shape.max_context_len,
                further_at,
                greedy=plain,
                hidden_at=hidden_at,
                adapters=(
                    self._adapters(shape.num_tokens, 0 if further_at or plan.pooled else num_samples, shape.num_chunks)
                    if plan.adapters
                    else None
                ),
            )
        pooled = None if hidden is None else pool(plan, hidden)
        return _ForwardPass(plan, shape, line, logits, plain, padded_to is None, pooled)

    def _finish(self, forward: _ForwardPass, masks: StepMaskLines | None) -> StepLaunched:
        plan, shape, logits = forward.plan, forward.shape, forward.logits
        scored = self._logprobs.asking(shape)
        job = StepLogprobs() if scored or plan.prompt_logprobs else None
        if not forward.plain:
            self._draw(logits, shape, masks, scored, eager=forward.eager)
        if job is not None:
            self._score(job, logits, scored, plan, shape)
        return self._state.results.finish(forward.line, shape.num_samples, job, forward.pooled)

    def close(self) -> None:
        """Release the graphs. The runner must not be used afterwards."""
        self._graphs.close()

    def _pass(
        self,
        num_tokens: int,
        num_rows: int,
        num_samples: int,
        max_query_len: int,
        max_context_len: int,
        further_at: list[int],
        *,
        greedy: bool,
        hidden_at: npt.NDArray[np.int64] | None = None,
        adapters: StepAdapters | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run inputs, forward and, if all draws are plain, the draws.

        Returns logits [num_samples, V], followed by those at `further_at`, and the hidden states at `hidden_at`.
        """
        state, built = self._state, self._built
        inputs = state.inputs
        build_inputs(
            state.uploads.device_words,
            self._page_table,
            state.rows.last_token,
            inputs,
            num_tokens=num_tokens,
            num_rows=num_rows,
            num_samples=max(1, num_samples),
            block_tokens=built.block_tokens,
            page_unit=built.planes[0].page_unit,
            token_stride=built.token_stride,
        )
        step = StepContext(
            built.planes,
            self._page_table,
            inputs.row_slots[:num_rows],
            inputs.query_starts[: num_rows + 1],
            inputs.context_lens[:num_rows],
            inputs.slots[:num_tokens],
            built.block_tokens,
            max_query_len,
            max_context_len,
            state.scratch,
            each_samples=max_query_len == 1 and num_samples == num_tokens and not further_at and hidden_at is None,
            num_hidden=0 if hidden_at is None else len(hidden_at),
            adapters=adapters,
        )
        logits_at = inputs.logits_at[: max(1, num_samples)]
        if further_at:
            logits_at = torch.cat((logits_at[:num_samples], to_device(np.array(further_at, np.int64), state.device)))
        if hidden_at is not None:
            logits_at = torch.cat((logits_at, to_device(hidden_at, state.device)))
        logits = built.forward(inputs.input_ids[:num_tokens], inputs.positions[:num_tokens], logits_at, step)
        if greedy and num_samples:
            draw_largest(
                logits,
                state.drawn,
                state.uploads.device_words,
                inputs,
                state.rows.last_token,
                state.results.lines,
                num_samples=num_samples,
                scratch=state.scratch,
            )
        return logits, step.hidden

    @torch.inference_mode()
    def run_padded(self, bucket: Bucket) -> torch.Tensor:
        """Run a forward pass in the bucket's sizes over the current upload, without results for the host. Returns its logits."""
        logits, _ = self._pass(
            bucket.num_tokens,
            bucket.num_rows,
            bucket.num_rows,
            bucket.max_query_len,
            bucket.max_context_len,
            [],
            greedy=True,
            adapters=self._adapters(bucket.num_tokens, bucket.num_rows) if bucket.adapted else None,
        )
        return logits

    def expect_adapters(self) -> None:
        """Have idle turns capture graphs of steps with adapters, too."""
        state = self._state
        likely = (bucket.within(state.max_rows, state.max_tokens)._replace(adapted=True) for bucket in standard())
        self._graphs.expect(tuple(dict.fromkeys(likely)))

    def _adapters(self, num_tokens: int, num_samples: int, num_chunks: int | None = None) -> StepAdapters:
        """Describe the adapters of a step.

        `num_samples`: tokens whose logits are computed; 0 = others are kept, too. `num_chunks`: None = as many as any step of this size has.
        """
        state, table = self._state, self._built.adapters
        if table is None:
            raise EngineFault("the model was built without adapters")
        words, beside = state.uploads.device_words, state.beside
        of_samples = None
        if num_samples:
            of_samples = StepAdapters(sample_chunks(words, num_samples, table.num_slots), table, num_samples, beside)
        chunks = token_chunks(words, num_tokens, table.num_slots, num_chunks)
        return StepAdapters(chunks, table, num_tokens, beside, of_samples)

    def _draw(
        self, logits: torch.Tensor, shape: StepShape, masks: StepMaskLines | None, scored: list[int], *, eager: bool
    ) -> None:
        drawn = self._state.drawn[: shape.num_samples]
        if eager:
            drawn[:] = largest(logits[: shape.num_samples])
        self._sampler.draw(logits, shape, drawn, masks, scored)
        self._commit(shape.num_samples)

    def _commit(self, num_samples: int) -> None:
        state = self._state
        commit_draws(
            state.drawn,
            state.uploads.device_words,
            state.inputs,
            state.rows.last_token,
            state.results.lines,
            num_samples=num_samples,
        )

    def _score(
        self,
        job: StepLogprobs,
        logits: torch.Tensor,
        samples: list[int],
        plan: StepPlan,
        shape: StepShape,
    ) -> None:
        if samples:
            at = to_device(np.array(samples, np.int64), self._state.device)
            tops = self._logprobs.tops(shape, samples)
            chosen = self._state.drawn[at].clamp(min=0)  # the entry of a row that drew NO_TOKEN is not read
            job.add_drawn(score(logits[at], chosen, max(tops)), samples, tops, shape.num_samples)
        if plan.prompt_logprobs:
            self._logprobs.score_prompts(plan, shape, logits[shape.num_samples :], job)
