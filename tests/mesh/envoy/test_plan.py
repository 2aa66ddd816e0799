"""The planner of Envoy's clusters, as properties over arbitrary copies."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from mesh.envoy.plan import (
    CarriedName,
    Carrier,
    Cluster,
    ClusterPlanner,
    Here,
    PeerCopy,
    PlanChange,
    Role,
    is_plain,
    plan_clusters,
    withdrawn,
)

HERE = Here(
    runtime={carrier: f"unix:/runtime-{carrier}" for carrier in Carrier},
    mesh={carrier: f"unix:/mesh-{carrier}" for carrier in Carrier},
    hop="pod-a",
    peer_key="secret",
)
WAITS = st.floats(0, 100)
PEERS = st.builds(
    PeerCopy,
    instance_id=st.sampled_from(["pod-b", "pod-c", "pod-d"]),
    address=st.sampled_from(["10.0.0.2:8033", "10.0.0.3:8033"]),
    secure=st.booleans(),
    wait_s=WAITS,
)
CARRIED = st.builds(
    CarriedName,
    name=st.text(min_size=1, max_size=12),
    model_id=st.text(min_size=1, max_size=12),
    carrier=st.sampled_from(Carrier),
    local_wait_s=st.none() | WAITS,
    peers=st.lists(PEERS, max_size=3).map(tuple),
)
FROM_PEERS = st.builds(
    CarriedName,
    name=st.just("m"),
    model_id=st.just("m"),
    carrier=st.sampled_from(Carrier),
    local_wait_s=WAITS,
    from_peers=st.just(True),
)


@given(st.lists(CARRIED, max_size=8, unique_by=lambda carried: (carried.name, carried.carrier)))
def test_plan_has_a_cluster_for_each_name_with_a_copy(names: list[CarriedName]) -> None:
    with_copy = {
        f"{carried.carrier}/{carried.name}"
        for carried in names
        if is_plain(carried.name) and (carried.local_wait_s is not None or carried.peers)
    }
    assert plan_clusters(names, HERE).keys() == with_copy


@given(st.lists(st.lists(CARRIED, max_size=6, unique_by=lambda carried: (carried.name, carried.carrier)), max_size=4))
def test_planner_agrees_with_a_plan_from_nothing(turns: list[list[CarriedName]]) -> None:
    planner, known, received = ClusterPlanner(), dict[str, tuple[CarriedName, ...]](), dict[str, Cluster]()
    for number, names in enumerate(turns):
        here = replace(HERE, peer_key=str(number // 2))
        models = {each.model_id: tuple(x for x in names if x.model_id == each.model_id) for each in names}
        now = {model_id: models.get(model_id, ()) for model_id in known.keys() | models}
        change = planner.plan({model_id: each for model_id, each in now.items() if each != known.get(model_id)}, here)
        known = now
        assert all(received.get(name) != cluster for name, cluster in change.changed.items())
        assert change.removed == {name: received[name] for name in change.removed}
        received = {name: each for name, each in received.items() if name not in change.removed} | dict(change.changed)
        assert received == planner.clusters == plan_clusters(names, here)
        assert planner.plan(known, replace(here)) == PlanChange({}, {})


@given(CARRIED)
def test_plan_ends_every_cluster_with_the_mesh(carried: CarriedName) -> None:
    for cluster in plan_clusters([carried], HERE).values():
        (last,) = cluster.tiers[-1]
        assert last.address == HERE.mesh[carried.carrier]
        assert cluster.called_name == carried.name, "the mesh resolves the name itself"
        assert (last.hop, last.peer_key) == ("", ""), "the mesh takes the call as if it were the first to get it"
        assert all(tier for tier in cluster.tiers)


@given(CARRIED)
def test_plan_gives_the_peer_key_to_peers_only(carried: CarriedName) -> None:
    peers = {peer.address for peer in carried.peers}
    for cluster in plan_clusters([carried], HERE).values():
        for endpoint in (endpoint for tier in cluster.tiers for endpoint in tier):
            assert bool(endpoint.peer_key) == bool(endpoint.hop) == (endpoint.address in peers)
            assert endpoint.secure <= (endpoint.address in peers)


@given(CARRIED)
def test_plan_puts_a_slow_local_copy_after_the_peers(carried: CarriedName) -> None:
    for cluster in plan_clusters([carried], HERE).values():
        local, waits = carried.local_wait_s, [peer.wait_s for peer in carried.peers]
        is_local_first = local is not None and (not waits or local <= min(waits) + 0.5)
        assert cluster.role is (Role.LOCAL if is_local_first else Role.PEERS)
        assert (cluster.tiers[0][0].address == HERE.runtime[carried.carrier]) == is_local_first


@given(st.lists(PEERS, min_size=2, max_size=3))
def test_plan_weighs_a_peer_less_the_longer_it_lets_wait(peers: list[PeerCopy]) -> None:
    (cluster,) = plan_clusters([CarriedName("m", "m", Carrier.GRPC, None, tuple(peers))], HERE).values()
    pairs = sorted(zip((peer.wait_s for peer in peers), (end.weight for end in cluster.tiers[0]), strict=True))
    weights = [weight for _, weight in pairs]
    assert weights == sorted(weights, reverse=True)
    assert all(weights)


@given(st.text(max_size=10))
def test_is_plain_refuses_what_a_header_cannot_say(name: str) -> None:
    assert is_plain(name) == (all(" " <= sign <= "~" and sign != "," for sign in name) and name == name.strip(" "))


@given(FROM_PEERS)
def test_plan_ends_a_peers_call_at_this_pod(carried: CarriedName) -> None:
    (cluster,) = plan_clusters([carried, replace(carried, from_peers=False)], HERE).keys() - {f"{carried.carrier}/m"}
    assert cluster == f"{carried.carrier}-peers/m", "callers cannot name the cluster of peers"
    (planned,) = plan_clusters([carried], HERE).values()
    (local,), (mesh,) = planned.tiers
    assert (local.address, local.hop, local.peer_key) == (HERE.runtime[carried.carrier], "", "")
    assert (mesh.address, mesh.hop, mesh.peer_key) == (HERE.mesh[carried.carrier], "pod-a", "secret")


def test_withdrawn_cluster_counts_apart_from_its_copy() -> None:
    carried = CarriedName("m", "m", Carrier.HTTP, 0.0)
    (before,) = plan_clusters([carried], HERE).values()
    after = withdrawn(carried, HERE)
    assert before.name == after.name
    assert before.stat_name != after.stat_name
    assert [[endpoint.address for endpoint in tier] for tier in after.tiers] == [["unix:/mesh-http"]]


def test_clusters_of_two_loads_count_apart() -> None:
    first, second = (
        plan_clusters([CarriedName("m", "m", Carrier.HTTP, 0.0, generation=generation)], HERE)["http/m"]
        for generation in (1, 2)
    )
    assert first.stat_name != second.stat_name, "what the first had counted would hide as many calls of the second"


@given(CARRIED)
def test_plan_pings_no_runtime_that_may_not_accept_it(carried: CarriedName) -> None:
    here = replace(HERE, pings_runtime=False)
    for cluster in plan_clusters([carried], here).values():
        addresses = {endpoint.address for tier in cluster.tiers for endpoint in tier}
        assert cluster.pings == (HERE.runtime[carried.carrier] not in addresses)
