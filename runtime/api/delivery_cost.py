"""CPU time that the busiest process spends on sending one delta to a client, by protocol. The engine client paces streams by it.

Measured in docs/benchmarks/served.md and rounded up, since a core has other work than tokens.
"""

HTTP_EVENT_S = 28e-6
GRPC_EVENT_S = 125e-6
