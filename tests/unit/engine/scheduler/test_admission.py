"""The peak is never underestimated, and not by more than a block a sequence overestimated."""

from hypothesis import given
from hypothesis import strategies as st

from runtime.engine.scheduler.admission import LengthEstimate, blocks_for, peak_blocks

SETS = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), max_size=12)


@given(SETS, st.integers(1, 16))
def test_peak_against_a_simulation(sequences: list[tuple[int, int]], block_tokens: int) -> None:
    held, left = [h for h, _ in sequences], [r for _, r in sequences]
    truth = 0
    for step in range(61):
        alive = [h + step for h, r in sequences if r >= step]
        truth = max(truth, sum(blocks_for(tokens, block_tokens) for tokens in alive))
    estimate = peak_blocks(held, left, block_tokens)
    assert truth <= estimate <= truth + len(sequences)


def test_staggered_ends_cost_less_than_their_sum() -> None:
    held, left = [100] * 4, [10, 200, 400, 600]
    assert peak_blocks(held, left, 10) < sum(blocks_for(h + r, 10) for h, r in zip(held, left, strict=True))


def test_expected_length_is_a_guess_until_enough_is_known_then_what_is_usual() -> None:
    lengths = LengthEstimate()
    assert lengths.expected(4096, 0) == 256
    assert lengths.expected(40, 0) == 40
    lengths.record(900)
    assert lengths.expected(4096, 0) == 900
    lengths = LengthEstimate()
    for _ in range(20):
        lengths.record(50)
    assert lengths.expected(4096, 0) == 50
    assert lengths.expected(30, 0) == 30
    assert lengths.expected(4096, 400) == 100  # it has outgrown the usual
    assert lengths.expected(4096, 4095) == 1
