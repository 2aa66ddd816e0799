"""Plain immutable data that the runtime's packages share: generation requests, checkpoints and facts about a loaded model."""

from enum import StrEnum

import msgspec

from common.model_key import Quantization


class FinishReason(StrEnum):
    """Why a sequence ended. Each API maps these to its own words."""

    EOS = "eos"  # an EOS id of the model
    STOP_TOKEN = "stop_token"  # a stop token id of the request
    STOP_STRING = "stop_string"  # the front process finds it and aborts the row
    LENGTH = "length"  # max_tokens of the request
    CONTEXT = "context"  # the model's max_model_len
    TIME_LIMIT = "time_limit"  # the front process ends the sequence and aborts the row
    ABORTED = "aborted"
    ERROR = "error"


class Pooling(StrEnum):
    """How a prompt's last hidden states make its vector. The names and their order, in which vectors are joined, are those of sentence-transformers.

    MEAN_SQRT_LEN divides the sum of n states by √n. WEIGHTED_MEAN gives the state at position p the weight p + 1.
    """

    FIRST = "cls"
    MAX = "max"
    MEAN = "mean"
    MEAN_SQRT_LEN = "mean_sqrt_len_tokens"
    WEIGHTED_MEAN = "weightedmean"
    LAST = "lasttoken"


class SamplingParams(msgspec.Struct, frozen=True, omit_defaults=True, array_like=True):
    """How to draw a token. `temperature` 0 is greedy: then only penalties, bias and allowed ids matter.

    The defaults switch every filter off.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0  # over prompt and output, as Hugging Face does
    frequency_penalty: float = 0.0  # over output, as OpenAI does
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0
    allowed_token_ids: tuple[int, ...] = ()  # only these may be drawn; empty = all

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def needs_history(self) -> bool:
        """Whether the logits depend on earlier tokens."""
        return self.repetition_penalty != 1.0 or self.frequency_penalty != 0.0 or self.presence_penalty != 0.0

    @property
    def plain(self) -> bool:
        """Greedy without any edit of the logits: the sampler's fast path."""
        return self.greedy and not self.needs_history and not self.logit_bias and not self.allowed_token_ids


class StopParams(msgspec.Struct, frozen=True, omit_defaults=True, array_like=True):
    """When the engine stops. The front process finds stop strings."""

    max_tokens: int
    min_tokens: int = 0  # EOS and stop ids are suppressed until then
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False


class LogprobParams(msgspec.Struct, frozen=True, omit_defaults=True, array_like=True):
    """How many of the best log-probabilities to return beside the chosen token's (0 = only that one); None = no log-probabilities.

    They are log-softmax of the raw logits, before temperature and filters, as in vLLM's default.
    """

    generated: int | None = None
    prompt: int | None = None


class Grammar(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the output must match. `text` is a grammar of llguidance in its JSON form.

    It applies from the first token, or behind the reasoning if `reasoning_close` is not empty.
    """

    text: str
    reasoning_close: str = ""  # the text that ends the reasoning
    reasoning_open_id: int | None = None  # the token with which the output may open the reasoning
    starts_in_reasoning: bool = False  # the prompt has opened it
    param: str = ""  # the request's field that asks for it, for errors


class ReasoningBudget(msgspec.Struct, frozen=True, omit_defaults=True, array_like=True):
    """Ends the reasoning after `tokens` tokens with the token `close_id`.

    The prompt has opened it, or the token `open_id` does, as the first one of the output.
    """

    tokens: int
    close_id: int
    open_id: int | None = None
    starts_in_reasoning: bool = False


class GenerationRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Everything that one sequence asks for. The API's planner makes it, and the engine receives it unchanged in `Add`.

    `sampling.seed` is set and all limits have been checked. The engine reads the first group of fields, the front process the second.
    """

    prompt: tuple[int, ...]
    sampling: SamplingParams
    stop: StopParams
    logprobs: LogprobParams = LogprobParams()
    priority: int = 0  # higher first
    pooling: tuple[
        Pooling, ...
    ] = ()  # answer with these vectors of the prompt, end to end; `stop.max_tokens` is 0 then
    grammar: Grammar | None = None
    bad_words: tuple[tuple[int, ...], ...] = ()  # token sequences that are never drawn; none is empty
    reasoning_budget: ReasoningBudget | None = None

    index: int = 0  # position among the sequences of one API call; each Delta repeats it
    stop_strings: tuple[str, ...] = ()
    include_stop: bool = False  # a stop string (or, with show_stop_token, a stop token) stays in the text
    show_stop_token: bool = False
    stops_by_list: bool = False  # of several matches the first of the list wins, not the first in the text
    length_before_stop: bool = False  # a stop string that the last allowed token completes does not count
    skip_special_tokens: bool = True
    show_markers: bool = (
        False  # special tokens that mark reasoning and tool calls are in the text that the parser reads
    )
    drop_incomplete: bool = False  # drop an incomplete character at the end instead of showing U+FFFD
    one_token_deltas: bool = False  # send one delta per token, even without text
    deadline_s: float | None = None  # event loop time; past it the sequence ends as TIME_LIMIT with what it has
    event_s: float = 0.0  # CPU time that the busiest process spends on sending one delta; 0 = nothing is sent

    @property
    def with_details(self) -> bool:
        return self.logprobs.generated is not None


class ModelSource(msgspec.Struct, frozen=True):
    """Where a model's files are: a URI or a path, and how to reach it. Holds no secret: `storage_key` names a file that does."""

    uri: str
    storage_key: str | None = None
    storage_params: dict[str, str] = {}


class Checkpoint(msgspec.Struct, frozen=True):
    """A model's files on this machine, ready for the engine to load: what the puller and the packer hand over.

    `packed_file` is a safetensors file whose tensors lie in layer order, in the kernels' layout, under the names of the module's parameters
    (`….weight` uint8 with `….absmax` float32 for 4 bit, or with `….q4_0` or `….iq4_nl` float16 for the blocks of a GGUF file; `….weight` int8 with
    `….scale` float32 for int8); None = read `weight_files` where they lie, under the checkpoint's own names.
    """

    model_dir: str  # config.json, generation_config.json, tokenizer files
    weight_files: tuple[str, ...] = ()  # absolute paths, *.safetensors
    packed_file: str | None = None
    quantization: Quantization = Quantization.NONE
    dtype: str = "float32"  # of what is not quantised, and of the arithmetic
    weight_bytes: int = 0  # as they will lie in memory


class ModelFacts(msgspec.Struct, frozen=True):
    """What the engine knows of a loaded model."""

    model_id: str
    architecture: str  # transformers' class name
    path: str  # which way it runs: "fused: …" or "unfused: …", with the reason
    dtype: str
    quantization: Quantization
    weight_bytes: int
    kv_bytes_per_token: int
    max_model_len: int
    vocab_size: int
    num_parameters: int
    eos_token_ids: tuple[int, ...] = ()
    adapter_rank: int = 0  # of a LoRA adapter: its largest rank
    wanted_model_len: int = 0  # max_model_len before it was cut to what the device budget holds
    num_devices: int = 1  # that share it; the sizes are those on each
