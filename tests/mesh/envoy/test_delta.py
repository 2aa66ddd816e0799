"""Delta streams: an Envoy that applies what it is sent has what is wanted, whenever it answers."""

from hypothesis import given
from hypothesis import strategies as st

from mesh.envoy.delta import DeltaStream

RESOURCES = st.dictionaries(st.sampled_from("abcd"), st.sampled_from("123"), max_size=4)


@given(RESOURCES, st.lists(st.tuples(RESOURCES, st.integers(0, 3)), max_size=12))
def test_delta_brings_envoy_to_what_is_wanted(
    at_first: dict[str, str], steps: list[tuple[dict[str, str], int]]
) -> None:
    """Each step wants other resources; then Envoy answers some of the messages that are on their way."""
    stream, envoy, sent = DeltaStream(known=dict(at_first)), dict(at_first), list[tuple[str, dict[str, str]]]()
    applied, before = dict(at_first), dict[str, str]()
    for generation, (wanted, num_answers) in enumerate(steps, 1):
        nonce = f"n{generation}"
        changed = {name for name in "abcd" if before.get(name) != wanted.get(name)}
        difference = stream.next(wanted, generation, nonce, among=changed if generation > 1 else None)
        before = wanted
        assert difference is not None or generation > 1, "Envoy waits for a first message"
        if difference is not None:
            for name in difference.removed:
                del envoy[name]
            envoy.update({name: wanted[name] for name in difference.changed})
            sent.append((nonce, dict(envoy)))
        assert envoy == wanted
        for answered, contents in sent[:num_answers]:
            stream.answered(answered)
            applied = contents
        sent = sent[num_answers:]
        if stream.confirmed == generation:
            assert applied == wanted or (not sent and envoy == wanted), "confirmed before Envoy had it"
        if not sent:
            assert stream.confirmed == generation


def test_delta_confirms_earlier_messages_with_a_later_answer() -> None:
    stream = DeltaStream()
    stream.next({"a": "1"}, 1, "x")
    stream.next({"a": "2"}, 2, "y")
    stream.answered("y")
    assert stream.confirmed == 2
    stream.answered("x")
    stream.answered("never sent")
    assert stream.confirmed == 2


def test_delta_sends_what_envoy_kept_over_a_restart_of_the_mesh_only_if_it_changed() -> None:
    stream = DeltaStream(known={"kept": "1", "changed": "1", "gone": "1"})
    difference = stream.next({"kept": "1", "changed": "2", "new": "1"}, 1, "x")
    assert difference is not None
    assert (set(difference.changed), difference.removed) == ({"changed", "new"}, ("gone",))
