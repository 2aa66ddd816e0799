"""Names the headers by which a mesh leaves the log line of a request to its runtime, over HTTP and in gRPC's metadata."""

NAME_HEADER = "x-repertory-name"  # the model's name as the client wrote it, percent-encoded
CALLER_HEADER = "x-repertory-caller"  # the name of the client's key, percent-encoded
WAITED_HEADER = "x-repertory-waited"  # seconds that the request spent in the mesh
LOGGED_HEADER = "x-repertory-logged"  # of the response: the runtime logs the request
LOG_HEADERS = frozenset({NAME_HEADER, CALLER_HEADER, WAITED_HEADER, LOGGED_HEADER})
