"""What the pod sends to its workers, and what it makes of their figures, over a real link."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from mesh.config.schema import MeshConfig
from mesh.envoy.interfaces import ClusterFigures, KeyCalls
from mesh.envoy.plan import CarriedName, Carrier, Cluster, Here, PeerCopy, plan_clusters
from mesh.workers.control import WorkerControl
from mesh.workers.link import Link
from mesh.workers.messages import (
    Ask,
    Confirmed,
    CopyCalls,
    EndedCalls,
    Figures,
    Leave,
    Listening,
    Start,
    Table,
    ToControl,
    ToWorker,
)

HERE = Here(dict.fromkeys(Carrier, "unix:runtime"), dict.fromkeys(Carrier, "unix:mesh"))
PEER = PeerCopy("other", "10.0.0.1:8033")
START = Start(MeshConfig(), "pod", dict.fromkeys(Carrier, "127.0.0.1:1"), dict.fromkeys(Carrier, "unix:mesh"))


def clusters(*names: CarriedName) -> dict[str, Cluster]:
    return plan_clusters(names, HERE)


def local(name: str) -> CarriedName:
    return CarriedName(name, name, Carrier.GRPC, local_wait_s=0.0)


class FakeWorker:
    """The other end of a link, which answers when a test has it answer."""

    def __init__(self, link: Link[ToWorker]) -> None:
        self.link = link
        self.names: set[str] = set()
        self.messages = link.messages()
        self.has_listened = False
        self.was_killed = False

    async def listen(self) -> None:
        self.has_listened = True
        self.link.send(Listening())
        await self.confirm()

    async def next(self) -> ToWorker:
        async with asyncio.timeout(5):
            message = await anext(self.messages)
        if isinstance(message, Table):
            self.names = (self.names | message.changed.keys()) - set(message.removed)
        return message

    async def confirm(self) -> None:
        message = await self.next()
        assert isinstance(message, Table)
        self.link.send(Confirmed(message.generation))

    async def report(self, begun: int, active: int, *keys: EndedCalls) -> None:
        """Answer the next question with calls to the copy of `m`."""
        message = await self.next()
        assert isinstance(message, Ask)
        copies = {cluster.stat_name: CopyCalls(begun, active, 0.0) for cluster in clusters(local("m")).values()}
        self.link.send(Figures(message.number, copies, keys))


@asynccontextmanager
async def connected(control: WorkerControl, *, listens: bool = True) -> AsyncIterator[FakeWorker]:
    ours, theirs = socket.socketpair()
    worker = FakeWorker(await Link.over(theirs, ToWorker))

    def kill() -> None:
        worker.was_killed = True
        worker.link.close()

    serving = asyncio.create_task(control.serve(await Link.over(ours, ToControl), START, kill))
    assert await worker.next() == START
    if listens:
        await worker.listen()
    yield worker
    worker.link.close()
    assert await serving is worker.has_listened


def controller() -> WorkerControl:
    return WorkerControl(is_foreign=lambda: False, logs_requests=lambda: True, answer_s=0.1)


async def test_workers_carry_only_names_whose_first_copy_is_this_pods() -> None:
    control = controller()
    async with connected(control) as worker:
        assert worker.names == set()
        elsewhere = CarriedName("p", "p", Carrier.GRPC, peers=(PEER,))
        from_peers = CarriedName("m", "m", Carrier.GRPC, local_wait_s=0.0, from_peers=True)
        control.publish(clusters(local("m"), local("n"), elsewhere, from_peers), ())
        await worker.confirm()
        assert worker.names == {"grpc/m", "grpc/n"}
        slow = CarriedName("m", "m", Carrier.GRPC, local_wait_s=9.0, peers=(PEER,))
        control.publish(clusters(slow), ["grpc/n"])
        await worker.confirm()
        assert worker.names == set()


async def test_change_is_confirmed_when_every_listening_worker_has_it() -> None:
    control = controller()
    async with connected(control) as first, connected(control) as second, connected(control, listens=False):
        generation = control.publish(clusters(local("m")), ())
        confirmed = asyncio.create_task(control.confirmed(generation))
        await first.confirm()
        assert not confirmed.done()
        await second.confirm()
        assert await confirmed
        assert control.publish(clusters(local("m")), ()) == generation, "nothing has changed"


async def test_worker_that_begins_to_listen_gets_all_names_first() -> None:
    control = controller()
    async with connected(control, listens=False) as worker:
        control.publish(clusters(local("m")), ())
        control.publish(clusters(local("n")), ())
        await worker.listen()
        assert worker.names == {"grpc/m", "grpc/n"}


async def test_worker_that_begins_to_listen_while_the_pod_leaves_leaves_too() -> None:
    control = controller()
    async with connected(control, listens=False) as worker:
        control.leave()
        await worker.listen()
        assert await worker.next() == Leave()


async def test_silent_worker_is_killed() -> None:
    for question in ("confirm", "report"):
        control = controller()
        async with connected(control) as answering, connected(control) as silent:
            if question == "confirm":
                generation = control.publish(clusters(local("m")), ())
                await asyncio.gather(control.confirmed(generation), answering.confirm())
            else:
                await asyncio.gather(control.figures(), answering.report(0, 0))
            assert (silent.was_killed, answering.was_killed) == (True, False)
            assert control.num_listening == 1


async def test_figures_of_workers_are_added_up_and_survive_a_crash() -> None:
    control = controller()
    [stat_name] = [cluster.stat_name for cluster in clusters(local("m")).values()]
    call = KeyCalls("chat", Carrier.GRPC, "OK")
    control.publish(clusters(local("m")), ())
    async with connected(control) as first:
        async with connected(control) as second:
            ended = EndedCalls("chat", Carrier.GRPC, "OK", 3)
            figures, _, _ = await asyncio.gather(
                control.figures(), first.report(4, 1, ended), second.report(2, 2, ended)
            )
            assert figures.clusters[stat_name] == ClusterFigures(6, 3, 3)
            assert figures.keys[call] == 6
        figures, _ = await asyncio.gather(control.figures(), first.report(1, 1))
        assert figures.clusters[stat_name] == ClusterFigures(7, 1, 6), (
            "the other worker's running calls have ended with it"
        )
        control.publish({}, ["grpc/m"])
        await first.confirm()
        figures, _ = await asyncio.gather(control.figures(), first.report(1, 0))
        assert figures.clusters[stat_name] == ClusterFigures(8, 0, 8)
        control.leave()
        assert await first.next() == Leave()
