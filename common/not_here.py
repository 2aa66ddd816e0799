"""Names the header of a refusal after which another copy can still answer the request."""

# The copy cannot take the request and has not begun it: the model is not loaded there, or nothing is answered now.
NOT_HERE_HEADER = "x-repertory-not-here"
