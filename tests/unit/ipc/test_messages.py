"""Messages survive the encoding between the front process and the engine with every field."""

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from runtime.ipc.messages import Add, Command
from runtime.types import GenerationRequest, LogprobParams, SamplingParams, StopParams

_ids = st.integers(0, 2**31 - 1)
_floats = st.floats(allow_nan=False)
_requests = st.builds(
    GenerationRequest,
    prompt=st.lists(_ids).map(tuple),
    sampling=st.builds(SamplingParams, temperature=_floats, top_k=_ids, seed=st.integers(0, 2**63 - 1)),
    stop=st.builds(StopParams, max_tokens=_ids, stop_token_ids=st.lists(_ids).map(tuple)),
    logprobs=st.builds(LogprobParams, generated=st.none() | _ids),
    priority=st.integers(-(2**31), 2**31 - 1),
    index=_ids,
    stop_strings=st.lists(st.text()).map(tuple),
    include_stop=st.booleans(),
    deadline_s=st.none() | _floats,
    event_s=_floats,
)


@given(st.builds(Add, _ids, st.text(), _requests))
def test_add_carries_every_field_of_the_request(add: Add) -> None:
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(add), type=Command) == add
